"""Whole models on packed and long documents: packing changes nothing, memory stays linear."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ernie_train.data import Batch
from ernie_train.train.supervised import PackedLoss
from tests.small_models import make_model
from tools.bench import long_context

ROOT = Path(__file__).resolve().parents[2]

# Every expert is chosen: a choice between almost equal experts may fall either way by rounding.
SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "moe_intermediate_size": 8, "moe_num_experts": 3, "moe_k": 3, "moe_layer_start_index": 1,
}  # fmt: skip
LOSS = PackedLoss("tokens")
LENGTHS = ((1, 41), (193, 421), (1025, 1201))


@pytest.fixture(scope="module")
def model():
    model = make_model(**SMALL)
    model.train()
    return model


def pack(rows, seed):
    """A batch of random tokens; `rows` lists (length of a document, padding behind it)."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), max(sum(n + hole for n, hole in row) for row in rows))
    document_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, (length, hole) in enumerate(row, 1):
            document_ids[r, at : at + length] = number
            position_ids[r, at : at + length] = np.arange(length)
            at += length + hole
    ids, labels = (rng.integers(1, SMALL["vocab_size"], shape) for _ in range(2))
    mask = (rng.random(shape) < 0.7) & (document_ids > 0)
    mask[0, 0] = True  # a loss needs one trained token
    return Batch(ids, labels, position_ids, document_ids, mask.astype(np.float32))


def apart(batch):
    """The documents of a batch, one by one, without padding."""
    for r in range(len(batch.input_ids)):
        for number in np.unique(batch.document_ids[r][batch.document_ids[r] > 0]):
            places = np.flatnonzero(batch.document_ids[r] == number)
            parts = (batch.input_ids, batch.labels, batch.position_ids)
            parts = [x[r, places][None] for x in parts]
            ones = np.ones_like(parts[0])
            yield Batch(*parts, ones, batch.loss_mask[r, places][None])


def loss_and_gradients(model, batches, count):
    """The mean loss of all `batches`, and its gradient by parameter."""
    loss = 0.0
    for batch in batches:
        if batch.loss_mask.any():
            mean = LOSS(model, batch).terms[0].sum / count
            mean.backward()
            loss += float(mean)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return loss, gradients


def random_rows(rng):
    """One or two rows of documents, mostly short; some have their probabilities kept in blocks,
    some are beyond that. Behind some there is padding."""
    kinds = rng.choice(3, (rng.integers(1, 3), rng.integers(1, 5)), p=[0.86, 0.1, 0.04])
    lengths = np.stack([rng.integers(*span, kinds.shape) for span in LENGTHS])
    chosen = np.take_along_axis(lengths, kinds[None], axis=0)[0]
    holes = rng.choice([0, 0, 1, 5], kinds.shape)
    return [list(zip(*row, strict=True)) for row in zip(chosen, holes, strict=True)]


def test_packed_equals_unpacked(model):
    drawn = []
    for seed in range(200):
        rows = random_rows(np.random.default_rng(seed))
        drawn += [n for row in rows for n, _ in row]
        batch = pack(rows, seed)
        count = float(batch.loss_mask.sum())
        loss, gradients = loss_and_gradients(model, [batch], count)
        other_loss, others = loss_and_gradients(model, list(apart(batch)), count)
        assert abs(loss - other_loss) <= 1e-5, f"packing {seed}"
        for name, gradient in gradients.items():
            message = f"packing {seed}, {name}"
            np.testing.assert_allclose(gradient, others[name], atol=1e-5, rtol=0, err_msg=message)
    assert all(sum(a <= n < b for n in drawn) > 15 for a, b in LENGTHS)


TRAIN_16K = """
import json
from tools.bench import long_context
import numpy as np
from ernie_train.data import Batch
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.train.supervised import PackedLoss

keys = json.loads({keys!r})
model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**keys))
places = np.arange(16384)[None]
ids = np.random.default_rng(0).integers(1, keys["vocab_size"], (1, 16384))
batch = Batch(ids, ids, places % 64, places // 64 + 1, np.ones((1, 16384), np.float32))
base = long_context.peak_kib()
PackedLoss("tokens")(model, batch).terms[0].sum.backward()
print((long_context.peak_kib() - base) / 1024)
"""


def test_no_tensor_of_tokens_by_vocabulary_exists():
    """One of 16K x 16K float32 numbers would take 1024 MiB; everything together stays below."""
    keys = {**SMALL, "vocab_size": 16384, "num_hidden_layers": 1, "moe_num_experts": 0}
    script = TRAIN_16K.format(keys=json.dumps(keys))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 50 < float(done.stdout) < 600


def options(**changes):
    given = {"preset": "tiny", "threads": 1, "recompute": False, **changes}
    return argparse.Namespace(**given)


def test_the_benchmark_measures_a_fresh_process():
    result = long_context.run(options(recompute=True), 300, 100)
    assert 0 < result["base"] < result["peak"]
    assert result["seconds"] > 0 and result["cpu_seconds"] > 0


def test_the_benchmark_prints_ratios(monkeypatch, capsys):
    def run(options, length, document):
        seconds = {"seconds": document / 2, "cpu_seconds": length * document / 2**18}
        return {"base": 100.0, "peak": 100 + length, **seconds}

    monkeypatch.setattr(long_context, "run", run)
    long_context.print_table(options(lengths=[512, 1024], packed=[2048, 64]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["512", "512", "612", "512", "256.00", "1.00"],
        ["1024", "1024", "1124", "1024", "2.00", "512.00", "4.00", "4.00"],
        ["2048", "64", "2148", "2048", "32.00", "0.50"],
    ]


@pytest.mark.slow
def test_one_document_of_16k_tokens_fits_and_memory_is_linear():
    short, long = (long_context.run(options(), n, n) for n in (4096, 16384))
    assert long["peak"] < 3 * 1024
    grown = (long["peak"] - long["base"]) / (short["peak"] - short["base"])
    assert grown < 4.5  # four times the tokens; with kept probabilities it would be 16 times
