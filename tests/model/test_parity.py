"""The model against transformers: logits, gradients of every parameter, cached generation.

The referee makes the models (tests/referee/model_parity.py), so config.json and safetensors files
are read as transformers writes them. Everything is fp32 on the CPU; both sides sum in other orders.

A router's top-k, a relu's kink and an argmax jump where two numbers are equal. The referee tries
seeds until every such choice has a margin far above rounding (its `Margins`), and says how often
the selection bias and `moe_norm_min` mattered; the tests check that their cases are not idle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.layout import tensor_mappings, to_stored

LOGITS_ATOL = 2e-5
GRADIENT_RTOL = 1e-4  # of the largest entry of the same tensor
# Paddle's CPU softmax gives a masked key exp(-64), not 0: a token without a loss gets a gradient of
# that order. Gradients below this share of the model's largest count as zero.
ZERO = 1e-15
# With moe_k=1 the chosen expert's weight is p/p: the router's gradient is zero but for rounding,
# and each side has its own noise. It must be below this share of the model's largest gradient.
CANCELLED = 1e-6
NEW_TOKENS = 5

BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "hidden_act": "silu", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "use_bias": False,
    "tie_word_embeddings": True, "moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 2,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_layer_end_index": -1,
    "moe_layer_interval": 1, "moe_norm_min": 1e-12,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "released_shape": {"moe_layer_start_index": 1, "moe_k": 6, "moe_num_shared_experts": 2},
    "interval_2": {"num_hidden_layers": 4, "moe_layer_interval": 2, "moe_num_shared_experts": 2},
    "start_and_end": {
        "num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3, **UNTIED,
    },
    "k_1": {"moe_k": 1, "moe_num_shared_experts": 2},
    "k_1_norm_min_always": {"moe_k": 1, "moe_num_shared_experts": 0, "moe_norm_min": 2.0},
    "k_4_untied": {"moe_k": 4, **UNTIED},
    "norm_min_sometimes": {"moe_norm_min": 0.45},
    "wide_heads": {"head_dim": 32, "num_key_value_heads": 1},
    "narrow_heads_rope_10000": {"head_dim": 8, "num_key_value_heads": 4, "rope_theta": 10000.0},
    "coarse_eps": {"rms_norm_eps": 1e-2, "rope_theta": 10000.0, **UNTIED},
    "selection_bias": {"moe_num_shared_experts": 0},
    "experts_32": {"moe_num_experts": 32, "moe_k": 4, "moe_num_shared_experts": 2},
    "gelu": {"hidden_act": "gelu", "moe_num_shared_experts": 2},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh", "moe_k": 4, "moe_layer_interval": 2},
    "relu": {"hidden_act": "relu"},
    "use_bias_tied": {"use_bias": True, "moe_num_shared_experts": 2},
    "use_bias_untied": {"use_bias": True, "moe_layer_start_index": 1, **UNTIED},
    "moe_without_moe_layers": {"moe_layer_start_index": 3},
    "dense": {"head_dim": 16},
    "dense_bias_gelu": {"head_dim": 12, "use_bias": True, "hidden_act": "gelu", **UNTIED},
}  # fmt: skip
SELECTION_BIAS_STD = {"selection_bias": 0.1, "experts_32": 0.03, "gelu_tanh": 0.05}
# transformers 4.57 gives routed experts biases, 5.x (which is followed here) does not; nor can 4.57
# build an MoE model without a router.
ONLY_NEWEST = ("use_bias_tied", "use_bias_untied", "moe_without_moe_layers")
VERSIONS = ("newest", "4.57")
PAIRS = [
    (version, name)
    for version in VERSIONS
    for name in CASES
    if version == "newest" or name not in ONLY_NEWEST
]
every_pair = pytest.mark.parametrize(("version", "name"), PAIRS)


def make_inputs() -> dict[str, np.ndarray]:
    """Token ids [B,S] and document ids [B,S] (0 is padding) of the batches, prompts, positions."""
    random = np.random.default_rng(5)

    def batch(kind: str, rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
        documents = np.zeros((len(rows), length), np.int64)
        for row, lengths in enumerate(rows):
            ids = np.repeat(np.arange(len(lengths)) + 1, lengths)
            documents[row, : len(ids)] = ids
        # Id 0 is the pad token, whose embedding takes no gradient in transformers.
        ids = random.integers(3, BASE["vocab_size"], documents.shape) * (documents != 0)
        return {f"{kind}_ids": ids, f"{kind}_documents": documents}

    return {
        **batch("plain", [[24], [24]], 24),
        **batch("padded", [[20], [13], [7]], 20),
        # Short and long documents take different paths through attention.
        **batch("packed", [[210, 9, 14, 30], [270]], 270),
        "stretched_positions": np.stack([2 * np.arange(24), 5 + 3 * np.arange(24)]),
        "prompt_0": random.integers(3, BASE["vocab_size"], 5),
        "prompt_1": random.integers(3, BASE["vocab_size"], 9),
        "new_tokens": np.int64(NEW_TOKENS),
    }


def case_for_referee(name: str) -> dict[str, Any]:
    config = {**BASE, **CASES[name]}
    dense = name.startswith("dense")
    if dense:
        config = {key: value for key, value in config.items() if not key.startswith("moe_")}
    return {
        "name": name,
        "model_type": "ernie4_5" if dense else "ernie4_5_moe",
        "config": config,
        "weight_std": 0.1,
        "selection_bias_std": SELECTION_BIAS_STD.get(name, 0.0),
    }


INPUTS = make_inputs()


class Pair:
    """One model on both sides."""

    def __init__(self, directory: Path) -> None:
        self.expected = dict(np.load(directory / "expected.npz"))
        self.model: Ernie4_5_MoeForCausalLM = load_pretrained(directory / "model")


Expected = Callable[[str, str], Pair]


@pytest.fixture(scope="module")
def pair(referee: Any, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """pair(version, name); one referee process per version makes all of its models."""

    work = tmp_path_factory.mktemp("parity")

    def ask_referee(version: str) -> None:
        (work / version).mkdir()
        names = [name for v, name in PAIRS if v == version]
        cases = json.dumps([case_for_referee(name) for name in names])
        (work / version / "cases.json").write_text(cases)
        np.savez(work / version / "inputs.npz", **INPUTS)
        referee("model_parity.py", work / version, transformers=version)

    with ThreadPoolExecutor() as pool:  # one thread each: two cores make both in the time of one
        list(pool.map(ask_referee, VERSIONS))

    @cache
    def make(version: str, name: str) -> Pair:
        return Pair(work / version / name)

    return make


def next_token_loss(logits: paddle.Tensor, ids: np.ndarray, documents: np.ndarray) -> paddle.Tensor:
    """Mean loss of the tokens that follow another one of their document."""
    inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != 0)
    rows, columns = np.nonzero(inside)
    predictions = logits.reshape([-1, logits.shape[-1]])
    chosen = paddle.gather(predictions, paddle.to_tensor(rows * ids.shape[1] + columns))
    return F.cross_entropy(chosen, paddle.to_tensor(ids[:, 1:][inside]))


def positions_in_documents(documents: np.ndarray) -> np.ndarray:
    """Positions [B,S] that restart in every document."""
    offsets = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    opens = np.ones(documents.shape, bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return offsets - np.maximum.accumulate(np.where(opens, offsets, 0), axis=1)


def gradients(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    """Gradients by their names on disk."""
    named = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
        if not p.stop_gradient
    }
    return dict(to_stored(tensor_mappings(model.config), named))


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@every_pair
def test_logits_loss_and_gradients(pair: Expected, version: str, name: str, kind: str) -> None:
    both = pair(version, name)
    model, expected = both.model, both.expected
    ids, documents = INPUTS[f"{kind}_ids"], INPUTS[f"{kind}_documents"]
    arguments = {}
    if kind != "plain":
        arguments["document_ids"] = paddle.to_tensor(documents)
    if kind == "packed":
        arguments["position_ids"] = paddle.to_tensor(positions_in_documents(documents))
    model.clear_gradients()
    logits = model(paddle.to_tensor(ids), **arguments).logits
    loss = next_token_loss(logits, ids, documents)
    loss.backward()

    real = documents != 0
    reference = expected[f"logits/{kind}"]
    np.testing.assert_allclose(logits.numpy()[real], reference[real], rtol=0, atol=LOGITS_ATOL)
    np.testing.assert_allclose(loss.item(), expected[f"loss/{kind}"], rtol=1e-6)
    assert_gradients(gradients(model), expected, f"grad/{kind}/", router_cancels=name == "k_1")


def assert_gradients(
    ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], prefix: str, router_cancels: bool
) -> None:
    """Every parameter's gradient, within `GRADIENT_RTOL` of its largest entry."""
    reference = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
    assert ours.keys() == reference.keys()
    largest = max(np.abs(grad).max() for grad in reference.values())
    errors = {}
    for name, grad in reference.items():
        if router_cancels and name.endswith(".mlp.gate.weight"):
            assert max(np.abs(grad).max(), np.abs(ours[name]).max()) < CANCELLED * largest
        else:
            scale = max(np.abs(grad).max(), ZERO / GRADIENT_RTOL * largest)
            errors[name] = np.abs(ours[name] - grad).max() / scale
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT_RTOL, worst


@every_pair
def test_position_ids_are_honoured(pair: Expected, version: str, name: str) -> None:
    both = pair(version, name)
    with paddle.no_grad():
        output = both.model(
            paddle.to_tensor(INPUTS["plain_ids"]),
            position_ids=paddle.to_tensor(INPUTS["stretched_positions"]),
        )
    reference = both.expected["logits/stretched"]
    np.testing.assert_allclose(output.logits.numpy(), reference, rtol=0, atol=LOGITS_ATOL)
    assert np.abs(reference - both.expected["logits/plain"]).max() > 100 * LOGITS_ATOL


def padded_rows(rows: list[np.ndarray]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rows of different lengths as ids [B,S] and document ids [B,S], padded on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    documents = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        documents[i, : len(row)] = 1
    return paddle.to_tensor(ids), paddle.to_tensor(documents)


@every_pair
def test_cached_generation(pair: Expected, version: str, name: str) -> None:
    """Greedy tokens and logits with the cache: transformers', and those without a cache."""
    both = pair(version, name)
    prompts = [INPUTS["prompt_0"], INPUTS["prompt_1"]]
    with paddle.no_grad():
        cache = both.model.new_cache(len(prompts))
        # In two pieces: the second one meets a cache that holds something, with several tokens.
        for piece in ([p[:3] for p in prompts], [p[3:] for p in prompts]):
            ids, documents = padded_rows(piece)
            logits = both.model(ids, document_ids=documents, kv_cache=cache).logits.numpy()
        last = np.stack([logits[i, len(p) - 4] for i, p in enumerate(prompts)])
        steps = [last]
        for _ in range(NEW_TOKENS - 1):
            new = paddle.to_tensor(steps[-1].argmax(-1)[:, None])
            steps.append(both.model(new, kv_cache=cache).logits.numpy()[:, 0])
        cached = np.stack(steps, axis=1)  # [B,n,V]
        tokens = cached.argmax(-1)
        whole = [np.concatenate([p, t[:-1]]) for p, t in zip(prompts, tokens, strict=True)]
        ids, documents = padded_rows(whole)
        uncached = both.model(ids, document_ids=documents).logits.numpy()
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(tokens[i], both.expected[f"tokens/{i}"])
        reference = both.expected[f"steps/{i}"]
        np.testing.assert_allclose(cached[i], reference, rtol=0, atol=LOGITS_ATOL)
        alone = uncached[i, len(prompt) - 1 : len(whole[i])]
        np.testing.assert_allclose(cached[i], alone, rtol=0, atol=LOGITS_ATOL)


@every_pair
def test_cases_are_not_idle(pair: Expected, version: str, name: str) -> None:
    """The margins hold, and the settings whose effect could be nil have one."""
    expected = pair(version, name).expected
    assert expected["margin"] > 1e-6
    if name in SELECTION_BIAS_STD:
        assert expected["share_rechosen"] > 0.2
    if name == "norm_min_sometimes":
        assert 0.1 < expected["share_clamped"] < 0.9
    if name == "k_1_norm_min_always":
        assert expected["share_clamped"] == 1.0
