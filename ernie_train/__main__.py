"""`python -m ernie_train` is `ernie-train`."""

from ernie_train.cli.main import program

if __name__ == "__main__":
    program()
