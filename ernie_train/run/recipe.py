"""The recipe: one strict schema, read from YAML, changed by overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ernie_train.core.config import (
    PositiveInt,
    StrictConfig,
    apply_overrides,
    load_yaml,
    parse_config,
)
from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute
from ernie_train.rewards.sandbox import SandboxPolicy
from ernie_train.run.stages import AnyStageConfig, SftConfig
from ernie_train.train.supervised_data import SupervisedConfig
from ernie_train.weights.hf import load_config
from ernie_train.weights.model_directory import find_model


class ModelSource(StrictConfig):
    """A preset, trained from scratch, whose config keys may be overridden, or what `path` holds.

    `path`: a Hugging Face directory, a checkpoint or a run directory. Beside it `preset` says which
    sizes must lie there; until they do, `check` and `plan` go by the preset. A run needs the files.
    """

    model_config = ConfigDict(extra="allow")

    preset: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if self.preset is None and self.path is None:
            raise ValueError("preset or path must be given")
        if self.path is not None and self.model_extra:
            names = ", ".join(self.model_extra)
            raise ValueError(
                f"{names}: a model from path keeps its own sizes; remove the overrides"
            )
        if self.preset is not None:
            try:
                self._of_preset()
            except ConfigError as error:
                raise ValueError("; ".join(error.problems)) from None
        return self

    @property
    def is_absent(self) -> bool:
        """Whether there is nothing at `path`, and `preset` stands for it."""
        return self.preset is not None and self.path is not None and not Path(self.path).exists()

    def build(self) -> Ernie4_5_MoeConfig:
        """The model's configuration; `ConfigError` for an unknown preset or impossible sizes.

        Also where the sizes at `path` are not those of the preset beside it.
        """
        if self.path is None or self.is_absent:
            return self._of_preset()
        found = load_config(find_model(self.path).weights)
        if self.preset is not None and (wrong := self._of_preset().differing_sizes(found)):
            listed = ", ".join(f"{name}={value}" for name, value in wrong.items())
            raise ConfigError(
                f"model.path: {self.path} has other sizes than model.preset={self.preset}: {listed}"
            )
        return found

    def told_absent(self) -> str:
        """What to say where the preset stands for a model that is not there."""
        return (
            f"model: nothing at {self.path}; sizes are those of preset {self.preset}. A run needs "
            "the weights: model.path=..."
        )

    def _of_preset(self) -> Ernie4_5_MoeConfig:
        return Ernie4_5_MoeConfig.preset(str(self.preset), **(self.model_extra or {}))


class TokenizerSource(StrictConfig):
    """A directory with a SentencePiece model, or a tokenizer that PaddleNLP can read.

    `stand_in`: another one, by which `check` goes while there is nothing at `path`. A run never
    takes it: ids of the wrong vocabulary would train without an error.
    """

    path: str
    stand_in: str | None = None

    def is_absent(self, base_dir: Path) -> bool:
        """Whether there is nothing at `path`, and `stand_in` stands for it."""
        return self.stand_in is not None and not (base_dir / self.path).exists()


class ParallelConfig(StrictConfig):
    """How the work is laid over `expert` x `data` ranks; the results do not depend on it.

    expert: the experts of a layer are dealt out over so many consecutive ranks.
    data: copies of every expert. Dense parameters are on all ranks.
    sharding: optimizer state is spread over the ranks that hold the same parameter.
    recompute: layers are run again in the backward pass instead of kept; or parts of them.
    """

    expert: PositiveInt = 1
    data: PositiveInt = 1
    sharding: bool = False
    recompute: Recompute = False

    @model_validator(mode="after")
    def _useful(self) -> ParallelConfig:
        if self.sharding and self.ranks == 1:
            raise ValueError("sharding has no effect on one rank")
        return self

    @property
    def ranks(self) -> int:
        return self.expert * self.data


class EvaluationConfig(StrictConfig):
    """Held-out problems that are solved after the last stage; `path` may be a directory."""

    path: str
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 256
    max_examples: PositiveInt | None = None  # of each task; None: all
    untrained_examples: Annotated[int, Field(ge=0)] = 0  # of each task, for the untrained model
    after_each_stage: bool = False  # solves them after every stage; gates need it


class ExportConfig(StrictConfig):
    """What is written to `export/` after the last stage."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_shard_size: int | str = "5GB"


class Recipe(StrictConfig):
    """A model, the stages it goes through, how it is tested and what is exported."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: ModelSource
    tokenizer: TokenizerSource
    device: Literal["auto", "cpu", "gpu"] = "auto"
    parallel: ParallelConfig = ParallelConfig()
    sandbox: SandboxPolicy = "strict"  # "rlimits_only" runs programs with less protection
    stages: Annotated[list[AnyStageConfig], Field(min_length=1)]
    evaluation: EvaluationConfig | None = None
    export: ExportConfig | None = None

    @model_validator(mode="after")
    def _distinct_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {', '.join(doubled)}; names must differ")
        return self

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            if stage.gate is None:
                continue
            if self.evaluation is None or not self.evaluation.after_each_stage:
                raise ValueError(
                    f"stages.{index}.gate: {stage.gate.metric} is never measured; "
                    "set evaluation.after_each_stage: true"
                )
            if index == 0 and stage.gate.max_regression is not None:
                raise ValueError("stages.0.gate.max_regression: no stage comes before the first")
        return self

    @model_validator(mode="after")
    def _micro_batches_are_dealt_out(self) -> Recipe:
        ranks = self.parallel.ranks
        wrong = [
            f"stages.{index}.grad_accum_steps={stage.grad_accum_steps} must be a multiple of the "
            f"{ranks} ranks of parallel.expert x parallel.data: a step's micro-batches are dealt "
            "out over them"
            for index, stage in enumerate(self.stages)
            if isinstance(stage, SupervisedConfig) and stage.grad_accum_steps % ranks
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def thinking(self) -> bool:
        """Whether the model ends up in the Thinking chat format: as its last SFT stage has it."""
        formats = [stage.thinking for stage in self.stages if isinstance(stage, SftConfig)]
        return formats[-1] if formats else True

    def stage_seed(self, index: int) -> int:
        """The seed of a stage: another for each, so that no two shuffle alike."""
        return self.seed + 1000 * (index + 1)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe. Raises `ConfigError` that lists every mistake with its path."""
    data: dict[str, Any] = load_yaml(Path(path))
    return parse_config(Recipe, apply_overrides(data, overrides or []), str(path))
