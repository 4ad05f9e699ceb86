"""Every key of a recipe changes something: no setting is accepted and ignored.

`recipe_probes.py` names for each key a small run and the change of this key alone. The outcome of a
run is what it leaves: exit status and message, metrics, weights, samples, names of files. Keys that
leave results as they are by design are probed where they act. A key without a probe turns this red.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from ernie_train.data import (
    shipped_template,
    train_tokenizer,
)
from ernie_train.eval import evaluation
from ernie_train.generate.engines import own
from ernie_train.rewards.scoring import composition
from tests.run.recipe_probes import PROBES, Probe
from tests.run.recipe_probes_rl import CRITIC, RL_PROBES
from tests.run.recipe_spies import ScoringHere, Spies, finished, recipe_of
from tests.workspace import make_workspace, rows, write_rows
from tools.recipe_reference import Key, recipe_keys

KEYS = {key.path: key for key in recipe_keys()}
ALL_PROBES = PROBES | RL_PROBES


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys")
    make_workspace(root)
    texts = [row["messages"][0]["content"] for row in rows(60, 1)]
    train_tokenizer(texts, 300, root / "tokenizer2")
    problems = [
        {**row, "messages": row["messages"][:1], "difficulty": 1 + at % 3}
        for at, row in enumerate(rows(12, 7))
    ]
    write_rows(root / "prompts.jsonl", problems)
    tasks = [{**row, "task": "product", "domain": "other"} for row in problems[:4]]
    write_rows(root / "two_tasks.jsonl", [*problems[4:8], *tasks])
    write_rows(root / "other_columns.jsonl", [{"q": f"{a}?", "a": f"so #{a}"} for a in range(12)])
    for name, first in (("pairs", 0), ("pairs2", 5)):
        pairs = [{"prompt": "again? " * (a % 3), "chosen": f"{a}. " * (1 + a), "rejected": f"{a}"}
                 for a in range(first, first + 6)]  # fmt: skip
        pairs[0]["prompt"] = "Hello?"
        pairs = [{**pair, "prompt": pair["prompt"] or "And?"} for pair in pairs]
        write_rows(root / f"{name}.jsonl", pairs)
    write_rows(root / "asked.jsonl", [{"prompt": "Hello?", "chosen": "a", "rejected": "b"}])
    train = rows(12, 1)
    dialogues = [{"messages": a["messages"] + b["messages"]} for a, b in pairwise(train)]
    write_rows(root / "dialogues.jsonl", dialogues)
    control = [{"prompt": "<|im_end|>?", "completion": f"{n}"} for n in range(12)]
    write_rows(root / "control.jsonl", control)
    write_rows(root / "texts.jsonl", [{"text": "1 + 2 = 3. " * n} for n in range(1, 13)])
    plain = shipped_template("ernie_plain").source
    (root / "dated.jinja").write_text("{{- strftime_now('%d %b %Y\n') -}}" + plain)
    (root / "bad.jsonl").write_text((root / "validation.jsonl").read_text() + "{\n")
    for name in ("my", "other"):
        source = f"def {name}_tool(a: int) -> int:\n    'Add one.'\n    return a + 1\n"
        (root / f"{name}_tools.py").write_text(source)
    (root / "logger.py").write_text(
        "class Quiet:\n    def __init__(self, **told): self.told = told\n"
        "    def log(self, step, metrics, timings): pass\n    def close(self): pass\n"
        "class Writes(Quiet):\n"
        "    def close(self): (self.told['run_dir'] / 'logged').write_text('it was')\n"
    )
    (root / "reward.py").write_text(
        "def score(row, completion):\n    return float(sum(map(ord, completion)) % 2)\n"
        "def other(row, completion):\n    return float(sum(map(ord, completion)) % 3 == 0)\n"
        "def half(row, completion):\n    return 0.5 * score(row, completion)\n"
        "def closes(row, completion):\n    return float('</think>' in completion)\n"
        "def raises(row, completion):\n"
        "    if sum(map(ord, completion)) % 7:\n        raise ValueError('odd')\n"
        "    return score(row, completion)\n"
    )
    finished(root, recipe_of(root, "sft", {}), root / "of_base")
    finished(root, recipe_of(root, "upo", CRITIC), root / "with_critic")
    for name, seed in (("reward_model", 1), ("reward_model2", 2)):
        recipe = recipe_of(root, "reward", {"seed": seed})
        assert finished(root, recipe, root / name)[0] == "0"
    dumped = recipe_of(root, "upo", {"@rollout.dump": True, "seed": 99})
    finished(root, dumped, root / "dumped")
    (root / "dumped/01-u/rollouts").rename(root / "rollouts")
    return root


@pytest.fixture
def observe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(composition, "ScoringService", ScoringHere)
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    calls: list[Any] = []
    for module in (evaluation, own):
        original = module.generate_sharded

        def sampled(model: Any, prompts: Any, _original: Any = original, **options: Any) -> Any:
            calls.append((len(prompts), options["batch_size"], options["temperature"]))
            return _original(model, prompts, **options)

        monkeypatch.setattr(module, "generate_sharded", sampled)
    spies = Spies(root, tmp_path, monkeypatch, calls)
    return lambda probe, changes: getattr(spies, probe.observe.replace(" ", "_"))(
        probe.base, changes
    )


BASELINES: dict[str, Any] = {}


def has_one_value(key: Key) -> bool:
    """Tell whether the key's type leaves no choice: the `kind` of a stage."""
    found = key.owner.model_fields.get(key.name)
    return (
        found is not None
        and get_origin(found.annotation) is Literal
        and (len(get_args(found.annotation)) == 1)
    )


@pytest.mark.parametrize("path", sorted(KEYS))
def test_every_key_changes_something(path: str, observe: Callable[..., Any]) -> None:
    if has_one_value(KEYS[path]):
        return
    assert path in ALL_PROBES, f"add a probe of {path}: a run, and a change that it shows"
    probe = ALL_PROBES[path]
    known = repr((probe.base, probe.given, probe.observe))
    if known not in BASELINES:
        BASELINES[known] = observe(probe, probe.given)
    changed = observe(probe, {**probe.given, **probe.changed})
    assert changed != BASELINES[known]
    if probe.observe in ("run", "check"):  # two refusals would differ too
        assert {changed[0][0], BASELINES[known][0][0]} & {"0", "5"}, (changed, BASELINES[known])


def test_no_probe_is_of_a_key_that_is_gone() -> None:
    assert sorted(set(ALL_PROBES) - set(KEYS)) == []


@pytest.mark.parametrize("base", ["sft", "dpo", "reward", "upo", "evaluated"])
def test_the_same_settings_have_the_same_outcome(base: str, observe: Callable[..., Any]) -> None:
    """Else every probe would pass."""
    assert observe(Probe(base, {}), {}) == observe(Probe(base, {}), {})
