"""The verb `init`: write a recipe for a model and a file of rows, sized by what `plan` says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import paddle
from rich.console import Console

from ernie_train import __version__
from ernie_train.core import devices
from ernie_train.core.config import dump_yaml, parse_config
from ernie_train.core.environment import memory_bytes
from ernie_train.core.errors import DataError, UserError
from ernie_train.core.foreign_files import read_json
from ernie_train.core.terminal import printable
from ernie_train.data import (
    Columns,
    ReadReport,
    SourceReport,
    Tokenizer,
    encode_records,
    iter_records,
    load_tokenizer,
    require_chat_template,
)
from ernie_train.data.conversation import ANOTHER_TEMPLATE
from ernie_train.data.reader import grouped
from ernie_train.io.files import write_text
from ernie_train.io.shipped import shared_path
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.plan.command import PlanSettings, plan_request
from ernie_train.plan.layout import GB, Layout
from ernie_train.plan.search import candidates
from ernie_train.rl.preference_data import read_pairs
from ernie_train.run.check import check_fit
from ernie_train.run.foreign_keys import minor_version
from ernie_train.run.recipe import Recipe, schema_text
from ernie_train.weights.hf import load_config
from ernie_train.weights.model_directory import find_model

Method = Literal["auto", "lora", "full"]
METHODS: dict[str, Method] = {"auto": "auto", "lora": "lora", "full": "full"}
SCHEMA = "recipe.schema.json"  # written beside the recipe
ROWS_READ = 2000  # of the data, for their format and lengths
STEP_TOKENS = 8192  # of an optimizer step, where there are enough rows
LEAST_STEPS = 20  # of an epoch of few rows
LONGEST_ROW = 8192  # tokens; longer rows are left out
MEMORY_SHARE = 0.8  # of the machine's; other programs need some of it
_UNIT = 64  # lengths are multiples of it
BAD_ROWS = 0.01
SHOWN_REASONS = 10
TOOL_TEMPLATE = "recipes/chatml_tools.jinja"
# Highest learning rate by kind of stage, of LoRA and of the whole model.
_RATES = {"sft": (2e-4, 2e-5), "pretrain": (2e-4, 5e-5), "dpo": (2e-5, 1e-6)}


@dataclass(frozen=True)
class Rows:
    """Hold what rows of the data were found to be.

    longest: tokens of the longest one. tokens: of all rows of the data, by those that were read.
    """

    kind: str  # of the stage that trains on them
    format: str
    count: int
    longest: int
    tokens: int
    whole: bool  # all rows were read


@dataclass(frozen=True)
class InitCommand:
    """Arguments of the verb `init`; None where a setting is to be found out."""

    model: Path
    data: str
    out: Path
    columns: Columns | None = None
    template: str | None = None
    method: Method = "auto"
    seq_len: int | None = None
    epochs: int = 1
    memory_gb: float | None = None
    max_bad_fraction: float = BAD_ROWS

    def run(self, console: Console) -> None:
        """Write the recipe and its schema, and print what was found and what to do next.

        Raises `UserError` for a file that is there, a model or rows that no recipe trains on.
        """
        self._check_output()
        rows = self._rows()
        values, about = self._sized(rows)
        check_fit(self._parsed(values), self._config, self._tokenizer)
        head = [f"yaml-language-server: $schema={SCHEMA}", *about]
        text = "".join(f"# {printable(line)}\n" for line in head)
        write_text(self.out.parent / SCHEMA, schema_text())
        write_text(self.out, text + dump_yaml(values))
        console.print("\n".join(about), highlight=False, soft_wrap=True)
        console.print(
            f"wrote {self.out}\ncheck it: ernie-train check {self.out}\n"
            f"train:    ernie-train run {self.out}",
            highlight=False,
            soft_wrap=True,  # commands stay whole, to be copied
        )

    def _check_output(self) -> None:
        if self.out.exists():
            raise UserError(f"{self.out} exists, and init overwrites nothing: give another --out")
        if self.out.suffix not in (".yaml", ".yml"):
            raise UserError(f"{self.out}: a recipe is a .yaml file")
        if not self.out.parent.is_dir():
            raise UserError(f"{self.out}: there is no directory {self.out.parent}")
        if not os.access(self.out.parent, os.W_OK):
            raise UserError(f"{self.out}: no permission to write")
        schema = self.out.parent / SCHEMA
        if schema.exists() and not _is_schema(schema):
            raise UserError(f"{schema} exists and is no schema of a recipe: move it away")

    # ---- what is there ---------------------------------------------------------------------------

    @cached_property
    def _config(self) -> Ernie4_5_MoeConfig:
        return load_config(find_model(self.model).weights)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(find_model(self.model).tokenizer, template=self.template)

    def _rows(self) -> Rows:
        read = ReadReport(self.data)
        found = iter_records(self.data, "auto", read, self.columns)
        records = list(islice(found, ROWS_READ))
        whole = next(found, None) is None
        read.check(self.max_bad_fraction, "mend them, or let more be left out: --max-bad-fraction")
        if not records:
            raise DataError(f"{self.data}: every row is left out; `preview` says why")
        kinds = {record.kind for record in records}
        kind = {"text": "pretrain", "chat": "sft", "preference": "dpo"}.get("+".join(kinds))
        if kind is None:
            raise DataError(
                f"{self.data}: rows of {' and '.join(sorted(kinds))} are none that init writes a "
                "recipe for; it does for conversations or answers (sft), texts (pretrain) and "
                "pairs (dpo). Prompts with a verifier are for RL: docs/upo.md"
            )
        if kind != "pretrain":
            require_chat_template(self._tokenizer)
        limit = min(self._config.max_position_embeddings, self.seq_len or LONGEST_ROW)
        if kind == "dpo":
            pairs, _ = read_pairs(self.data, self._tokenizer, self.max_bad_fraction, self.columns)
            lengths = [
                len(one.prompt_ids) + len(one.completion_ids)
                for pair in pairs for one in pair.completions
            ]  # fmt: skip
            kept = [length for length in lengths if length <= limit]
            whole, count, tokens = True, len(pairs), sum(lengths)
        else:
            as_kind: Any = kind
            _, report = encode_records(records, read, self._tokenizer, kind=as_kind, seq_len=limit)
            source = report.sources[0]
            kept = [int(length) for length in source.lengths if length <= limit]
            count, tokens = source.kept, source.tokens
            if not count and (len(kept) or not len(source.lengths)):
                raise self._nothing_left(source)
        if not kept and kind != "pretrain":
            raise DataError(f"{self.data}: no row has at most {limit} tokens")
        if not whole:
            share = max(1, read.bytes_total) / max(1, read.bytes_read)
            count, tokens = round(count * share), round(tokens * share)
        return Rows(kind, read.format, count, max(kept, default=limit), tokens, whole)

    def _nothing_left(self, source: SourceReport) -> DataError:
        """Return the error that says why every row is left out."""
        lines = grouped(source.bad + source.left_out, source.dropped)
        if len(lines) > SHOWN_REASONS:
            lines[SHOWN_REASONS:] = [f"and {len(lines) - SHOWN_REASONS} other reasons"]
        if any(ANOTHER_TEMPLATE in row.reason for row in source.bad):
            shown_by = shared_path(TOOL_TEMPLATE)
            lines.append(f"another template shows them: --template {shown_by}, or your own")
        return DataError(f"{self.data}: every row is left out:\n  " + "\n  ".join(lines))

    # ---- the recipe ------------------------------------------------------------------------------

    def _sized(self, rows: Rows) -> tuple[dict[str, Any], list[str]]:
        """Return the settings of the first of full and LoRA that fits the memory, and why."""
        have = self.memory_gb * GB if self.memory_gb else _machine_bytes()
        tried = []
        for lora, recompute in self._choices():
            values = self._values(rows, lora=lora, recompute=recompute)
            recipe = self._parsed(values)
            request, _ = plan_request(recipe, PlanSettings())
            plain = Layout(1, 1, sharding=False, recompute=recipe.parallel.recompute)
            found = candidates(request, 1)
            need = next(one for one in found if one.layout == plain).peak
            name = ("LoRA" if lora else "the whole model") + (", recomputed" if recompute else "")
            tried.append(f"{name} {need / GB:.1f} GB")
            if need <= have * MEMORY_SHARE:
                break
        enough = need <= have * MEMORY_SHARE
        about = [
            f"{self.data}: {'' if rows.whole else 'about '}{rows.count} rows ({rows.format}), "
            f"{rows.tokens} tokens; the longest that fits has {rows.longest}",
            f"kind: {rows.kind}, trained in rows of {values['stages'][0]['seq_len']} tokens",
            f"memory by `plan`: {'; '.join(tried)}; this machine has {have / GB:.1f} GB",
        ]
        if rows.kind != "pretrain":
            template = self._tokenizer.chat.template
            about.insert(1, f"chat template: {template and template.origin}")
        if not enough:
            about.append("warning: none fits: a smaller seq_len, or another machine")
        return values, about

    def _choices(self) -> Iterator[tuple[bool, bool]]:
        if self.method != "lora":
            yield False, False
        if self.method != "full":
            yield True, False
        yield self.method != "full", True

    def _parsed(self, values: dict[str, Any]) -> Recipe:
        return parse_config(Recipe, values, str(self.out))

    def _values(self, rows: Rows, *, lora: bool, recompute: bool) -> dict[str, Any]:
        seq_len = self.seq_len or self._length(rows)
        lora_rate, full_rate = _RATES[rows.kind]
        accumulate = max(1, STEP_TOKENS // seq_len)
        accumulate = max(1, min(accumulate, rows.tokens // (LEAST_STEPS * seq_len)))
        steps = max(1, rows.tokens * self.epochs // (accumulate * seq_len))
        optim = {"lr": lora_rate if lora else full_rate, "warmup_steps": min(20, steps // 10)}
        mapped = {"columns": _plain(self.columns)} if self.columns else {}
        stage: dict[str, Any] = {"name": rows.kind, "kind": rows.kind}
        if rows.kind == "dpo":
            per_step = max(1, min(16, rows.count // LEAST_STEPS))
            duration = max(1, rows.count * self.epochs // per_step)
            optim["warmup_steps"] = min(20, duration // 10)
            stage |= {"data": self.data, **mapped, "pairs_per_step": per_step}
            stage |= {"seq_len": seq_len, "micro_batch_size": 2, "steps": duration}
        else:
            stage |= {"data": [{"path": self.data, **mapped}], "seq_len": seq_len}
            stage |= {"micro_batch_size": 1, "grad_accum_steps": accumulate, "epochs": self.epochs}
        if self.max_bad_fraction != BAD_ROWS:
            stage["max_bad_fraction"] = self.max_bad_fraction
        stage |= {"lora": {"rank": 16}} if lora else {}
        stage |= {"optim": optim}
        return {
            "version": "{}.{}".format(*minor_version(__version__)),
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", self.out.stem).lstrip("._-")[:100] or "run",
            "model": {"path": str(self.model)},
            "tokenizer": {"path": str(self.model)},
            **({"chat": {"template": self.template}} if self.template else {}),
            **({"parallel": {"recompute": True}} if recompute else {}),
            "stages": [stage],
            "export": {"dtype": "bfloat16"},
        }

    def _length(self, rows: Rows) -> int:
        most = min(self._config.max_position_embeddings, LONGEST_ROW)
        wanted = 2048 if rows.kind == "pretrain" else -(-rows.longest // _UNIT) * _UNIT
        return min(most, wanted)


def _plain(columns: Columns) -> dict[str, Any]:
    return {k: v if isinstance(v, str) else v.model_dump() for k, v in columns.items()}


def _is_schema(path: Path) -> bool:
    try:
        return bool(read_json(path).get("title") == "Recipe")
    except (OSError, ValueError, AttributeError):
        return False


def _machine_bytes() -> float:
    """Return the memory of the GPU that training would use, else that of the machine."""
    if devices.select_device("auto") == "gpu":
        return float(paddle.device.cuda.get_device_properties().total_memory)
    return float(memory_bytes()["total"])


Ask = Callable[[str, str], str]


def answers(
    model: Path | None, data: str | None, out: Path | None, ask: Ask | None
) -> tuple[Path, str, Path]:
    """Return model, data and output, asked for where they are not given.

    Raises `UserError` without a terminal to ask in.
    """
    if ask is None and (model is None or data is None):
        missing = " and ".join(
            name for name, given in (("--model", model), ("--data", data)) if given is None
        )
        raise UserError(f"{missing} must be given: there is no terminal to ask in")
    if ask is None:
        return Path(str(model)), str(data), out or Path("recipe.yaml")
    return (
        model or Path(ask("model directory", "")).expanduser(),
        data or os.path.expanduser(ask("data: a file of rows, a directory or a pattern", "")),
        out or Path(ask("recipe to write", "recipe.yaml")).expanduser(),
    )
