"""Small recipes, what their runs leave, and ways to observe what a setting does."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
import pytest
import yaml

from ernie_train import parallel
from ernie_train.cli.main import main
from ernie_train.cli.run import RunCommand
from ernie_train.core.errors import GateError
from ernie_train.data import (
    DataSource,
    Record,
    load_tokenizer,
    read_records,
)
from ernie_train.data.completion_format import tool_call_block
from ernie_train.environments import EnvironmentConfig, EpisodeStart, open_toolbox, play_episodes
from ernie_train.eval.gates import check_gate
from ernie_train.generate import Completion, SamplingConfig
from ernie_train.generate.engines import EngineConfig, build_engine, served, servers
from ernie_train.model.dtypes import dtype_name, zero_parameter
from ernie_train.model.transformer import DecoderLayer
from ernie_train.rewards.scoring import composition
from ernie_train.rewards.scoring.service import ScoringReport, ScoringService
from ernie_train.rewards.scoring.worker import _graded
from ernie_train.rl.reward import scoring
from ernie_train.run.recipe import Recipe
from ernie_train.run.sources import ModelSource
from ernie_train.train.optimizer import Optimizer
from ernie_train.train.stage import Gate
from tests.generate.engine_stand_in import StandIn
from tests.run.recipe_probes import REMOVED, Changes
from tests.small_models import make_model


def stage_of(base: str) -> dict[str, Any]:
    every = {
        "micro_batch_size": 1,
        "optim": {"lr": 3e-3},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
    }
    if base in ("dpo", "reward"):
        own = {"data": "{root}/pairs.jsonl", "seq_len": 64, "steps": 2, "pairs_per_step": 2}
        return {**every, "name": "d", "kind": base, **own, "micro_batch_size": 4}
    if base == "upo":
        return {
            **every, "name": "u", "kind": "upo", "data": [{"path": "{root}/prompts.jsonl"}],
            "reward": {"python": "{root}/reward.py:score"}, "canaries": 0, "iterations": 1,
            "micro_batch_size": 32, "optim": {"lr": 3e-3, "schedule": "constant"},
            "rollout": {"prompts_per_iteration": 5, "group_size": 4, "max_new_tokens": 6,
                        "max_prompt_tokens": 64},
        }  # fmt: skip
    data = [{"path": "{root}/train.jsonl", "max_examples": 12}]
    return {**every, "name": "s", "kind": "sft", "data": data, "seq_len": 64, "steps": 2}


@cache
def workspace_recipe(root: Path) -> str:
    """The recipe of `make_workspace` as JSON, which is read ten times as fast."""
    return json.dumps(yaml.safe_load((root / "recipe.yaml").read_text()))


def recipe_of(root: Path, base: str, changes: Changes) -> dict[str, Any]:
    recipe = json.loads(workspace_recipe(root))
    recipe |= {"evaluation": None, "export": None, "stages": [stage_of(base)]}
    if base in ("evaluated", "gated"):
        recipe["evaluation"] = {"path": "{root}/test.jsonl", "max_new_tokens": 4,
                                "max_examples": 5, "after_each_stage": base == "gated"}  # fmt: skip
    for path, value in changes.items():
        place: Any = recipe
        *parents, last = path.replace("@", "stages.0.").split(".")
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        if value == REMOVED:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = copy.deepcopy(value)
    found: dict[str, Any] = json.loads(json.dumps(recipe).replace("{root}", str(root)))
    return found


def finished(root: Path, recipe: dict[str, Any], run_dir: Path, verb: str = "run") -> list[str]:
    """Run a recipe in this process; return its exit status and what it said of mistakes."""
    path = root / f"{run_dir.name}.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # which is YAML
    out, err = io.StringIO(), io.StringIO()
    where = ["--run-dir", str(run_dir)] if verb == "run" else []
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        main([verb, str(path), *where])
    warnings = [line for line in out.getvalue().splitlines() if line.startswith("warning")]
    told = err.getvalue().replace(str(run_dir), "RUN").replace(run_dir.name, "RUN")
    return [str(stopped.value.code or 0), " ".join(told.split()), *warnings]


UNLIKE = {"recipe.yaml", "environment.json", "stage.json", "export.json", "MANIFEST.json"}


def left_in(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Names of a run's files with a digest of what does not differ from run to run."""
    for path in sorted(run_dir.rglob("*")):
        if not path.is_file() or path.name in UNLIKE or "visualdl" in path.parts:
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl" or path.name in ("DONE", "evaluation.json"):
            rows_of = (
                [json.loads(line) for line in content.splitlines()]
                if (path.suffix == ".jsonl")
                else [json.loads(content)]
            )
            for row in rows_of:
                for volatile in ("time", "identity", "settings", "inputs", "sha256"):
                    row.pop(volatile, None)
            content = json.dumps(rows_of).encode()
        yield str(path.relative_to(run_dir)), hashlib.sha256(content).hexdigest()


class ScoringHere(ScoringService):
    """Grades in this process: probes change settings, not processes."""

    def score(self, items: Any, **options: Any) -> Any:
        replies = [_graded(*item) for item in items]
        scores = [
            composition.Score(*reply[1:]) if reply[0] == "score"
            else composition.Score.infrastructure(reply[1])
            for reply in replies
        ]  # fmt: skip
        return scores, ScoringReport(len(scores), 0.0, {}, 0)


@dataclass
class Spies:
    """Ways to observe what a setting does; each returns something that can be compared."""

    root: Path
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch
    calls: list[Any]
    runs: int = 0

    def run(self, base: str, changes: Changes) -> Any:
        self.runs += 1
        run_dir = self.tmp_path / f"run{self.runs}"
        told = finished(self.root, recipe_of(self.root, base, changes), run_dir)
        return told, dict(left_in(run_dir))

    def check(self, base: str, changes: Changes) -> Any:
        recipe = recipe_of(self.root, base, changes)
        return finished(self.root, recipe, self.tmp_path / "checked", "check"), ""

    def batches(self, base: str, changes: Changes) -> Any:
        self.calls.clear()
        self.run(base, changes)
        return [size for _, size, _ in self.calls]

    def problems(self, base: str, changes: Changes) -> Any:
        self.calls.clear()
        self.run(base, changes)
        return [(count, temperature) for count, _, temperature in self.calls]

    def passes(self, base: str, changes: Changes) -> Any:
        """Count the calls of the parts of layers, which recomputation repeats."""
        counts: Counter[str] = Counter()
        for name in ("attn_block", "mlp_block"):
            original = getattr(DecoderLayer, name)

            def counted(*arguments: Any, _name: str = name, _original: Any = original) -> Any:
                counts[_name] += 1
                return _original(*arguments)

            self.monkeypatch.setattr(DecoderLayer, name, counted)
        self.run(base, changes)
        return counts

    def directory(self, base: str, changes: Changes) -> Any:
        recipe = Recipe(**recipe_of(self.root, base, changes))
        return RunCommand(Path("x"), [], None, None, None, False, None)._directory(recipe.name)

    def model(self, base: str, changes: Changes) -> Any:
        return ModelSource(**recipe_of(self.root, base, changes)["model"]).build().to_dict()

    def gradients(self, base: str, changes: Changes) -> Any:
        """Return the type in which a bfloat16 weight's gradient is summed; here all are float32."""
        model = paddle.nn.Layer()
        model.weight = zero_parameter([2], "bfloat16")
        Optimizer(model, Recipe(**recipe_of(self.root, base, changes)).stages[0].optim)
        model.weight.sum().backward()
        return dtype_name(parallel.gradient(model.weight))

    def gate(self, base: str, changes: Changes) -> Any:
        before, now = ({"tasks": [], "mean_accuracy": a, "domains": {"math": {"accuracy": a}}}
                       for a in (0.9, 0.5))  # fmt: skip
        try:
            check_gate(Gate(metric="eval/math", at_least=0.1, **changes), "s", now, before)
        except GateError as error:
            return str(error)
        return "passed"

    def model_score(self, base: str, changes: Changes) -> Any:
        """The score of an answer: an untrained policy gives none."""
        (part,) = Recipe(**recipe_of(self.root, base, changes)).stages[0].reward.parts
        (scorer,) = scoring.load_scorers([part], self.root, "float32").values()
        prompt = Record("prompt", [{"role": "user", "content": "1 + 1?"}])
        answer = "so\n</think>\n\n<response>\n2\n</response>"
        return scorer.score([prompt], [{}], [answer], stop_requested=lambda: False)

    def scored(self, base: str, changes: Changes) -> Any:
        """The numbers of conversations that a reward model scores at once."""
        found: list[int] = []
        original = scoring.sequence_values

        def scored(model: Any, sequences: Any, **options: Any) -> Any:
            found.append(options["batch_size"])
            return original(model, sequences, **options)

        self.monkeypatch.setattr(scoring, "sequence_values", scored)
        self.run(base, changes)
        return found

    def rows(self, base: str, changes: Changes) -> Any:
        source = DataSource(path=str(self.root / "other_columns.jsonl"), **changes)
        records, _ = read_records(source.path, columns=source.columns)
        return [record.messages for record in records]

    def format_part(self, base: str, changes: Changes) -> Any:
        config = composition.RewardConfig(parts=[{"name": "format", **changes}])
        reward = composition.build_reward(config, self.root)
        text = "hm\n</think>\n\n<response>\n2\n</response>\n"
        return reward.score_batch([{}], [text], [9]).scores[0].value

    def deadline(self, base: str, changes: Changes) -> Any:
        config = composition.RewardConfig(parts=[{"python": "reward.py:score", **changes}])
        ((_, reward),) = composition.build_reward(config, self.root)._parts
        return getattr(reward, "deadline_s", None)

    def episode(self, base: str, changes: Changes) -> Any:
        """Play an episode that calls tools in every turn: a long result, then a slow call."""
        tokenizer = load_tokenizer(self.root / "tokenizer")
        (self.root / "slow.py").write_text(
            "import time\ndef nap() -> str:\n    'Sleep.'\n    time.sleep(0.4)\n    return 'done'\n"
        )
        settings = {"tools": ["calculator", {"python": "slow.py"}], "max_turns": 3, **changes}
        turns = [("calculator", {"expression": "12345678 * 87654321"}), ("nap", {}), ("nap", {})]

        def sample(prompts: Any, *, turn: int, **_: Any) -> Any:
            text = "x\n</think>\n\n" + tool_call_block(*turns[turn])
            ids = [*tokenizer.encode(text), tokenizer.stop_token_ids[0]]
            return [Completion(ids, [0.0] * len(ids), True)]

        record = Record("prompt", [{"role": "user", "content": "?"}])
        with open_toolbox(EnvironmentConfig(**settings), tokenizer, self.root) as toolbox:
            (found,) = play_episodes(
                [EpisodeStart([1], record)], sample, tokenizer, toolbox,
                max_new_tokens=2000, stop_requested=lambda: False,
            )  # fmt: skip
        return found.messages

    def judge(self, base: str, changes: Changes) -> Any:
        found: list[Any] = []

        class Judge(composition.LlmJudge):
            def __init__(self, **settings: Any) -> None:
                found.append(settings)
                super().__init__(**settings)

        self.monkeypatch.setattr(composition, "LlmJudge", Judge)
        settings = {"url": "http://here/v1", "model": "m", **changes}
        part = {"judge": settings} if changes or not self.runs else {"name": "exact"}
        config = composition.RewardConfig(parts=[part])
        reward = composition.build_reward(config, self.root)
        self.runs += 1
        return found, reward._service.workers

    def engine(self, base: str, changes: Changes) -> Any:
        """Show what a server is started with and asked for; nothing is sent."""
        found: list[Any] = []
        names: list[str] = []

        class Process:
            def __init__(self, command: list[str], environ: Any, log: Path) -> None:
                found.append((command, log.parent, environ.get("CUDA_VISIBLE_DEVICES")))
                names.append(command[command.index("--served-model-name") + 1])

            def require_alive(self) -> None: ...
            def close(self) -> None: ...

        class Endpoint:
            def __init__(self, url: str, parallel: int, alive: Any = None) -> None:
                self.url, self.state = url, StandIn(names[-1] if names else "policy")
                found.append((url, parallel))

            def wait_until_up(self, timeout_s: float, stop_requested: Any) -> None:
                found.append(timeout_s)

            def call(self, path: str, body: Any = None, **options: Any) -> Any:
                path = path.partition("?")[0]
                return self.state.usual(path, body or {}) if path != "/collective_rpc" else {}

            def complete(self, requests: Any, *, timeout_s: float, **options: Any) -> Any:
                found.append(timeout_s)
                return [Completion([5], [-1.0]) for _ in requests]

        self.monkeypatch.setattr(servers, "ServerProcess", Process)
        self.monkeypatch.setattr(servers, "Endpoint", Endpoint)
        self.monkeypatch.setattr(servers, "free_ports", lambda count: range(count))
        self.monkeypatch.setattr(served.secrets, "token_hex", lambda count: "run")
        changes = {k: str(v).replace("{root}", str(self.root)) if k == "directory" else v
                   for k, v in changes.items()}  # fmt: skip
        tokenizer: Any = SimpleNamespace(
            vocab_size=96, stop_token_ids=[2], save_pretrained=lambda directory: None
        )
        built = build_engine(
            EngineConfig(**changes), tokenizer, temperature=1.0, batch_size=8,
            directory=self.tmp_path / "engine", base_dir=self.tmp_path, largest_gap=1e9,
            stop_requested=lambda: False,
        )  # fmt: skip
        built.load_weights(make_model(), 1)
        built.sample([[5, 6]], SamplingConfig(2))
        return type(built).__name__, found
