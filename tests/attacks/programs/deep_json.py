# Writes nested JSON past the encoder, to break the reader.
import os

os.write(3, b"[" * 900_000 + b"]" * 100 + b"\n")
os._exit(0)
