"""Start the ranks of a run on this machine and supervise them; loads no Paddle."""

from ernie_train.launch.launcher import LaunchSettings
from ernie_train.launch.supervise import last_launch, print_error, supervise

__all__ = ["LaunchSettings", "last_launch", "print_error", "supervise"]
