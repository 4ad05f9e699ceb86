# Leaves threads that go on after the program's end.
import threading


def spin():
    while True:
        pass


for _ in range(4):
    threading.Thread(target=spin).start()


def f(x):
    return "still there"
