"""Engines: who samples the completions of a rollout.

All have the interface `Engine`: token ids in; token ids, log-probabilities and, if known, experts
out. `OwnEngine` samples with the model that is trained, on the learner's own ranks; `ServedEngine`
asks a server, vLLM or FastDeploy, that is given each version of the weights.
"""

from ernie_train.generate.engines.build import ask_engine, build_engine
from ernie_train.generate.engines.config import EngineConfig
from ernie_train.generate.engines.own import OwnEngine
from ernie_train.generate.engines.protocol import Engine

__all__ = ["Engine", "EngineConfig", "OwnEngine", "ask_engine", "build_engine"]
