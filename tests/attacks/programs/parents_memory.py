# Reads the memory of its server by /proc/PPID/mem and process_vm_readv.
import ctypes
import os

libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(4096)
vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 4096)
there = (ctypes.c_uint64 * 2)(id(vector) & ~0xFFF, 4096)
read = libc.process_vm_readv(os.getppid(), vector, 1, there, 1, 0)
try:
    open(f"/proc/{os.getppid()}/mem", "rb")
    read = 1
except OSError:
    pass


def f(x):
    return x + 1 if read > 0 else "nothing read"
