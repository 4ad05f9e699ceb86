"""Whole runs on several ranks: SFT and RL as on one, checkpoints of one layout read by another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.io.safetensors import TensorFiles
from ernie_train.rl.rollout import read_rollout
from tests.parallel.ranks import start_on_ranks
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

REWARD = "def score(row, completion):\n    return 1.0 if '+' in completion else 0.0\n"
LAYOUTS = {
    "one": {}, "ep4": {"expert": 4}, "ep2": {"expert": 2}, "dp2": {"data": 2, "sharding": True},
    "ep2dp2": {"expert": 2, "data": 2, "sharding": True, "recompute": True},
}  # fmt: skip
STEPS = 4
REFERENCE = "01-dpo/reference_logprobs.bin"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    prompts = rows(24, 7)
    for row in prompts:
        row["messages"] = row["messages"][:1]
    write_rows(root / "prompts.jsonl", prompts)
    (root / "reward.py").write_text(REWARD)
    sft = recipe["stages"][0] | {
        "steps": STEPS, "grad_accum_steps": 4, "balance": {"bias_update_rate": 0.001},
        "data": [{"path": str(root / "train.jsonl"), "max_examples": 48}],
        "validate_every_steps": STEPS // 2,
    }  # fmt: skip
    sft["checkpoint"]["every_steps"] = STEPS // 2
    recipe["evaluation"] |= {"max_examples": 6, "untrained_examples": 3, "max_new_tokens": 12}
    rl = {
        "name": "rl", "kind": "upo", "data": [{"path": str(root / "prompts.jsonl")}],
        "reward": {"python": str(root / "reward.py") + ":score"}, "canaries": 0,
        "iterations": 1, "micro_batch_size": 4, "term_norms_every": 1,
        "rollout": {
            "prompts_per_iteration": 6, "group_size": 4, "max_new_tokens": 12,
            "max_prompt_tokens": 64,
        },
        "policy": {
            "minibatches": 2, "update_epochs": 2, "router_replay": True,
            "kl": {"coef": 0.01, "kind": "k1", "place": "reward"},
        },
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "critic": {"optim": {"lr": 1e-3, "schedule": "constant"}, "warmup_iterations": 0},
        "preference": {"coef": 0.2, "pairs": "online"},
        "balance": {"bias_update_rate": 0.001, "z_loss_coef": 1e-3, "orthogonal_coef": 1e-3},
    }  # fmt: skip
    sums = [{"prompt": f"{a} + 1?", "chosen": f"{a + 1}. " * (1 + a % 3), "rejected": "no"}
            for a in range(8)]  # fmt: skip
    write_rows(root / "pairs.jsonl", sums)
    dpo = {
        "name": "dpo", "kind": "dpo", "data": str(root / "pairs.jsonl"), "seq_len": 96, "steps": 4,
        "pairs_per_step": 2, "micro_batch_size": 2, "optim": {"lr": 1e-3, "schedule": "constant"},
    }  # fmt: skip
    for name, layout in LAYOUTS.items():
        values = recipe | {"parallel": layout, "stages": [sft]}
        (root / f"sft-{name}.yaml").write_text(yaml.safe_dump(values))
        values |= {"stages": [rl], "evaluation": None, "export": None}
        (root / f"rl-{name}.yaml").write_text(yaml.safe_dump(values))
        (root / f"dpo-{name}.yaml").write_text(yaml.safe_dump(values | {"stages": [dpo]}))
    return root


def command(root: Path, recipe: str, *more: str) -> list[str]:
    name = f"{recipe}-again" if more else recipe
    return ["run", str(root / f"{recipe}.yaml"), "--run-dir", str(root / "runs" / name), *more]


def run_here(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
        main(arguments)
    return int(stopped.value.code or 0)


def run_on(ranks: int, root: Path, commands: list[list[str]]) -> tuple[list[list[int]], str]:
    """The exit statuses of each rank, and what all printed."""
    path = root / f"commands-{ranks}.json"
    path.write_text(json.dumps(commands))
    printed = start_on_ranks(ranks, "run_commands.py", path, timeout_s=300)
    told = [path.with_suffix(f".status-{rank}.json") for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in told], printed


def checkpoint(root: Path, recipe: str, stage: str, step: int) -> Path:
    return root / "runs" / recipe / f"01-{stage}" / "checkpoints" / f"step_{step:06d}"


def apart(one: Path, other: Path, stem: str = "model") -> float:
    """The 2-norm of the difference over that of the first."""
    a, b = TensorFiles(one, stem), TensorFiles(other, stem)
    assert a.keys() == b.keys()
    gap = sum(float(np.square((a[n] - b[n]).astype(np.float64)).sum()) for n in a)
    return float(np.sqrt(gap / sum(float(np.square(a[n].astype(np.float64)).sum()) for n in a)))


def before_the_end(root: Path, source: str, name: str) -> None:
    """A copy of a run as it was after half of its steps."""
    target = root / "runs" / name
    shutil.copytree(root / "runs" / source, target)
    stage = target / "01-sft"
    shutil.rmtree(stage / "checkpoints" / f"step_{STEPS:06d}")
    for path in (stage / "DONE", target / "evaluation.json", target / "export.json"):
        path.unlink()
    shutil.rmtree(target / "export")


def go_on_with_dpo(root: Path) -> None:
    """Run it on one rank, and go on so with that of two ranks."""
    assert run_here(command(root, "dpo-one")) == 0
    file = root / "runs/dpo-dp2" / REFERENCE
    file.write_bytes(file.read_bytes()[:-1])  # the second of two blocks
    begun = [*command(root, "dpo-one")[:2], "--run-dir", str(root / "runs/dpo-dp2"), "--extend"]
    assert run_here(begun) == 0


@pytest.fixture(scope="module")
def runs(root) -> dict[str, Any]:
    """All runs of this module, in as few launches as can be."""
    assert run_here(command(root, "sft-one")) == 0
    # The same sums in another order: two rows instead of one micro-batch of two.
    order = ["stages.sft.micro_batch_size=1", "stages.sft.grad_accum_steps=8"]
    assert run_here(command(root, "sft-one", *order)) == 0
    assert run_here(command(root, "rl-one", "stages.rl.rollout.dump=true")) == 0
    (root / "runs/rl-one-again").rename(root / "runs/rl-sampled")
    replayed = f"stages.rl.rollout.replay={root / 'runs/rl-sampled/01-rl/rollouts'}"
    for name, size in (("rl-one", 4), ("rl-other", 2)):
        more = ["--run-dir", str(root / "runs" / name), f"stages.rl.micro_batch_size={size}"]
        assert run_here([*command(root, "rl-one")[:2], *more, replayed]) == 0

    def rl(name: str) -> list[str]:
        return [*command(root, name), replayed]

    dump = "stages.rl.rollout.dump=true"
    statuses = [run_on(4, root, [command(root, "sft-ep4"), rl("rl-ep4"), rl("rl-ep2dp2")])[0]]
    for name in ("sft-one-on", "sft-ep2-on", "sft-ep2dp2-on", "sft-broken"):
        before_the_end(root, "sft-ep4", name)
    shard = next(checkpoint(root, "sft-broken", "sft", STEPS // 2).glob("optimizer-00002*"))
    shard.unlink()

    def go_on(name: str) -> list[str]:
        return [*command(root, name)[:2], "--run-dir", str(root / "runs" / f"{name}-on")]

    assert run_here(go_on("sft-one")) == 0
    on_two = [go_on("sft-ep2"), rl("rl-dp2"), rl("rl-ep2"), command(root, "rl-ep2", dump)]
    on_two += [command(root, "dpo-ep2"), [*command(root, "dpo-dp2"), "stages.dpo.steps=2"]]
    balance = '{"load_balance_coef": 0.01, "load_balance_type": "global_aux_loss"}'
    balanced = ["--run-dir", str(root / "runs/rl-balanced"), f"stages.rl.balance={balance}"]
    on_two.append([*rl("rl-ep2")[:2], *balanced, replayed])
    statuses.append(run_on(2, root, on_two)[0])
    go_on_with_dpo(root)
    wrong = [
        [*command(root, "sft-ep2"), "seed={rank}"],
        [*command(root, "sft-ep2"), "export.dtype=float32", "name=of{rank}"],
        command(root, "sft-ep4"),
        [*command(root, "sft-ep2"), "tokenizer.path=/nowhere-{rank}"],
        [*command(root, "sft-ep2")[:2], "--run-dir", str(root / "runs/sft-broken")],
    ]
    # Relative paths lead each rank to a directory of its own: rank 1 has no data, or other data.
    for name, having in (("without", 1), ("other", 2)):
        for rank in range(2):
            (root / f"{name}-{rank}").mkdir()
        for rank in range(having):
            write_rows(root / f"{name}-{rank}" / "train.jsonl", rows(120, 1 + rank))
        changes = ["--run-dir", str(root / "runs" / name), "stages.sft.data.0.path=train.jsonl"]
        wrong.append(
            ["cd", str(root / f"{name}-{{rank}}"), *command(root, "sft-ep2")[:2], *changes]
        )
    for rank, step in enumerate((STEPS, STEPS // 2)):  # and a model of another step
        shutil.copytree(checkpoint(root, "sft-one", "sft", step), root / f"other-{rank}/model")
    changes = ["--run-dir", str(root / "runs/weights"), 'model={"path": "model"}']
    wrong.append(["cd", str(root / "other-{rank}"), *command(root, "sft-ep2")[:2], *changes])
    refused = run_on(2, root, wrong)
    statuses.append(run_on(4, root, [go_on("sft-ep2dp2")])[0])
    return {"statuses": statuses, "refused": refused}


def test_every_rank_ends_with_0(runs):
    assert all(status == 0 for ranks in runs["statuses"] for rank in ranks for status in rank)


@pytest.mark.parametrize("name", ["ep4", "one-on", "ep2-on", "ep2dp2-on"])
def test_sft_ends_as_on_one_rank_also_where_another_layout_began_it(root, runs, name):
    """`-on`: continued from a checkpoint that four ranks wrote."""
    one = checkpoint(root, "sft-one", "sft", STEPS)
    other = checkpoint(root, f"sft-{name}", "sft", STEPS)
    bound = apart(one, checkpoint(root, "sft-one-again", "sft", STEPS))
    assert apart(one, other) <= 3 * max(bound, 1e-6)
    assert apart(one, other, "optimizer") <= 1e-3
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["powers"] == states[1]["powers"]
    lines = [metrics_without_time(root / "runs" / run) for run in ("sft-one", f"sft-{name}")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    results = [json.loads((root / "runs" / run / "evaluation.json").read_text())
               for run in ("sft-one", f"sft-{name}")]  # fmt: skip
    assert results[0]["trained"]["mean_accuracy"] == results[1]["trained"]["mean_accuracy"]
    receipt = json.loads((root / f"runs/sft-{name}/export/export_receipt.json").read_text())
    assert receipt["passed"]


def test_each_tensor_is_written_once_by_the_rank_that_owns_it(root, runs):
    path = checkpoint(root, "sft-ep4", "sft", STEPS)
    assert len(TensorFiles(path).files) == len(TensorFiles(path, "optimizer").files) == 4
    sizes = [file.stat().st_size for file in TensorFiles(path, "optimizer").files]
    # Tensors are not cut: the embedding alone is more than an even share of this small model.
    assert max(sizes) < 2 * min(sizes)
    listed = json.loads((path / "MANIFEST.json").read_text())["files"]
    assert {f.name for f in TensorFiles(path).files} <= set(listed)


@pytest.mark.parametrize("name", ["ep4", "ep2dp2", "dp2", "ep2"])
def test_an_rl_iteration_on_replayed_rollouts_is_that_of_one_rank(root, runs, name):
    one, other = (checkpoint(root, run, "rl", 1) for run in ("rl-one", f"rl-{name}"))
    bound = apart(one, checkpoint(root, "rl-other", "rl", 1))
    assert apart(one, other) <= 3 * max(bound, 1e-6)
    assert apart(one / "critic", other / "critic") <= 3 * max(bound, 1e-6)
    lines = [metrics_without_time(root / "runs" / run, "01-rl")[0]
             for run in ("rl-one", f"rl-{name}")]  # fmt: skip
    assert lines[0].keys() == lines[1].keys()
    assert {"grad_norm", "grad_norm/policy", "critic/grad_norm", "preference"} <= lines[0].keys()
    for metric, value in lines[0].items():
        assert lines[1][metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


def test_logprobs_of_the_reference_are_those_of_one_rank(root, runs):
    """`dp2`: two ranks computed the first of four blocks, and one rank the others."""
    lines = [(root / "runs" / f"dpo-{name}" / REFERENCE).read_bytes().partition(b"\n")
             for name in ("one", "dp2", "ep2")]  # fmt: skip
    assert lines[1] == lines[0] and lines[2][0] == lines[0][0]
    # Each value of four bytes; the checks, of other bits, are of the same size.
    one, split = (np.frombuffer(content, "<f4") for _, _, content in (lines[0], lines[2]))
    assert len(one) == len(split) > 100
    assert np.sum(~np.isclose(one, split, rtol=1e-5, atol=1e-5)) <= 4
    curves = [metrics_without_time(root / "runs" / f"dpo-{name}", "01-dpo")
              for name in ("one", "dp2", "ep2")]  # fmt: skip
    for other in curves[1:]:
        for ours, theirs in zip(curves[0], other, strict=True):
            assert theirs["preference"] == pytest.approx(ours["preference"], rel=1e-4)


def test_an_rl_iteration_balances_policy_and_critic_among_the_tokens_of_all_ranks(root, runs):
    """Also with micro-batches for one rank alone, and in the passes that measure norms of terms."""
    line = metrics_without_time(root / "runs/rl-balanced", "01-rl")[0]
    for name in ("balance/load_balance", "critic/balance/load_balance"):
        assert line[name] == pytest.approx(2, rel=0.2), "experts of a token, as at perfect balance"
    assert line["grad_norm/balance/load_balance"] > 0


def test_completions_are_those_of_one_rank(root, runs):
    """The random numbers of a sequence do not depend on the rank that samples it."""
    found = [read_rollout(root / "runs" / run / "01-rl/rollouts/000001.jsonl")
             for run in ("rl-sampled", "rl-ep2-again")]  # fmt: skip
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.prompt, a.completion_ids) == (b.prompt, b.completion_ids)
            assert a.raw_reward == b.raw_reward


def test_what_cannot_work_is_told_once_with_status_2(runs):
    statuses, printed = runs["refused"]
    assert statuses == [[2] * 8] * 2
    text = " ".join(printed.split())
    assert text.count("error:") == 8, text
    assert "the seed differs between the ranks: rank 1 from rank 0" in text
    assert "the recipe differs between the ranks" in text
    assert "parallel.expert=4 x parallel.data=1 needs 4 ranks, but this job has 2" in text
    assert "/nowhere-0" in text
    assert "/nowhere-1" not in text
    assert "no checkpoint in" in text
    assert "without-1/train.jsonl: no such file" in text
    assert "the data of stage sft differs between the ranks: rank 1 from rank 0" in text
    assert "the weights differs between the ranks: rank 1 from rank 0" in text
