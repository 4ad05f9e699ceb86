"""The memory of the key/value cache; what it holds is tested with the models that use it."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.batch_layout import BatchLayout
from ernie_train.model.kv_cache import KVCache

LAYERS, SEQUENCES, HELD = 16, 64, 32


def filled() -> KVCache:
    """A cache of `HELD` tokens a sequence, which fill its slots."""
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Ernie4_5_MoeConfig.preset("tiny", **sizes, hidden_size=128, head_dim=32)
    cache = KVCache(config, SEQUENCES)
    append(cache, HELD)
    assert cache.capacity == HELD
    return cache


def append(cache: KVCache, tokens: int) -> None:
    cache.begin(BatchLayout.full_rows(SEQUENCES, tokens))
    rows = paddle.ones([SEQUENCES * tokens * 2, 32])
    for layer in range(LAYERS):
        cache.append(layer, rows, rows)


def allocated() -> int:
    return int(paddle.base.core.host_memory_stat_current_value("Allocated", 0))


@pytest.mark.parametrize("what", ["grow", "select"])
def test_a_cache_that_grows_or_shrinks_copies_one_layer_at_a_time(what: str) -> None:
    cache = filled()
    layer = SEQUENCES * HELD * 2 * 32 * 4  # bytes of its keys
    before = allocated()
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    if what == "grow":
        append(cache, 1)  # twice as many slots
        assert cache.capacity == 2 * HELD
    else:
        cache.select(np.arange(SEQUENCES // 2))
    more = int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0)) - before
    grown = 2 * LAYERS * layer if what == "grow" else 0
    assert more < grown + 4 * layer
    for held in (*cache.keys, *cache.values):
        assert bool((held[:, :HELD] == 1).all())


def test_a_step_of_decoding_copies_a_number_a_sequence_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mask of every slot, made on the host, would be copied with each token."""
    cache, sizes = filled(), []
    to_tensor = paddle.to_tensor

    def counted(data: np.ndarray, *args: object, **named: object) -> paddle.Tensor:
        sizes.append(np.asarray(data).size)
        return to_tensor(data, *args, **named)

    monkeypatch.setattr(paddle, "to_tensor", counted)
    append(cache, 1)
    assert max(sizes) <= SEQUENCES * cache.config.num_attention_heads
    seen = np.arange(cache.capacity) <= HELD
    mask = cache.step.mask.numpy()
    assert mask.shape == (SEQUENCES * 2, 2, cache.capacity)
    assert ((mask == 0) == seen).all() and (mask[..., ~seen] < -1e29).all()
