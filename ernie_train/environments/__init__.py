"""Environments: what a policy acts in over several turns, and the tools that it may call there.

An environment gives the messages of a problem (`reset`) and answers each turn of the assistant with
the results of its tool calls, or ends the episode (`step`). Training, evaluation and chat use the
same ones.
"""

from ernie_train.environments.config import EnvironmentConfig
from ernie_train.environments.environment import (
    StepResult,
    Toolbox,
    ToolEnvironment,
    build_toolbox,
    open_toolbox,
)
from ernie_train.environments.episodes import Episode, EpisodeStart, play_episodes

__all__ = [
    "EnvironmentConfig",
    "Episode",
    "EpisodeStart",
    "StepResult",
    "ToolEnvironment",
    "Toolbox",
    "build_toolbox",
    "open_toolbox",
    "play_episodes",
]
