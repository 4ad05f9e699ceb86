"""The report: a run directory as one HTML page that needs no network and no Paddle.

It reads whatever is there, of a run that goes on, broke off, or was written by another version, and
says what is missing.
"""

from ernie_train.report.page import write_report
from ernie_train.report.run_files import RunFiles, read_run

__all__ = ["RunFiles", "read_run", "write_report"]
