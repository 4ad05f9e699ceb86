"""A small project on disk for tests of whole runs: data, tokenizer, recipe."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ernie_train.data import DocumentBuilder, Documents, EncodedDocument

REPOSITORY = Path(__file__).resolve().parent.parent


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sums of two digits with a worked step; enough to train on, too easy to be interesting."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        a, b = rng.randrange(10), rng.randrange(10)
        answer = f"<think>\n{a} + {b}\n</think>\n\n<response>\n{a + b}\n</response>"
        made.append(
            {
                "domain": "math",
                "task": "sum",
                "reward": "exact",
                "answer": str(a + b),
                "messages": [
                    {"role": "user", "content": f"What is {a} + {b}?"},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def make_workspace(root: Path) -> Path:
    """Writes data, tokenizer and `recipe.yaml` below `root`; returns the recipe's path."""
    from ernie_train.data import render_chat, shipped_template, train_tokenizer

    for name, count, seed in (("train", 120, 1), ("validation", 12, 2), ("test", 20, 3)):
        write_rows(root / f"{name}.jsonl", rows(count, seed))
    template = shipped_template("ernie_thinking")
    texts = [render_chat(template, row["messages"]) for row in rows(120, 1)]
    train_tokenizer(texts, 330, root / "tokenizer")
    return write_recipe(root)


def save_model(root: Path) -> Path:
    """Write the model of the recipe below `root`, untrained, with its tokenizer; return where."""
    from ernie_train.data import load_tokenizer
    from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
    from ernie_train.weights import save_pretrained
    from tests.small_models import fill

    settings = yaml.safe_load((root / "recipe.yaml").read_text())["model"]
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig.preset(settings.pop("preset"), **settings))
    fill(model)
    save_pretrained(model, root / "model", load_tokenizer(root / "tokenizer"))
    return root / "model"


def write_recipe(root: Path, **changes: Any) -> Path:
    """The recipe of `make_workspace`, with top-level keys replaced."""
    recipe: dict[str, Any] = {
        "name": "test",
        "seed": 5,
        "model": {
            "preset": "tiny", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "head_dim": 8, "moe_intermediate_size": 16,
            "max_position_embeddings": 256,
        },
        "tokenizer": {"path": str(root / "tokenizer")},
        "stages": [
            {
                "name": "sft",
                "kind": "sft",
                "data": [{"path": str(root / "train.jsonl")}],
                "validation": [{"path": str(root / "validation.jsonl")}],
                "seq_len": 128,
                "micro_batch_size": 2,
                "grad_accum_steps": 2,
                "steps": 12,
                "optim": {"lr": 3e-3, "warmup_steps": 2},
                "validate_every_steps": 4,
                "checkpoint": {"every_steps": 4, "best_metric": "validation_loss",
                               "best_is": "lower"},
            }
        ],
        "evaluation": {"path": str(root / "test.jsonl"), "max_new_tokens": 24,
                       "untrained_examples": 5},
        "export": {"dtype": "float32"},
    }  # fmt: skip
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    """The command line that runs `ernie-train` with `arguments`."""
    return [sys.executable, "-m", "ernie_train", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts `ernie-train` in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("ERNIE_TRAIN_REFEREE", None)  # exports are proven by transformers elsewhere
    return subprocess.Popen(
        command(*arguments),
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics_without_time(run_dir: Path, stage: str = "01-sft") -> list[dict[str, Any]]:
    lines = (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for line in found:
        line.pop("time")
    return found


def final_files(run_dir: Path, stage: str = "01-sft") -> dict[str, bytes]:
    """Every file of the last checkpoint but its manifest, and of the export's weights."""
    checkpoint = sorted((run_dir / stage / "checkpoints").glob("step_*"))[-1]
    names = [p for p in checkpoint.iterdir() if p.name != "MANIFEST.json"]
    names += list((run_dir / "export").glob("*.safetensors"))
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in names}


def as_documents(documents: Sequence[EncodedDocument]) -> Documents:
    """Put documents together as those of one source."""
    builder = DocumentBuilder()
    for document in documents:
        builder.add(document.ids.tolist(), document.trainable.tolist(), document.source)
    return builder.build()
