"""Find the files of a data path, and read rows of every container that people keep them in."""

from ernie_train.data.files.find import FoundFiles, container, find_files
from ernie_train.data.files.rows import read_rows

__all__ = ["FoundFiles", "container", "find_files", "read_rows"]
