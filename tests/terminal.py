"""What programs wrote to a pseudo terminal."""

import os


def read_terminal(ours: int) -> bytes:
    """Return all that was written, and close `ours`; everyone must have closed the other end.

    The kernel hands it over in pieces, which may come later than the writer's end.
    """
    pieces = []
    try:
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    except OSError:  # EIO: Linux's way to say that nobody can write any more
        pass
    finally:
        os.close(ours)
    return b"".join(pieces)
