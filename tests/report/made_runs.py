"""Run directories as a run leaves them, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ernie_train.io.files import write_json
from ernie_train.io.metrics_log import encode_line
from ernie_train.io.run_dir import StageDone, write_done

# What a page, a terminal or a script must not take for anything else than text.
HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    "</script></style></title>&quot;\"' javascript:window.pwned=1 <!-- {{ 7 * 7 }} {% raw %}"
    "\x1b[2J\x1b]8;;http://x\x07link\x1b]8;;\x07\x1b]52;c;AAAA\x07\u202egnp.exe\u2066\x00\x85"
)
SETTINGS = [
    {"name": "sft", "kind": "sft", "steps": 60, "optim": {"lr": 0.001}},
    {
        "name": "rl", "kind": "upo", "iterations": 12, "optim": {"lr": 0.0003},
        "gate": {"metric": "eval/math", "at_least": 0.5, "max_regression": 0.1},
    },
]  # fmt: skip


def solved(accuracy: float) -> dict[str, Any]:
    task = {
        "domain": "math", "task": "sum", "problems": 20, "accuracy": accuracy, "baseline": 0.1,
        "estimates": {"pass@1": {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}},
    }  # fmt: skip
    domains = {"math": {"accuracy": accuracy, "baseline": 0.1}}
    return {"trained": {"mean_accuracy": accuracy, "domains": domains, "tasks": [task]}}


def metrics(stage: str, step: int, text: str = "") -> dict[str, float]:
    if stage == "sft":
        layers = {f"moe/layer_{n:02d}/load_max": 1 + n / step for n in (1, 2, 3)}
        found = {"loss": 5 / step, "grad_norm": 1.0, "moe/load_max": 9 / step, **layers}
    else:
        found = {
            "reward": step / 12, "accuracy": step / 12, "entropy": 0.1 if step < 9 else 0.001,
            "kl": 0.01 * step, "clip_ratio": 0.01, "completions/truncated": 0.0,
        }  # fmt: skip
    return {**found, **({text: float("nan")} if text else {})}


def sample(step: int, place: int, text: str = "") -> dict[str, Any]:
    turns = [
        {"role": "assistant", "content": "look</think><tool_call>{}</tool_call>" + text},
        {"role": "tool", "name": "lookup" + text, "content": "no such key", "failed": True},
        {"role": "assistant", "content": f"answer {step}"},
    ]
    return {
        "step": step, "task": "sum" + text, "prompt": f"What is {place} + 1?" + text,
        "completion": f"{place}</think>{step}{text}", **({"turns": turns} if place else {}),
        "tokens": 7, "finished": place != 1, "reward": 0.5, "parts": {"row" + text: 0.5},
        "status": "correct" if place else "wrong" + text, "detail": "" + text, "advantage": None,
    }  # fmt: skip


def make_run(path: Path, *, name: str = "made", text: str = "", steps: int = 60) -> Path:
    """Write a complete run with an SFT and an RL stage; `text` is put wherever text is foreign."""
    recipe = {"name": name + text, "stages": SETTINGS, "evaluation": {"path": "data/test" + text}}
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    start = {"unix_s": 1.7e9, "ranks": 1}
    write_json(path / "environment.json", {"ernie_train": "0.2.0" + text, "starts": [start]})
    for at, (stage, last, accuracy) in enumerate((("sft", steps, 0.4), ("rl", 12, 0.8)), start=1):
        directory = path / f"{at:02d}-{stage}"
        directory.mkdir()
        lines = [
            encode_line(step, metrics(stage, step, text), {"seconds": 0.5, "unix_s": 1.7e9 + step})
            for step in range(1, last + 1)
        ]
        (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        source = {"path": "data" + text, "rows": 10, "bad_rows": [f"a:{1}{text}"]}
        write_json(directory / "data_report.json", {"sources": [source]})
        write_json(directory / "evaluation.json", solved(accuracy))
        problems = [
            {"task": "sum", "source": f"t:{n}", "prompt": f"{n}?{text}", "completion": f"{n}{text}",
             "status": "correct", "value": 1.0, "detail": text}
            for n in range(5)
        ]  # fmt: skip
        write_lines(directory / "evaluation_samples.jsonl", problems)
        write_done(directory, StageDone(SETTINGS[at - 1], {}, {"steps": last, "checkpoint": "s"}))
    rows = [sample(step, place, text) for step in range(1, 13) for place in range(3)]
    write_lines(path / "02-rl" / "samples.jsonl", rows)
    write_json(path / "evaluation.json", solved(0.8))
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
