# Builds a dictionary whose keys all collide.
class Key:
    def __hash__(self):
        return 1

    def __eq__(self, other):
        return self is other


def f(x):
    return len({Key(): i for i in range(100_000)}) * 0
