"""Settings of preference pairs and of the term that learns from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from ernie_train.core.config import HARMLESS, Positive, PositiveInt, StrictConfig
from ernie_train.data import MappedRows


class OfflinePairs(MappedRows):
    """Source of offline pairs: a file of preferences, or the stage's starting policy.

    path: rows with a prompt, a chosen and a rejected completion.
    prompts: how many problems the starting policy completes, `group_size` times each, before the
        stage begins; its best and worst completion of each make the pairs, kept in the stage's
        directory.
    per_iteration: pairs in each iteration's updates.
    """

    path: Annotated[str | None, HARMLESS] = None
    prompts: PositiveInt | None = None
    per_iteration: PositiveInt

    @model_validator(mode="after")
    def _one_source(self) -> OfflinePairs:
        if (self.path is None) == (self.prompts is None):
            raise ValueError("exactly one of path and prompts must be given")
        if self.columns is not None and self.path is None:
            raise ValueError("columns need a path: they are those of its rows")
        return self


class PreferenceConfig(StrictConfig):
    """The preference term, coef * DPO(beta) on pairs of completions (arXiv:2305.18290).

    pairs: "online" pairs the best with the worst completion of each of the iteration's prompts,
        where their rewards differ by `margin`; "offline" takes those of `offline`.
    """

    coef: Positive
    pairs: Literal["online", "offline", "both"]
    margin: Positive = 0.5
    beta: Positive = 0.1
    offline: OfflinePairs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceConfig:
        if self.uses_offline and self.offline is None:
            raise ValueError(f"pairs: {self.pairs} needs offline: where they come from")
        if self.offline is not None and not self.uses_offline:
            raise ValueError("offline has no effect without pairs: offline, or both")
        return self

    @property
    def uses_online(self) -> bool:
        return self.pairs in ("online", "both")

    @property
    def uses_offline(self) -> bool:
        return self.pairs in ("offline", "both")
