"""Mistakes with a model and data of one's own: the message, and after how long it comes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.protocol import ROOT

RECIPE = "recipes/own_model.yaml"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def stumbles(source: Path, model: Path, out: Path) -> list[dict[str, Any]]:
    """Make every mistake; return what it was, the verb, its seconds and its message.

    `model` was imported from `source`, of which half is tried if it is a GGUF file.
    Raises `RuntimeError` if one does not end with exit status 2 and a message.
    """
    directory = out / "stumbles"
    directory.mkdir(exist_ok=True)
    rows = out / "rows" / "questions.train.jsonl"
    if not rows.exists():
        rows = next((out / "rows").glob("*.train.jsonl"))
    found = []
    for mistake, arguments in _mistakes(source, model, rows, directory).items():
        started = time.perf_counter()
        command = [sys.executable, "-m", "ernie_train", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds, message = time.perf_counter() - started, " ".join(done.stderr.split())
        if done.returncode != 2 or not message:
            raise RuntimeError(f"{mistake}: status {done.returncode}, {message or 'no message'}")
        for path, name in (
            (f"{directory}/", ""), (model, "my-model"), (rows, "my-data.jsonl"), (f"{ROOT}/", ""),
        ):  # fmt: skip
            message = message.replace(str(path), name)
        found.append({"mistake": mistake, "verb": arguments[0], "seconds": seconds,
                      "message": message})  # fmt: skip
    return found


def _mistakes(source: Path, model: Path, rows: Path, directory: Path) -> dict[str, list[str]]:
    """Return the arguments of each mistake; files that it takes are made in `directory`."""
    own = [f"model.path={model}", f"tokenizer.path={model}"]
    data = f"stages.sft.data.0.path={rows}"
    calls, unknown, half = (directory / name for name in ("calls.jsonl", "x.jsonl", "half.gguf"))
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "tide", "arguments": {}}}
    turns = [{"role": "user", "content": "When is low tide?"},
             {"role": "assistant", "tool_calls": [call]}]  # fmt: skip
    calls.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n", "utf-8")
    unknown.write_text('{"frage": "Wann?", "antwort": "Um sechs."}\n', "utf-8")
    if source.is_file():
        with source.open("rb") as whole:
            half.write_bytes(whole.read(source.stat().st_size // 2))
    pickled = directory / "pickled"
    pickled.mkdir(exist_ok=True)
    (pickled / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    check = ["check", RECIPE]
    found = {
        "the name of a hub for a directory": [*check, f"model.path={HUB_NAME}", own[1], data],
        "a key of another kit": [*check, *own, data, "stages.sft.learning_rate=1e-4"],
        "a LoRA target that is not there": [
            *check, *own, data, "stages.sft.lora.targets=[qkv_proj]",
        ],
        "nothing left to train": [*check, *own, data, 'stages.sft.freeze=["*"]'],
        "a file that is not there": [*check, *own, "stages.sft.data.0.path=nowhere.jsonl"],
        "columns of one's own, not named": [*check, *own, f"stages.sft.data.0.path={unknown}"],
        "tools, in a template without a place for them": [
            *check, *own, f"stages.sft.data.0.path={calls}",
        ],
        "weights that are a pickle": ["import", str(pickled), str(directory / "model")],
        "an export on top of the model": ["export", str(model), str(model)],
    }  # fmt: skip
    if half.exists():
        found["half a GGUF file"] = ["import", str(half), str(directory / "model")]
    return found
