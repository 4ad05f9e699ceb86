"""The gradient of the embedding, in the type that GPUs train in."""

from __future__ import annotations

import paddle
import pytest

from ernie_train.model.layers import Embedding

VOCAB, HIDDEN, TIMES = 5, 3, 1000


def gradient_of(embedding: Embedding, ids: paddle.Tensor) -> paddle.Tensor:
    output = embedding(ids)
    output.backward(paddle.ones(output.shape, output.dtype))
    return embedding.weight.grad.astype("float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_a_frequent_token_all_count(dtype: str) -> None:
    """Paddle's kernels add in the weight's type: in bfloat16 ones add up to 256 at most."""
    embedding = Embedding(VOCAB, HIDDEN)
    embedding.to(dtype=dtype)
    found = gradient_of(embedding, paddle.to_tensor([2] * TIMES + [0]))
    expected = paddle.zeros([VOCAB, HIDDEN])
    expected[2], expected[0] = float(TIMES), 1.0
    assert bool((found == expected).all()), found


def test_rows_are_looked_up() -> None:
    embedding = Embedding(VOCAB, HIDDEN)
    embedding.to(dtype="bfloat16")
    with paddle.no_grad():
        embedding.weight.set_value(paddle.arange(15).reshape([5, 3]).astype("bfloat16"))
    ids = paddle.to_tensor([4, 0, 4])
    assert bool((embedding(ids) == embedding.weight[ids]).all())


def test_where_sums_are_to_have_one_order_paddle_s_own_kernel_adds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its `index_add` then takes one thread of a GPU for all rows."""
    monkeypatch.setenv("FLAGS_cudnn_deterministic", "1")
    monkeypatch.setattr(paddle, "index_add_", None)
    embedding = Embedding(VOCAB, HIDDEN)
    embedding.to(dtype="bfloat16")
    assert float(gradient_of(embedding, paddle.to_tensor([1, 1]))[1, 0]) == 2
