"""The model and the tokenizer that a recipe starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from ernie_train.core.config import PathText, StrictConfig
from ernie_train.core.errors import ConfigError
from ernie_train.io.run_dir import is_run
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.configuration import ALIASES
from ernie_train.weights.hf import load_config
from ernie_train.weights.model_directory import find_model


class ModelSource(StrictConfig):
    """The model to start from: random weights of a preset, or the weights at `path`."""

    model_config = ConfigDict(extra="allow")  # the overrides; the model's config checks them

    preset: str | None = None
    """`tiny`, `mini`, `0.3b`, `21b-a3b`: random weights of these sizes. Keys of Hugging Face's
    `config.json` may stand beside it (`moe_k: 2`). Beside `path` it says which sizes must lie
    there; `check` and `plan` use it while nothing does.
    """
    path: PathText | None = None
    """A Hugging Face directory, a checkpoint, a run directory, or the directory of a stage."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON Schema with the overrides, of which an unknown one is a mistake."""
        found = handler(schema)
        section = handler.resolve_ref_schema(found)
        config = Ernie4_5_MoeConfig.model_json_schema()["properties"]
        section["properties"] |= {
            **config,
            **{key: {} for key in (*ALIASES, "rope_parameters", "rope_scaling")},
        }
        section["additionalProperties"] = False
        return found

    @model_validator(mode="after")
    def _check_source(self) -> ModelSource:
        if self.preset is None and self.path is None:
            raise ValueError("preset or path must be given")
        if "lora" in (self.model_extra or {}):
            raise ValueError("lora belongs to a stage, which it trains: stages[].lora")
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
        """Return True if `path` does not exist and `preset` is there in its place."""
        return self.preset is not None and self.path is not None and not Path(self.path).exists()

    def build(self) -> Ernie4_5_MoeConfig:
        """Return the model's configuration.

        Raises `ConfigError` for an unknown preset, impossible sizes, and sizes at `path` that
        differ from the preset's.
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

    def missing_model_message(self) -> str:
        """Say that the preset is used in place of the missing model."""
        return (
            f"model: nothing at {self.path}; sizes are those of preset {self.preset}. A run needs "
            "the weights: model.path=..."
        )

    def _of_preset(self) -> Ernie4_5_MoeConfig:
        return Ernie4_5_MoeConfig.preset(str(self.preset), **(self.model_extra or {}))


class TokenizerSource(StrictConfig):
    """A directory with a tokenizer.json, a SentencePiece model, or what PaddleNLP can read."""

    path: PathText
    """A directory with `tokenizer.json` of any class, with `tokenizer.model`, or with files that
    PaddleNLP's AutoTokenizer reads.
    """
    add: list[Annotated[str, Field(min_length=1)]] = []
    """Tokens to add to a `tokenizer.json`, one id each; embedding and head grow by rows that start
    as the mean of the others.
    """
    stand_in: PathText | None = None
    """A tokenizer that `check` and `plan` use while `path` does not exist. A run never does: a
    wrong vocabulary would train without an error.
    """

    def is_absent(self, base_dir: Path) -> bool:
        """Return True if `path` does not exist and `stand_in` names a fallback."""
        return self.stand_in is not None and not (base_dir / self.path).exists()


def tokenizer_directory(path: Path) -> Path:
    """Return the directory of the tokenizer of a run, a stage or a checkpoint, else `path`."""
    if is_run(path):
        return path / "tokenizer"
    for mark, inner in (("stage.json", ".."), ("state.json", "../../..")):
        if (path / mark).is_file():
            return path / inner / "tokenizer"
    return path
