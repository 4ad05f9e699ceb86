"""Write a recipe for a model and a file of rows, sized by what `plan` says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from rich.console import Console

from ernie_train import __version__
from ernie_train.cli.init.problems import UNIT
from ernie_train.cli.init.reinforced import GROUP_SIZE, ReinforcedStage
from ernie_train.cli.init.rows import BAD_ROWS, LONGEST_ROW, OwnModel, Rows, RowsRead
from ernie_train.cli.init.split import HeldOutWish, Split, held_out_path, split
from ernie_train.core import devices
from ernie_train.core.config import dump_yaml, parse_config
from ernie_train.core.environment import memory_bytes
from ernie_train.core.errors import UserError
from ernie_train.core.foreign_files import read_json
from ernie_train.core.terminal import printable
from ernie_train.data import Columns, forgeable_turns
from ernie_train.io.files import write_jsonl, write_text
from ernie_train.plan.command import PlanSettings, plan_request
from ernie_train.plan.layout import GB, Layout
from ernie_train.plan.search import candidates
from ernie_train.run.check import check_fit
from ernie_train.run.foreign_keys import minor_version
from ernie_train.run.recipe import Recipe, schema_text

SCHEMA = "recipe.schema.json"  # written beside the recipe
STEP_TOKENS = 8192  # of an optimizer step, where there are enough rows
LEAST_STEPS = 20  # of an epoch of few rows
VALIDATIONS = 5  # of a run, at least
MEMORY_SHARE = 0.8  # of the machine's; other programs need some of it
# Highest learning rate by kind of stage, of LoRA and of the whole model.
_RATES = {"sft": (2e-4, 2e-5), "pretrain": (2e-4, 5e-5), "dpo": (2e-5, 1e-6), "upo": (1e-4, 1e-6)}


@dataclass(frozen=True)
class InitCommand:
    """Hold what a recipe is written of; None where a setting is to be found out."""

    model: OwnModel
    data: str
    rows: Rows
    out: Path
    read: RowsRead
    held_out: HeldOutWish
    method: str
    epochs: int
    memory_gb: float | None

    def run(self, console: Console) -> None:
        """Write the recipe, its schema and held-out rows; print what was found and what to do next.

        Raises `UserError` for a model that no recipe trains.
        """
        seq_len = self.read.seq_len or self._length()
        found = self.rows.problems
        most = found.max_prompt_tokens if found else seq_len
        held = split(self.data, self.rows, self.held_out, self.model, most, self.read.columns)
        values, about = self._sized(self.rows.without(len(held.rows)), seq_len, held)
        check_fit(self._parsed(values), self.model.config, self.model.tokenizer)
        head = [f"yaml-language-server: $schema={SCHEMA}", *about]
        # A line break in the name of the data would end the comment.
        comments = [printable(line).replace("\n", "\\n") for line in head]
        text = "".join(f"# {line}\n" for line in comments)
        if held.rows:
            write_jsonl(held_out_path(self.out), held.rows)
        write_text(self.out.parent / SCHEMA, schema_text())
        write_text(self.out, text + dump_yaml(values))
        console.print("\n".join(about), highlight=False, soft_wrap=True)
        console.print(
            f"wrote {self.out}\ncheck it: ernie-train check {self.out}\n"
            f"train:    ernie-train run {self.out}",
            highlight=False,
            soft_wrap=True,  # commands stay whole, to be copied
        )

    # ---- the recipe ------------------------------------------------------------------------------

    def _sized(self, rows: Rows, seq_len: int, held: Split) -> tuple[dict[str, Any], list[str]]:
        """Return the settings of the first of full and LoRA that fits the memory, and why.

        rows: those that are trained.
        """
        have = self.memory_gb * GB if self.memory_gb else _machine_bytes()
        tried = []
        for lora, recompute in self._choices():
            values = self._values(rows, seq_len, held, lora=lora, recompute=recompute)
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
        return values, self._about(seq_len, held, "; ".join(tried), have, enough=enough)

    def _about(
        self, seq_len: int, held: Split, tried: str, have: float, *, enough: bool
    ) -> list[str]:
        """Return lines on what was found; have: bytes of memory."""
        rows = self.rows
        about = [
            f"{self.data}: {'' if rows.whole else 'about '}{rows.count} rows ({rows.format}), "
            f"{rows.tokens} tokens{' of prompts' if rows.problems else ''}; the longest that fits "
            f"has {rows.longest}",
            f"kind: {rows.kind}, " + self._about_lengths(seq_len),
            f"held out: {held.about}",
            f"memory by `plan`: {tried}; this machine has {have / GB:.1f} GB",
        ]
        if held.rows:
            about[2] += f", in {held_out_path(self.out)}; rows that ask the same are not trained"
        about += rows.remarks
        if rows.kind != "pretrain":
            template = self.model.tokenizer.chat.template
            about.insert(1, f"chat template: {template and template.origin}")
            about += [line] if (line := forgeable_turns(self.model.tokenizer)) else []
        if not enough:
            about.append("warning: none fits: a smaller seq_len, or another machine")
        return about

    def _about_lengths(self, seq_len: int) -> str:
        found = self.rows.problems
        if found is None:
            return f"trained in rows of {seq_len} tokens"
        return (
            f"{GROUP_SIZE} completions of a prompt against each other (GRPO), reward: "
            f"{found.verifier}; at most {found.max_prompt_tokens} tokens of a prompt and "
            f"{found.max_new_tokens} of a completion"
        )

    def _choices(self) -> Iterator[tuple[bool, bool]]:
        if self.method != "lora":
            yield False, False
        if self.method != "full":
            yield True, False
        yield self.method != "full", True

    def _parsed(self, values: dict[str, Any]) -> Recipe:
        return parse_config(Recipe, values, str(self.out))

    def _values(
        self, rows: Rows, seq_len: int, held: Split, *, lora: bool, recompute: bool
    ) -> dict[str, Any]:
        model = str(self.model.path)
        template = self.model.template
        reinforced = self._reinforced(rows, held)
        return {
            "version": "{}.{}".format(*minor_version(__version__)),
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", self.out.stem).lstrip("._-")[:100] or "run",
            "model": {"path": model},
            "tokenizer": {"path": model},
            **({"chat": {"template": template}} if template else {}),
            **({"parallel": {"recompute": True}} if recompute else {}),
            "stages": [self._stage(rows, seq_len, held, lora=lora)],
            **(reinforced.evaluation() if reinforced else {}),
            "export": {"dtype": "bfloat16"},
        }

    def _stage(self, rows: Rows, seq_len: int, held: Split, *, lora: bool) -> dict[str, Any]:
        columns = self.read.columns
        mapped = {"columns": _plain(columns)} if columns else {}
        apart = str(held_out_path(self.out))
        without = {"without": apart} if held.rows else {}
        stage: dict[str, Any] = {"name": rows.kind, "kind": rows.kind}
        if reinforced := self._reinforced(rows, held):
            steps = reinforced.iterations
            stage |= {"name": "rl", "data": [{"path": self.data, **mapped, **without}]}
            stage |= reinforced.settings()
        elif rows.kind == "dpo":
            per_step = max(1, min(16, rows.count // LEAST_STEPS))
            steps = max(1, rows.count * self.epochs // per_step)
            stage |= {"data": self.data, **mapped, **without}
            stage |= {"validation": apart} if held.rows else {}
            stage |= {"pairs_per_step": per_step, "seq_len": seq_len, "micro_batch_size": 2}
            stage |= {"steps": steps}
        else:
            accumulate = max(1, STEP_TOKENS // seq_len)
            accumulate = max(1, min(accumulate, rows.tokens // (LEAST_STEPS * seq_len)))
            steps = max(1, rows.tokens * self.epochs // (accumulate * seq_len))
            stage |= {"data": [{"path": self.data, **mapped, **without}]}
            stage |= {"validation": [{"path": apart, **mapped}]} if held.rows else {}
            stage |= {"seq_len": seq_len, "micro_batch_size": 1}
            stage |= {"grad_accum_steps": accumulate, "epochs": self.epochs}
        if held.rows and not reinforced:
            stage["validate_every_steps"] = max(1, steps // VALIDATIONS)
        if self.read.max_bad_fraction != BAD_ROWS:
            stage["max_bad_fraction"] = self.read.max_bad_fraction
        stage |= {"lora": {"rank": 16}} if lora else {}
        lora_rate, full_rate = _RATES[rows.kind]
        warmup = min(20, steps // 10)
        stage["optim"] = {"lr": lora_rate if lora else full_rate, "warmup_steps": warmup}
        if reinforced:
            stage["optim"] |= {"schedule": "constant", "weight_decay": 0.0}
        return stage

    def _reinforced(self, rows: Rows, held: Split) -> ReinforcedStage | None:
        if rows.problems is None:
            return None
        return ReinforcedStage(
            rows.problems,
            rows.count,
            self.epochs,
            str(held_out_path(self.out)),
            len(held.rows),
            _plain(self.read.columns or {}),
        )

    def _length(self) -> int:
        if self.rows.problems is not None:
            return self.rows.problems.seq_len
        rows, most = self.rows, min(self.model.config.max_position_embeddings, LONGEST_ROW)
        wanted = 2048 if rows.kind == "pretrain" else -(-rows.longest // UNIT) * UNIT
        return min(most, wanted)


def _plain(columns: Columns) -> dict[str, Any]:
    return {k: v if isinstance(v, str) else v.model_dump() for k, v in columns.items()}


def checked_output(out: Path, *, held_out: bool) -> Path:
    """Return the path of a recipe to write; `held_out`: rows will be written beside it.

    Raises `UserError` if a file is there that it would overwrite, or it cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists, and init overwrites nothing: give another --out")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: a recipe is a .yaml file")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: no permission to write")
    schema, rows = out.parent / SCHEMA, held_out_path(out)
    if schema.exists() and not _is_schema(schema):
        raise UserError(f"{schema} exists and is no schema of a recipe: move it away")
    if held_out and rows.exists():
        raise UserError(
            f"{rows} exists, and init overwrites nothing: move it away, or give another --out"
        )
    return out


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
