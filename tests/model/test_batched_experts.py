"""Batched products of experts against one expert after another, and where they are chosen."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie_train.model import batched_experts, moe
from ernie_train.model.batched_experts import BatchedSwiGLU
from ernie_train.model.moe import _GroupedSwiGLU, experts_by_autograd
from tests.model.test_moe import config, gradients

HIDDEN, WIDTH = 12, 7


def leaves(rows, frozen=()):
    rng = np.random.default_rng(3)
    count, experts = sum(rows), len(rows)
    shapes = [[count, HIDDEN], [count, 1], [experts, HIDDEN, WIDTH], [experts, HIDDEN, WIDTH],
              [experts, WIDTH, HIDDEN]]  # fmt: skip
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return [paddle.to_tensor(a, stop_gradient=i in frozen) for i, a in enumerate(arrays)]


def outcome(run, rows, frozen=()):
    given = leaves(rows, frozen)
    output = run(*given, rows)
    (output * paddle.to_tensor(np.random.default_rng(4).normal(size=output.shape), "float32")
     ).sum().backward()  # fmt: skip
    return [output.numpy(), *(None if x.grad is None else x.grad.numpy() for x in given)]


def by_autograd(x, weights, gate, up, down, rows):
    return experts_by_autograd(x, weights, (gate, up, down), rows, F.silu)


@pytest.mark.parametrize("rows", [[3, 3, 3], [5, 0, 1, 4], [0, 0, 7], [1], [1, 9, 2, 0, 0]])
def test_equal_one_expert_after_another_with_gradients(rows):
    batched = outcome(BatchedSwiGLU.apply, rows)
    for reference in (_GroupedSwiGLU.apply, by_autograd):
        for ours, theirs in zip(batched, outcome(reference, rows), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", [(2,), (0, 1), (2, 3, 4)])
def test_inputs_that_are_not_trained_get_no_gradient(frozen):
    batched = outcome(BatchedSwiGLU.apply, [4, 2], frozen)
    for ours, theirs in zip(batched, outcome(_GroupedSwiGLU.apply, [4, 2], frozen), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_they_pay_where_experts_are_loaded_evenly():
    some = batched_experts.MOST_ROWS - 24
    assert batched_experts.pays([some] * 64)
    assert batched_experts.pays([2 * some, 0] * 32)
    assert not batched_experts.pays([2 * some + 1, 0, *[2 * some, 0] * 31])


def test_many_rows_are_not_padded():
    """An expert then computes for longer than its kernels take to start."""
    assert not batched_experts.pays([6144] * 8)
    assert not batched_experts.pays([batched_experts.MOST_ROWS + 1] * 64)
    assert not batched_experts.few_rows(8 * 6144, 8)


def test_few_rows_take_them_whatever_their_load():
    """A step of decoding would start kernels of each expert, longer than they compute."""
    assert batched_experts.pays([90, *[0] * 63])
    assert not batched_experts.pays([200, *[0] * 63])


@pytest.mark.parametrize("even", [True, False])
def test_a_layer_on_a_gpu_takes_them_where_they_pay(even, monkeypatch):
    """The place of a tensor is all that tells a GPU, so it is made up."""
    paddle.seed(0)
    layer = moe.MoE(config())
    x = np.random.default_rng(0).normal(size=(23, 24)).astype(np.float32)
    weight = paddle.randn([23, 24])
    expected = gradients(layer, lambda leaf: layer(leaf)[0], x, weight)
    calls = []
    apply = BatchedSwiGLU.apply
    monkeypatch.setattr(BatchedSwiGLU, "apply", lambda *a: calls.append(1) or apply(*a))
    monkeypatch.setattr(batched_experts, "pays", lambda rows: even)
    monkeypatch.setattr(paddle.base.core.Place, "is_gpu_place", lambda self: True, raising=False)
    found = gradients(layer, lambda leaf: layer(leaf)[0], x, weight)
    assert len(calls) == int(even)
    for ours, theirs in zip((*found[:2], *found[2].values()),
                            (*expected[:2], *expected[2].values()), strict=True):  # fmt: skip
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
