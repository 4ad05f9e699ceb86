"""Starting the ranks of a job on this machine, and supervising them; loads no Paddle."""

from ernie_train.launch.launcher import LaunchSettings
from ernie_train.launch.supervise import print_error, supervise

__all__ = ["LaunchSettings", "print_error", "supervise"]
