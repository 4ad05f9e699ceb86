"""`python -m ernie_train` is `ernie-train`."""

from ernie_train.cli.main import main

if __name__ == "__main__":
    main()
