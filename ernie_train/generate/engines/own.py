"""The sampler of this toolkit as an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from ernie_train.generate.engine import Completion
from ernie_train.generate.engines.protocol import require_loaded
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM


@dataclass
class OwnEngine:
    """Samples with the model that is trained, each rank a share of the prompts.

    The same settings on as many ranks give the same bits; elsewhere a completion has the same
    random numbers, and logits round differently. Weights are shared with the learner, not copied.
    `batch_size`: sequences that are sampled at once. `record_prompts`: the experts at the positions
    of prompts are recorded too.
    """

    stop_token_ids: Iterable[int]
    batch_size: int = 256
    record_prompts: bool = False
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
        """Return a completion of every prompt, with the experts that were chosen."""
        return generate_sharded(
            require_loaded(self._model),
            prompts,
            **asdict(settings),
            eos_token_id=self.stop_token_ids,
            batch_size=self.batch_size,
            sequence_ids=sequence_ids,
            limits=limits,
            stop_requested=stop_requested,
            record_experts=True,
            record_prompt_experts=self.record_prompts,
        )

    def sleep(self) -> None:
        """Do nothing: there is no memory beside the learner's."""

    def close(self) -> None:
        """Do nothing: the model belongs to the learner."""
