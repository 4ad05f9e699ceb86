"""Layers, or parts of them, run again in the backward pass: what, how often, to which bits.

The referee is training that keeps everything: the same bits on one rank.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Recompute, RecomputeConfig, clone_model, enable_recompute
from ernie_train.parallel.recompute import _ChunkedBlock
from ernie_train.rl.critic import Critic
from ernie_train.run.recipe import ParallelConfig
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer
from tests.small_models import VARIANTS, assert_same, make_model, state
from tests.train.test_trainer import rows as packed_rows
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

CHOICES: dict[str, Any] = {
    "layers": True,
    "attention": {"parts": ["attention"]},
    "experts": {"parts": ["experts"]},
    "first layers": {"layers": 2},
    "experts of the first layers": {"parts": ["experts"], "layers": 2},
}
# Experts' gradients are added up chunk by chunk, so they are the same but for rounding.
CHUNKED: dict[str, Any] = {
    "chunks": {"chunk_tokens": 7},
    "chunks of experts": {"parts": ["experts"], "chunk_tokens": 5},
    "a token each": {"layers": 1, "chunk_tokens": 1},
    "chunks of the first layers": {"layers": 2, "chunk_tokens": 1000},
}
BALANCE = BalanceConfig(
    load_balance_coef=0.1, z_loss_coef=0.01, orthogonal_coef=1e-3, bias_update_rate=0.01
)


def chosen(name: str) -> Recompute:
    """The setting as a recipe would give it."""
    data = {} if name == "none" else {"recompute": (CHOICES | CHUNKED)[name]}
    return parse_config(ParallelConfig, data, "test").recompute


def model_with(name: str, **keys: Any) -> Ernie4_5_MoeForCausalLM:
    model = make_model(**keys)
    enable_recompute(model, chosen(name))
    model.train()
    return model


def calls_of(model: Ernie4_5_MoeForCausalLM | Critic) -> Counter[str]:
    """Counts from now on how often each layer's attention and experts run."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: counts.update([name])

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_post_hook(count(f"attention {number}"))
        layer.mlp.register_forward_post_hook(count(f"experts {number}"))
    return counts


# ---- what is run again ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "experts"),
    [
        ("none", 0, 0), ("layers", 3, 3), ("attention", 3, 0), ("experts", 0, 3),
        ("first layers", 2, 2), ("experts of the first layers", 0, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [lambda model: model, Critic])
def test_the_named_parts_of_the_first_layers_run_twice(name, attention, experts, make):
    model = make(model_with(name))
    model.train()
    counts = calls_of(model)
    hidden = model.model(paddle.ones([1, 5], "int64")).hidden
    assert set(counts.values()) == {1}
    hidden.sum().backward()
    wanted = {f"attention {layer}": 1 + (layer < attention) for layer in range(3)}
    wanted |= {f"experts {layer}": 1 + (layer < experts) for layer in range(3)}
    assert counts == wanted


def test_second_derivatives_through_chunks_are_refused_not_missing():
    x = paddle.ones([4, 2])
    x.stop_gradient = False
    chunks = [slice(0, 2), slice(2, 4)]
    (output,) = _ChunkedBlock.apply(x, lambda part, _: (part**3, None), None, chunks)
    # Paddle wraps what a backward pass raises.
    with pytest.raises(OSError, match="RuntimeError: this backward pass has no derivative"):
        paddle.grad(output.sum(), [x], create_graph=True)


@pytest.mark.parametrize("name", [*CHOICES, *CHUNKED])
def test_nothing_is_kept_for_later_in_evaluation_or_beside_a_cache(name):
    """A reference never trains, and what a cache holds would be appended to twice."""
    model = model_with(name)
    ids = paddle.to_tensor([[3, 5, 7, 2]])
    cache = model.new_cache(1)
    model.model(ids, kv_cache=cache).hidden.sum().backward()
    assert cache.step is not None
    reference = clone_model(model)
    counts = calls_of(reference)
    reference.model(ids)
    model.eval()
    counts_of_policy = calls_of(model)
    model.model(ids).hidden.sum().backward()
    assert set(counts.values()) == set(counts_of_policy.values()) == {1}


# ---- to the same bits ----------------------------------------------------------------------------


@cache
def trained(name: str, variant: str) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Weights, and metrics and loads of two steps of packed, accumulated micro-batches."""
    model = model_with(name, **VARIED[variant])
    optimizer = Optimizer(model, OptimConfig(lr=1e-3, schedule="constant"))
    trainer = Trainer(model, optimizer, balance=BALANCE if variant != "dense" else None)
    paddle.seed(11)
    seen = []
    for step in range(2):
        batches = [packed_rows(seed=2 * step), packed_rows(seed=2 * step + 1)]
        result = trainer.train_step(batches, PackedLoss("tokens"), 9)
        seen.append((result.metrics, result.load.tokens_per_expert, result.load.dropped))
    seen.append(paddle.rand([3]).tolist())  # the same numbers come next
    return state(model), seen


VARIED = {
    "moe": VARIANTS["moe"], "bias": VARIANTS["bias"], "dense": VARIANTS["dense"],
    "no-shared": VARIANTS["no-shared"], "capacity": {"moe_capacity_factor": 0.7},
    "gelu": {"hidden_act": "gelu"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIED)
def test_a_step_gives_the_bits_of_one_that_keeps_everything(variant):
    weights, seen = trained("none", variant)
    if variant == "capacity":
        assert all(np.sum(dropped) > 0 for _, _, dropped in seen[:2])
    for name in CHOICES:
        again, seen_again = trained(name, variant)
        assert_same(weights, again)
        for one, other in zip(seen[:2], seen_again[:2], strict=True):
            assert one[0] == other[0], name
            np.testing.assert_array_equal(one[1], other[1], err_msg=name)
            np.testing.assert_array_equal(one[2], other[2], err_msg=name)
        assert seen[2] == seen_again[2], "random numbers"


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("variant", [name for name in VARIED if name != "capacity"])
def test_chunks_give_a_step_that_keeps_everything_but_for_rounding(name, variant):
    weights, seen = trained("none", variant)
    in_chunks, seen_in_chunks = trained(name, variant)
    start = state(model_with("none", **VARIED[variant]))
    for parameter, one in weights.items():
        moved = np.linalg.norm(one - start[parameter])
        assert np.linalg.norm(in_chunks[parameter] - one) <= 1e-2 * moved, parameter
    for one, other in zip(seen[:2], seen_in_chunks[:2], strict=True):
        assert one[0].keys() == other[0].keys()
        for metric, value in one[0].items():
            assert other[0][metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("name", "attention", "experts"), [("chunks", 2, 1 + 1), ("chunks of experts", 1, 2)]
)
def test_a_layer_runs_twice_its_experts_in_chunks(name, attention, experts):
    """9 tokens make 2 chunks of at most 7, or of at most 5."""
    model = model_with(name)
    counts = calls_of(model)
    model.model(paddle.ones([1, 9], "int64")).hidden.sum().backward()
    wanted = {f"attention {layer}": attention for layer in range(3)}
    assert counts == wanted | {f"experts {layer}": 2 * experts for layer in range(3)}


def test_a_gradient_that_nothing_asks_for_is_none_of_the_routers():
    """Where no loss reads the router's logits its gradient comes from the weights alone."""
    gradients = []
    for name in ("none", "chunks"):
        model = model_with(name)
        model.model(paddle.arange(9).reshape([1, 9])).hidden.square().sum().backward()
        gradients.append({n: p.grad.numpy() for n, p in model.named_parameters() if "lm_" not in n})
    for parameter, one in gradients[0].items():
        scale = np.abs(one).max()
        np.testing.assert_allclose(gradients[1][parameter], one, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A recipe with a stage of every kind."""
    root = tmp_path_factory.mktemp("recompute")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    problems = rows(40, 7)
    pairs = [
        {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"],
         "rejected": "<think>\nno idea\n</think>\n\n<response>\nnone\n</response>"}
        for row in problems[:10]
    ]  # fmt: skip
    for row in problems:
        row["messages"] = row["messages"][:1]
    write_rows(root / "prompts.jsonl", problems)
    write_rows(root / "pairs.jsonl", pairs)
    write_rows(root / "texts.jsonl", [{"text": f"{a} and {a} is {2 * a}"} for a in range(99)])
    (root / "reward.py").write_text("def score(row, completion):\n    return '+' in completion\n")
    balance = {"bias_update_rate": 0.001, "z_loss_coef": 1e-3}
    packed = {"seq_len": 64, "micro_batch_size": 2, "grad_accum_steps": 2, "steps": 2,
              "optim": {"lr": 1e-3}, "balance": balance}  # fmt: skip
    constant = {"lr": 1e-3, "schedule": "constant"}
    recipe |= {"evaluation": None, "export": None, "stages": [
        {"name": "pre", "kind": "pretrain", "data": [{"path": str(root / "texts.jsonl")}]} | packed,
        {"name": "sft", "kind": "sft", "data": [{"path": str(root / "train.jsonl")}]} | packed,
        {"name": "dpo", "kind": "dpo", "data": str(root / "pairs.jsonl"), "seq_len": 64,
         "steps": 2, "pairs_per_step": 2, "micro_batch_size": 2, "optim": constant,
         "balance": balance},
        {"name": "rl", "kind": "upo", "data": [{"path": str(root / "prompts.jsonl")}],
         "reward": {"python": str(root / "reward.py") + ":score"}, "canaries": 0,
         "iterations": 2, "micro_batch_size": 8, "optim": constant, "balance": balance,
         "rollout": {"prompts_per_iteration": 4, "group_size": 4, "max_new_tokens": 10,
                     "max_prompt_tokens": 64},
         "policy": {"minibatches": 2, "kl": {"coef": 0.01, "kind": "k1", "place": "reward"}},
         "critic": {"optim": constant, "warmup_iterations": 0}, "term_norms_every": 1,
         "preference": {"coef": 0.2, "pairs": "online"}},
    ]}  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def run_stages(workspace: Path, directory: Path, recompute: Any) -> dict[str, bytes]:
    """Every file of weights that a run of all kinds of stages leaves."""
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"parallel": {"recompute": recompute}}))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(path), "--run-dir", str(directory)])
    assert not stopped.value.code
    found = {str(p.relative_to(directory)): p.read_bytes()
             for p in sorted(directory.rglob("*.safetensors"))}  # fmt: skip
    assert any("critic" in name for name in found)
    assert {name[:2] for name in found} == {"01", "02", "03", "04"}
    return found


def test_stages_of_every_kind_end_with_the_same_bits(workspace, tmp_path):
    kept = run_stages(workspace, tmp_path / "kept", False)
    for name in ("attention", "experts", "first layers"):
        directory = tmp_path / name.replace(" ", "-")
        changed = CHOICES[name] | ({"layers": 1} if "layers" in CHOICES[name] else {})
        again = run_stages(workspace, directory, changed)
        assert again.keys() == kept.keys()
        assert [file for file in kept if kept[file] != again[file]] == []
        for stage in ("01-pre", "02-sft", "03-dpo", "04-rl"):
            lines = [metrics_without_time(run, stage) for run in (tmp_path / "kept", directory)]
            assert lines[0] == lines[1]


# ---- what a recipe may say -----------------------------------------------------------------------


def problems(**parallel: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_config(ParallelConfig, parallel, "test")
    return raised.value.problems


def test_what_a_recipe_may_say():
    for name in ("layers", "attention", "experts"):
        whole = chosen(name)
        parts = RecomputeConfig() if whole is True else whole
        assert isinstance(parts, RecomputeConfig)
        assert [bool(parts.of_layer(number)) for number in range(3)] == [True] * 3
    assert chosen("none") is False
    half = chosen("first layers")
    assert isinstance(half, RecomputeConfig)
    assert [len(half.of_layer(number)) for number in range(3)] == [2, 2, 0]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            {"parts": ["expert"]},
            "recompute.parts.0: must be 'attention' or 'experts', got the text 'expert'; "
            "did you mean 'experts'?",
        ),
        (
            {"parts": ["experts", "core_attn"]},
            "recompute.parts.1: must be 'attention' or 'experts', got the text 'core_attn'; "
            "known are attention, experts",
        ),
        (
            {"parts": []},
            "recompute.parts: name one of attention, experts, or say `recompute: false`",
        ),
        ({"parts": "experts"}, "recompute.parts: must be a list, got the text 'experts'"),
        ({"parts": ["experts", "experts"]}, "recompute.parts: experts stands there twice"),
        (
            {"parts": ["attention"], "chunk_tokens": 8},
            "recompute.chunk_tokens: has no effect without experts among the parts",
        ),
        ({"chunk_tokens": 0}, "recompute.chunk_tokens: must be >= 1, got the number 0"),
        ({"layers": 0}, "recompute.layers: must be >= 1, got the number 0"),
        ({"layers": [0, 1]}, "recompute.layers: must be a whole number, got a list of 2"),
        ({"layers": True}, "recompute.layers: must be a whole number, got the boolean true"),
        (
            {"part": ["experts"]},
            "recompute.part: unknown key; did you mean 'parts'?",
        ),
        (
            "experts",
            "recompute: must be true or false or a section of `key: value` lines, got the text "
            "'experts'",
        ),
    ],
)
def test_what_a_recipe_may_not_say(value, says):
    assert problems(recompute=value) == [says]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["parallel.recompute.layers=3"],
            "parallel.recompute.layers=3: the model has 2 layers",
        ),
        (
            ["parallel.recompute.chunk_tokens=8", "model.moe_capacity_factor=1.5"],
            "parallel.recompute.chunk_tokens=8: moe_capacity_factor=1.5 counts over a whole "
            "micro-batch; leave one of them out",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(workspace, tmp_path, capsys, settings, says):
    recipe = str(workspace / "recipe.yaml")
    for verb, more in (("check", []), ("run", ["--run-dir", str(tmp_path / "run")])):
        with pytest.raises(SystemExit) as stopped:
            main([verb, recipe, *more, *settings])
        assert stopped.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert says in said
