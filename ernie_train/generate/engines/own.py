"""The sampler of this toolkit as an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from ernie_train.generate.engine import Completion
from ernie_train.generate.engines.protocol import require_loaded
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM

# Completions of a call whose experts are recorded where nothing but `experts_changed` needs them:
# those of 512 sequences of 8192 tokens of 21B-A3B are 0.7 GB, which every rank would get.
_RECORDED = 64


@dataclass
class OwnEngine:
    """Samples with the model that is trained, each rank a share of the prompts.

    The same settings on as many ranks give the same bits; elsewhere a completion has the same
    random numbers, and logits round differently. Weights are shared with the learner, not copied.
    `batch_size`: sequences that are sampled at once. `record_experts`: experts are recorded at all
    positions, of prompts too; else those of some completions alone.
    """

    stop_token_ids: Iterable[int]
    batch_size: int = 256
    record_experts: bool = False
    _model: Ernie4_5_MoeForCausalLM | None = field(default=None, init=False, repr=False)

    def load_weights(self, model: Ernie4_5_MoeForCausalLM, version: int) -> None:
        """Sample from now on with `model` as it then is; it has the weights of every version."""
        self._model = model

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingConfig,
        *,
        sequence_ids: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Return a completion of every prompt, all or some of them with the experts chosen."""
        # A power of two: a later turn, with fewer prompts, records all episodes of an earlier one.
        every = 1 << (max(0, len(prompts) - 1) // _RECORDED).bit_length()
        return generate_sharded(
            require_loaded(self._model),
            prompts,
            **asdict(settings),
            eos_token_id=self.stop_token_ids,
            batch_size=self.batch_size,
            sequence_ids=sequence_ids,
            limits=limits,
            stop_requested=stop_requested,
            record_experts=1 if self.record_experts else every,
            record_prompt_experts=self.record_experts,
        )

    def sleep(self) -> None:
        """Do nothing: there is no memory beside the learner's."""

    def close(self) -> None:
        """Do nothing: the model belongs to the learner."""
