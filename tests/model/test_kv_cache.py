"""The cache of the model's own forward pass. Referee: the model without a cache."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.base import core  # no public function for the memory of tensors on a CPU

from ernie_train.model import KVCache, kv_cache
from ernie_train.model.batch_layout import BatchLayout
from tests.small_models import make_model

MOST = 150


@pytest.fixture(scope="module")
def model():
    return make_model()


def filled(model, prompts, slots=0, batch=None):
    """A cache whose first sequences are `prompts`."""
    cache = model.new_cache(batch or len(prompts), slots)
    start(model, cache, prompts, np.arange(len(prompts)))
    return cache


def start(model, cache, prompts, sequences):
    width = max(map(len, prompts))
    ids = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    documents = np.array([[at < len(prompt) for at in range(width)] for prompt in prompts])
    cache.start(sequences)
    model.model(paddle.to_tensor(ids), document_ids=documents.astype(np.int64), kv_cache=cache)


def step(model, cache, tokens):
    """Logits [B,V] after one more token of each sequence."""
    hidden = model.model(paddle.to_tensor(np.array(tokens)[:, None]), kv_cache=cache).hidden
    return model.logits(hidden).numpy()


@pytest.mark.parametrize("slots", [0, MOST], ids=["unknown length", "known length"])
@paddle.no_grad()
def test_sequences_come_and_go_in_any_place(model, slots):
    """The cache grows several times; between that sequences start, are copied, wait, leave."""
    rng = np.random.default_rng(0)

    def draw(length):
        return rng.integers(1, 96, length).tolist()

    rows = [draw(n) for n in (5, 40, 3, 17)]
    cache = filled(model, rows, slots)
    for at in range(100):
        if at == 20:  # two new prompts, one of them longer than the cache is
            rows[2], rows[0] = draw(90), draw(2)
            start(model, cache, [rows[2], rows[0]], np.array([2, 0]))
        if at == 40:
            cache.copy(np.array([2, 0]), np.array([0, 3]), np.array([60, 4]))
            rows[0], rows[3] = rows[2][:60], rows[0][:4]
        if at == 60:
            cache.select(np.array([3, 1, 0]))
            rows = [rows[i] for i in (3, 1, 0)]
        tokens = draw(len(rows))
        logits = step(model, cache, tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        if at % 10 < 2:
            for row, found in zip(rows, logits, strict=True):
                expected = model(paddle.to_tensor([row])).logits[0, -1].numpy()
                np.testing.assert_allclose(found, expected, atol=2e-5)
        if at % 3 == 0:  # its token is taken back
            cache.rewind(np.array([1]))
            rows[1].pop()
    assert cache.lengths.tolist() == [len(row) for row in rows]


@paddle.no_grad()
def test_memory_is_taken_once_where_the_length_is_known(model):
    """A cache that grew by concatenation, 32 slots at a time, would be copied again and again."""
    prompt, capacities, places = [3] * 20, [], set()
    cache = filled(model, [prompt, prompt], MOST)
    for _ in range(MOST - len(prompt)):
        step(model, cache, [4, 5])
        tensors = (*cache.keys, *cache.values)
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        capacities.append(cache.capacity)
    assert len(places) == 1
    assert capacities[-1] == 160  # 150 in multiples of 32
    # Attention reads all slots, so most of them must be in use.
    used = np.arange(len(prompt), MOST) + 1
    assert (np.array(capacities) <= np.maximum(used, 1) * 1.25 + 32).all()


@paddle.no_grad()
def test_other_lengths_take_no_more_growths_than_quarters_do(model):
    cache = filled(model, [[3] * 200])
    capacities = {cache.capacity}
    for _ in range(200):
        step(model, cache, [4])
        capacities.add(cache.capacity)
    assert sorted(capacities) == [224, 288, 384, 480]


@pytest.mark.parametrize("slots", [0, 2000], ids=["unknown length", "known length"])
def test_one_tensor_at_a_time_exists_twice(slots):
    layers = 16
    config = make_model().config.with_overrides({"num_hidden_layers": layers})
    cache = KVCache(config, 8, slots=slots)

    def begin(tokens):
        cache.begin(BatchLayout.full_rows(8, tokens))

    begin(1504)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = core.host_memory_stat_current_value("Allocated", 0)
    begin(1)
    added = core.host_memory_stat_peak_value("Allocated", 0) - before
    size = sum(tensor.size * 4 for tensor in (*cache.keys, *cache.values))
    # Of an unknown length the new slots are added too: a fifth of what is there afterwards.
    assert added < size * ((0.2 if not slots else 0) + 2 / (2 * layers))


@paddle.no_grad()
def test_a_pass_of_another_number_of_sequences_is_refused(model):
    cache = filled(model, [[5, 6], [7]], batch=3)
    with pytest.raises(ValueError, match="the cache expects 3 sequences, the batch 2"):
        step(model, cache, [1, 2])
    cache.start(np.array([2]))
    with pytest.raises(ValueError, match="the cache expects 1 sequences, the batch 3"):
        step(model, cache, [1, 2, 3])


def test_a_step_of_decoding_copies_a_number_a_sequence_to_the_device(monkeypatch):
    """A mask of every slot, made on the host, would be copied with each token."""
    config, sequences, held = make_model().config, 16, 50
    cache, sizes, to_tensor = KVCache(config, sequences), [], paddle.to_tensor
    cache.begin(BatchLayout.full_rows(sequences, held))
    for _ in range(2):  # the first of them grows the cache
        cache.begin(BatchLayout.full_rows(sequences, 1))

    def counted(data, *args, **named):
        sizes.append(np.asarray(data).size)
        return to_tensor(data, *args, **named)

    monkeypatch.setattr(paddle, "to_tensor", counted)
    cache.begin(BatchLayout.full_rows(sequences, 1))
    assert max(sizes) <= sequences * config.num_attention_heads < sequences * cache.capacity
    seen = np.arange(cache.capacity) < held + 3
    heads, group = (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    mask = cache.step.mask.numpy()
    assert mask.shape == (sequences * heads, group, cache.capacity)
    assert ((mask == 0) == seen).all() and (mask[..., ~seen] < -1e29).all()


def test_a_paddle_whose_slices_are_copies_is_refused(monkeypatch):
    """Tokens would be written into copies, and lost as the cache grows."""
    first_rows = kv_cache._first_rows
    monkeypatch.setattr(kv_cache, "_first_rows", lambda *args: first_rows(*args).clone())
    cache = KVCache(make_model().config, 2)
    with pytest.raises(RuntimeError, match="FLAGS_use_stride_kernel"):
        cache.begin(BatchLayout.full_rows(2, 3))
