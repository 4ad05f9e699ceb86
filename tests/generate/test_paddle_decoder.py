"""Logits of the model's own forward pass, as sampling sees them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie_train.generate.paddle_decoder import PaddleDecoder
from tests.losses.test_logprobs import compute_in_bfloat16, large_logits


@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_of_a_bfloat16_head_are_exact_to_float32(monkeypatch, with_bias):
    compute_in_bfloat16(monkeypatch)
    (hidden, weight), exact = large_logits()
    bias = paddle.linspace(-1, 1, 512).astype("bfloat16") if with_bias else None
    if bias is not None:
        exact = exact + bias.astype("float32").numpy()
    output = SimpleNamespace(hidden=hidden, router_stats=[])
    decoder = PaddleDecoder(SimpleNamespace(model=Decoder(output), head=lambda: (weight, bias)))
    logits, _ = decoder(np.zeros(len(exact), np.int64), None)
    np.testing.assert_allclose(logits, exact, atol=1e-4)


class Decoder(SimpleNamespace):
    """Gives `output`, whatever the tokens."""

    def __init__(self, output):
        super().__init__(output=output, norm=SimpleNamespace(weight=paddle.ones([1])))

    def __call__(self, tokens, kv_cache):
        return self.output
