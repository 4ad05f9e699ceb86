"""Settings of preference pairs and of the term that learns from them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    StrictConfig,
)
from ernie_train.data import MappedRows
from ernie_train.losses import REFERENCE_FREE, PreferenceKind
from ernie_train.rewards.scoring import RewardConfig

# On means over tokens and on sums. Per token, beta 2 keeps the gradient of a term of coefficient
# 0.1 at 0.4 of the policy term's, whatever the completions' length.
_BETA_PER_TOKEN, _BETA_OF_SUMS = 2.0, 0.1
_SIMPO_GAMMA = 0.5


class PairLoss(StrictConfig):
    """Loss of a pair of completions, in DPO stages and in the preference term of RL."""

    sums_by_default: ClassVar[bool] = False

    loss: PreferenceKind = "sigmoid"
    """`sigmoid` (DPO, arXiv:2305.18290), `ipo` (arXiv:2310.12036; a squared distance to the margin
    1 / (2 `beta`), beyond which a pair is pulled back), or without a reference model `simpo`
    (arXiv:2405.14734) or `orpo` (arXiv:2403.07691).
    """
    beta: Positive | None = None
    """Scale of the log-ratios in the loss; 0.1 on sums of them, 2 on means over tokens, unless
    given. Of `orpo` the weight of the odds ratio, 0.1 unless given.
    """
    length_normalize: bool | None = None
    """Takes means over a completion's tokens as log-ratios, not sums. Unless given `true`, but
    `false` for `sigmoid` in a stage of kind `dpo`.
    """
    simpo_gamma: NonNegative | None = None
    """Margin that `simpo` aims at; 0.5 unless given."""
    rpo_alpha: NonNegative = 0.0
    """Weight of the chosen completion's mean negative log-likelihood beside the loss (RPO,
    arXiv:2404.19733); 1 for `orpo`, else 0, unless given.
    """

    @model_validator(mode="before")
    @classmethod
    def _likelihood_of_orpo(cls, values: Any) -> Any:
        is_orpo = isinstance(values, dict) and values.get("loss") == "orpo"
        return {"rpo_alpha": 1.0, **values} if is_orpo else values

    @model_validator(mode="after")
    def _of_its_loss(self) -> PairLoss:
        if self.loss != "simpo" and self.simpo_gamma is not None:
            raise ValueError(f"simpo_gamma has no effect with loss: {self.loss}")
        if not self.has_reference and self.length_normalize is False:
            raise ValueError(
                f"loss: {self.loss} is on means over tokens: length_normalize must not be false"
            )
        return self

    @property
    def has_reference(self) -> bool:
        """Return whether the loss compares the policy with another one."""
        return self.loss not in REFERENCE_FREE

    @property
    def is_length_normalized(self) -> bool:
        """Return `length_normalize`, or its default: sums in plain DPO, means everywhere else."""
        if self.length_normalize is None:
            return self.loss != "sigmoid" or not self.sums_by_default
        return self.length_normalize

    @property
    def beta_of_loss(self) -> float:
        """Return `beta`, or the default that fits the log-ratios."""
        per_token = self.is_length_normalized and self.loss != "orpo"
        return self.beta or (_BETA_PER_TOKEN if per_token else _BETA_OF_SUMS)

    @property
    def gamma_of_loss(self) -> float:
        """Return SimPO's margin."""
        return _SIMPO_GAMMA if self.simpo_gamma is None else self.simpo_gamma


class OfflinePairs(MappedRows):
    """Source of offline pairs: a file of preferences, or the stage's starting policy."""

    path: Annotated[PathText | None, HARMLESS] = None
    """A path of rows with a prompt, a chosen and a rejected completion; give this or `prompts`."""
    prompts: PositiveInt | None = None
    """Problems that the starting policy completes, `group_size` times each, before the stage
    begins; its best and worst completion of each make the pairs.
    """
    per_iteration: PositiveInt
    """Pairs in each iteration's updates."""

    @model_validator(mode="after")
    def _one_source(self) -> OfflinePairs:
        if (self.path is None) == (self.prompts is None):
            raise ValueError("exactly one of path and prompts must be given")
        if self.columns is not None and self.path is None:
            raise ValueError("columns need a path: they are those of its rows")
        return self


class SharedReward(RewardConfig):
    """A reward, more expensive than the stage's, that judges a share of an iteration's prompts."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the prompts that it judges: 0.25 is every fourth one."""


class HintConfig(StrictConfig):
    """Completions that begin with the row's own solution."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the solution's tokens that a completion is given."""
    samples: PositiveInt = 4
    """Hinted completions of a prompt; the best is chosen."""


PairSource = Literal["online", "offline", "gold", "hint", "shorter"]


class PreferenceConfig(PairLoss):
    """The preference term, coef * loss of pairs of completions."""

    coef: Positive
    """Coefficient of the pairs' loss in the objective."""
    pairs: Annotated[list[PairSource], Field(min_length=1)]
    """A source or a list of them: `online`, best and worst completion of a prompt; `gold` and
    `hint`, the row's own solution or a completion that was given its beginning against a wrong one,
    in groups that are all wrong; `shorter`, shortest against longest, in groups that are all right;
    `offline`, those of `offline`. `both` is online and offline.
    """
    margin: Positive = 0.5
    """Least difference between the rewards of a pair."""
    reference: Literal["start", "last_iteration"] = "start"
    """Policy that log-ratios are taken against: the stage's starting policy (`start`), or the
    policy as it was when the iteration began (`last_iteration`), which costs no second model.
    """
    pair_reward: SharedReward | None = None
    """A reward that ranks online pairs in place of `reward`, on a `share` of the prompts; written
    as `audit_reward` is.
    """
    hint: HintConfig = HintConfig()
    """Settings of the pairs of `hint`."""
    offline: OfflinePairs | None = None
    """Where offline pairs come from."""

    @field_validator(
        "pairs",
        mode="before",
        json_schema_input_type=PairSource | Literal["both"] | list[PairSource],
    )
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ["online", "offline"] if value == "both" else [value]
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceConfig:
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs names a source twice: {', '.join(self.pairs)}")
        if "offline" in self.pairs and self.offline is None:
            raise ValueError("pairs: offline needs offline: where they come from")
        if self.offline is not None and "offline" not in self.pairs:
            raise ValueError("offline has no effect without pairs: offline, or both")
        if {"gold", "hint"} <= set(self.pairs):
            raise ValueError("pairs: gold and hint are both of groups that are all wrong: name one")
        if "hint" not in self.pairs and self.hint != HintConfig():
            raise ValueError("hint has no effect without pairs: hint")
        if "online" not in self.pairs and self.pair_reward is not None:
            raise ValueError("pair_reward ranks online pairs, which pairs does not name")
        if not self.has_reference and self.reference != "start":
            raise ValueError(
                f"reference: {self.reference} has no effect: {self.loss} has no reference"
            )
        return self

    @property
    def of_rollouts(self) -> bool:
        """Return whether any pairs come from an iteration's completions."""
        return bool({*self.pairs} - {"offline"})

    @property
    def samples_completions(self) -> bool:
        """Return whether completions are sampled for pairs, besides the rollouts."""
        return "hint" in self.pairs or (self.offline is not None and bool(self.offline.prompts))

    @property
    def of_solutions(self) -> bool:
        """Return whether any pairs need the rows' own solutions."""
        return bool({*self.pairs} & {"gold", "hint"})

    @property
    def needs_start(self) -> bool:
        """Return whether log-ratios are against the stage's starting policy."""
        return self.has_reference and self.reference == "start"
