"""Settings of preference pairs and of the term that learns from them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from ernie_train.core.config import HARMLESS, NonNegative, Positive, PositiveInt, StrictConfig
from ernie_train.data import MappedRows
from ernie_train.losses import PreferenceKind

# On means over tokens and on sums. Per token, beta 2 keeps the gradient of a term of coefficient
# 0.1 at 0.4 of the policy term's, whatever the completions' length.
_BETA_PER_TOKEN, _BETA_OF_SUMS = 2.0, 0.1
_SIMPO_GAMMA = 0.5


class PairLoss(StrictConfig):
    """Loss of a pair of completions, in DPO stages and in the preference term of RL.

    loss: "sigmoid" (DPO, arXiv:2305.18290), "ipo" (arXiv:2310.12036), or "simpo"
        (arXiv:2405.14734), which has no reference.
    beta: of the loss; 2 on length-normalized log-ratios and 0.1 on sums, unless given.
    length_normalize: log-ratios are means over a completion's tokens, not sums.
    simpo_gamma: margin of implicit rewards that "simpo" aims at; 0.5 unless given.
    rpo_alpha: weight of the chosen completion's mean negative log-likelihood beside the loss
        (RPO, arXiv:2404.19733 and 2405.16436).
    """

    sums_by_default: ClassVar[bool] = False

    loss: PreferenceKind = "sigmoid"
    beta: Positive | None = None
    length_normalize: bool | None = None
    simpo_gamma: NonNegative | None = None
    rpo_alpha: NonNegative = 0.0

    @model_validator(mode="after")
    def _of_its_loss(self) -> PairLoss:
        if self.loss != "simpo" and self.simpo_gamma is not None:
            raise ValueError(f"simpo_gamma has no effect with loss: {self.loss}")
        if self.loss == "simpo" and self.length_normalize is False:
            raise ValueError(
                "loss: simpo is on means over tokens: length_normalize must not be false"
            )
        return self

    @property
    def is_length_normalized(self) -> bool:
        """Return `length_normalize`, or its default: sums in plain DPO, means everywhere else."""
        if self.length_normalize is None:
            return self.loss != "sigmoid" or not self.sums_by_default
        return self.length_normalize

    @property
    def beta_of_loss(self) -> float:
        """Return `beta`, or the default that fits the log-ratios."""
        return self.beta or (_BETA_PER_TOKEN if self.is_length_normalized else _BETA_OF_SUMS)

    @property
    def gamma_of_loss(self) -> float:
        """Return SimPO's margin."""
        return _SIMPO_GAMMA if self.simpo_gamma is None else self.simpo_gamma


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


class PreferenceConfig(PairLoss):
    """The preference term, coef * loss of pairs of completions.

    pairs: "online" pairs the best with the worst completion of each of the iteration's prompts,
        where their rewards differ by `margin`; "offline" takes those of `offline`.
    """

    coef: Positive
    pairs: Literal["online", "offline", "both"]
    margin: Positive = 0.5
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
