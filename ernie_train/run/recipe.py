"""The recipe: a strict schema, read from YAML, with overrides from the command line."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import (
    NonNegative,
    PathText,
    PositiveInt,
    StrictConfig,
    apply_overrides,
    describe_keys,
    load_yaml,
    parse_config,
)
from ernie_train.core.cpu import __version__
from ernie_train.core.errors import CheckpointError, ConfigError, DataError, hub_hint
from ernie_train.data import SHIPPED_TEMPLATES, MappedRows, Tokenizer, load_tokenizer
from ernie_train.environments import EnvironmentConfig
from ernie_train.eval.prompts import FewShot, load_few_shot
from ernie_train.io.loggers import LoggerChoice, LoggerSettings
from ernie_train.io.run_dir import RECIPE, is_run, recorded_version
from ernie_train.io.shipped import read_recipe
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute
from ernie_train.run.foreign_keys import (
    FOREIGN_KEYS,
    FOREIGN_KINDS,
    as_written_today,
    later_version,
    version_advice,
)
from ernie_train.run.quantize import QuantizeConfig, stage_with_rows
from ernie_train.run.sources import ModelSource, TokenizerSource, tokenizer_directory
from ernie_train.run.stages import AnyStageConfig, RewardModelConfig
from ernie_train.train.supervised_data import SupervisedConfig


class ChatConfig(StrictConfig):
    """The format of conversations, in every stage, evaluation and export."""

    template: PathText | None = None
    """Another template than the tokenizer's own: `ernie_thinking`, `ernie_plain`, or a Jinja file.
    """
    history_reasoning: Literal["template", "keep", "drop"] = "template"
    """Reasoning of earlier turns: `template` shows what the chat template does, `keep` all of it,
    `drop` none.
    """
    control_tokens: Literal["text", "refuse"] = "text"
    """Text in the data that looks like a control token: `text` encodes it as plain characters,
    `refuse` counts its row as bad.
    """
    date: datetime.date | None = None
    """The day that a template which calls `strftime_now` writes, `"2026-01-05"`; the day of the
    run's first start, unless given.
    """


class ParallelConfig(StrictConfig):
    """Layout over `expert` x `data` ranks; results do not depend on it."""

    expert: PositiveInt = 1
    """Consecutive ranks over which the experts of a layer are split."""
    data: PositiveInt = 1
    """Copies of every expert; there are `expert` x `data` ranks, and all hold the dense parameters.
    Where a recipe gives no layout, `run` chooses on a CPU, see launch.md.
    """
    sharding: bool = False
    """Splits optimizer state over the ranks that hold the same parameter (ZeRO-1)."""
    recompute: Recompute = False
    """`true`, or a section: runs layers again in the backward pass instead of keeping activations.
    """

    @model_validator(mode="after")
    def _check_sharding(self) -> ParallelConfig:
        if self.sharding and self.ranks == 1:
            raise ValueError("sharding has no effect on one rank")
        return self

    @property
    def ranks(self) -> int:
        return self.expert * self.data


class EvaluationConfig(MappedRows):
    """Held-out problems to solve after the last stage; `path` holds rows."""

    path: PathText
    """A path of problems, as docs/data.md lists them."""
    max_new_tokens: PositiveInt | None = None
    """Longest completion, in tokens; 1024, or what the model's context leaves, unless given."""
    batch_size: PositiveInt = 256
    """Sequences that are completed at once."""
    max_examples: PositiveInt | None = None
    """Problems of each task; all unless given."""
    untrained_examples: Annotated[int, Field(ge=0)] = 0
    """Problems of each task that the untrained model solves too, for comparison."""
    after_each_stage: bool = False
    """Solves them after every stage, which gates need."""
    environment: EnvironmentConfig | None = None
    """Tools that may be called over several turns, with the keys of a stage's (docs/tools.md)."""
    samples: PositiveInt = 1
    """Completions of each problem, for pass@k and majority votes (docs/evaluation.md)."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 is greedy."""
    k: list[PositiveInt] = []
    """Sizes for which pass@k is estimated; 1 and `samples`, unless given."""
    few_shot: PathText | None = None
    """A file of worked examples, some of which stand before each problem (docs/evaluation.md)."""
    shots: PositiveInt | None = None
    """Examples before each problem; 4, unless given."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature: greedy completions are all equal")
        if wrong := [k for k in self.k if k > self.samples]:
            raise ValueError(f"k={wrong[0]}: pass@k needs 1 to samples={self.samples} completions")
        if self.shots is not None and self.few_shot is None:
            raise ValueError("shots needs few_shot, the file of the examples")
        return self

    def examples(self, base_dir: Path, seed: int) -> FewShot | None:
        """Return the worked examples, if there are any; raises the errors of `load_few_shot`."""
        if self.few_shot is None:
            return None
        return load_few_shot(base_dir / self.few_shot, self.shots or 4, seed, self.columns)


class ExportConfig(StrictConfig):
    """Format of the export that is written after the last stage."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights; routers stay float32."""
    max_shard_size: int | str = "5GB"
    """Largest weights file: a number of bytes, or `5GB`."""
    quantize: QuantizeConfig | None = None
    """Stores the weights of attention, MLPs and experts as integers (docs/serving.md#quantized); on
    one rank.
    """


class Recipe(StrictConfig):
    """A model, its training stages, its evaluation and its export."""

    foreign_keys = FOREIGN_KEYS
    foreign_kinds = FOREIGN_KINDS

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run, and of its directory `runs/NAME`."""
    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    """Version of ernie_train that the recipe was written for, `"0.3"`: an earlier one refuses it, a
    later one says what changed where it cannot take it.
    """
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of random weights, order of data and sampling; each stage derives its own from it."""
    model: ModelSource
    """The model to start from."""
    tokenizer: TokenizerSource
    """The tokenizer of all stages and of the export."""
    chat: ChatConfig = ChatConfig()
    """The format of conversations."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`cpu`, `gpu`, or `auto`: a GPU where there is one. Training is in float32 on a CPU, in
    bfloat16 with float32 masters on a GPU.
    """
    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks."""
    metrics: list[LoggerChoice] = ["visualdl"]
    """What the metrics of a stage are sent to beside its `metrics.jsonl`: `visualdl`,
    `tensorboard`, or a class of your own as `{python: my_logger.py:Logger}`
    (docs/report.md#metrics-in-other-viewers).
    """
    stages: Annotated[list[AnyStageConfig], Field(min_length=1)]
    """The stages in their order, each of a `kind`."""
    evaluation: EvaluationConfig | None = None
    """Held-out problems that the trained model solves."""
    export: ExportConfig | None = None
    """Writes the trained model as a Hugging Face directory."""

    @field_validator("version")
    @classmethod
    def _refuse_later(cls, version: str | None) -> str | None:
        if version is not None and later_version(version):
            raise ValueError(f"{version} is needed, this is ernie_train {__version__}: update it")
        return version

    @field_validator("metrics")
    @classmethod
    def _refuse_doubled(cls, metrics: list[LoggerChoice]) -> list[LoggerChoice]:
        if doubled := next((one for one in metrics if metrics.count(one) > 1), None):
            name = doubled if isinstance(doubled, str) else doubled.python
            raise ValueError(f"{name} is named twice: once is enough")
        return metrics

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {', '.join(doubled)}; names must differ")
        return self

    @model_validator(mode="after")
    def _check_reward_model(self) -> Recipe:
        at = next((i for i, s in enumerate(self.stages) if isinstance(s, RewardModelConfig)), None)
        if at is None:
            return self
        if len(self.stages) > 1:
            raise ValueError(
                f"stages.{at}: a reward model is no policy that other stages could go on from or "
                "hand on: give it a recipe of its own, with model.path where it starts"
            )
        if self.evaluation is not None:
            raise ValueError(
                f"evaluation: the model of stages.{at} scores and solves no problems; validation "
                "of the stage measures it"
            )
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            if stage.gate is None or isinstance(stage, RewardModelConfig):
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
    def _check_export(self) -> Recipe:
        quantize = self.export and self.export.quantize
        if quantize and self.parallel.ranks > 1:
            raise ValueError(
                "export.quantize: one rank quantizes the whole model; leave it out here, and run "
                "ernie-train export RUN OUT --quantize afterwards"
            )
        if quantize and quantize.method == "gptq" and stage_with_rows(self.stages) is None:
            raise ValueError(
                "export.quantize: gptq calibrates on the rows of a pretrain or sft stage, and "
                "there is none; set method: rtn"
            )
        return self

    @model_validator(mode="after")
    def _check_micro_batches(self) -> Recipe:
        ranks = self.parallel.ranks
        wrong = [
            f"stages.{index}.grad_accum_steps={stage.grad_accum_steps} must be a multiple of the "
            f"{ranks} ranks of parallel.expert x parallel.data: a step's micro-batches are split "
            "evenly over them"
            for index, stage in enumerate(self.stages)
            if isinstance(stage, SupervisedConfig) and stage.grad_accum_steps % ranks
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def loggers(self, base_dir: Path) -> LoggerSettings:
        """Return what the metrics of the stages are sent to."""
        return LoggerSettings(self.metrics, base_dir, self.model_dump(mode="json"))

    def load_tokenizer(self, base_dir: Path, *, stand_in: bool = False) -> Tokenizer:
        """Load the tokenizer, or its stand-in, with the recipe's chat format.

        Raises `DataError` for damaged files, and for a format that the tokenizer cannot write.
        """
        path = self.tokenizer.stand_in if stand_in else self.tokenizer.path
        template = self.chat.template
        if template is not None and template not in SHIPPED_TEMPLATES:
            template = str(base_dir / template)
        directory = base_dir / str(path)
        if not directory.exists() and (hint := hub_hint(str(path))):
            raise DataError(f"tokenizer directory {path} does not exist{hint}")
        directory = tokenizer_directory(directory)
        tokenizer = load_tokenizer(directory, template=template, add=self.tokenizer.add)
        shown = tokenizer.chat.template
        tokenizer.chat = replace(
            tokenizer.chat,
            template=shown and replace(shown, date=self.chat.date),
            history_reasoning=self.chat.history_reasoning,
            control_tokens=self.chat.control_tokens,
        )
        return tokenizer

    def dated(self, tokenizer: Tokenizer, run_dir: Path) -> Recipe:
        """Return the recipe with the date of the run, where the chat template asks for one.

        It is the recipe's own, else the one of the run's first start, else today's.
        """
        template = tokenizer.chat.template
        if self.chat.date is not None or template is None or not template.asks_date:
            return self
        recorded = recorded_recipe(run_dir)
        day = (recorded and recorded.chat.date) or datetime.date.today()
        return self.model_copy(update={"chat": self.chat.model_copy(update={"date": day})})

    def vocabulary(self, config: Ernie4_5_MoeConfig, tokenizer: Tokenizer) -> int:
        """Return the size of the model's vocabulary, with the tokens of `tokenizer.add`."""
        return max(config.vocab_size, tokenizer.vocab_size if self.tokenizer.add else 0)

    def stage_seed(self, index: int) -> int:
        """Return the seed of a stage; they differ, so that no two stages shuffle alike."""
        return self.seed + 1000 * (index + 1)

    def stage_directory(self, index: int) -> str:
        """Return the name of a stage's directory in a run directory, such as `01-sft`."""
        return f"{index + 1:02d}-{self.stages[index].name}"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe, by its file or by the name of one that comes with the package.

    Raises `ConfigError` that lists every mistake with its path.
    """
    data = apply_overrides(read_recipe(path), overrides or [])
    try:
        return parse_config(Recipe, data, str(path))
    except ConfigError as error:
        if advice := version_advice(data.get("version")):
            raise ConfigError([advice, *error.problems], error.source) from None
        raise


def recorded_recipe(run_dir: Path) -> Recipe | None:
    """Return the resolved recipe of a run directory, None for any other directory.

    Raises `CheckpointError` that names the version that recorded it, if this one cannot read it.
    """
    path = run_dir / RECIPE
    if not is_run(run_dir):
        return None
    try:
        data = as_written_today(load_yaml(path))
        return parse_config(Recipe, data, str(path), recorded=True)
    except ConfigError as error:
        first, _, rest = error.problems[0].partition("; ")
        more = " (and more)" if rest or len(error.problems) > 1 else ""
        raise CheckpointError(
            f"{path} was recorded by {recorded_version(run_dir)}, and its settings have changed "
            f"since. Use that version, or one of the run's checkpoints, such as "
            f"{run_dir / 'NN-STAGE' / 'checkpoints' / 'step_NNNNNN'}, as the model. "
            f"{first}{more}"
        ) from None


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, by which editors complete and check one.

    It knows keys, types, bounds and defaults; what settings ask of each other `check` alone does.
    """
    describe_keys(Recipe)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **Recipe.model_json_schema()}


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
