"""The benchmarks run in small, and notice when the sides do different work."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from ernie_train.data import Batch
from tools.bench.protocol import (
    ROOT,
    Side,
    random_batch,
    random_documents,
    share_documents,
    split_rows,
)
from tools.bench.ranks import Ranks
from tools.bench.rollout import COMPARED_TOKENS, check_agreement
from tools.bench.scaling import check_losses as check_layout
from tools.bench.train import check_losses

TRAIN = ["train", "--rows", "2", "--length", "64", "--steps", "1"]
ROLLOUT = [
    "rollout",
    "--model",
    "tiny",
    "--batch",
    "4",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "16",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "workers", "agreement"),
    [
        (TRAIN, "1 thread", "same training: last losses"),
        ([*TRAIN, "--ranks=2"], "2 ranks of 1 thread", "same training: last losses"),
        (
            [*TRAIN, "--ranks=2", "--documents=20"],
            "2 ranks of 1 thread",
            "same training: last losses",
        ),
        (ROLLOUT, "1 thread", "greedy tokens agree in 100% of the completions"),
    ],
    ids=["train", "train-ranks", "train-ranks-documents", "rollout"],
)
def test_both_sides_do_the_same_work(
    arguments: list[str], workers: str, agreement: str, referee: object
) -> None:
    """`referee` only makes sure that the environment is there."""
    name, *sizes = arguments
    command = [sys.executable, "-m", f"tools.bench.{name}", *sizes, "--rounds=2", "--trials=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^peer's best: attention (sdpa|eager), experts \w+", done.stdout, re.M)
    assert agreement in done.stdout
    ratio = re.search(rf"^ratio ours / peer: (\d+\.\d+) with {workers}", done.stdout, re.M)
    assert ratio is not None and float(ratio[1]) > 0
    if "--ranks=2" in arguments:
        assert re.search(r"ranks 2 .* \d+ tokens/s", done.stdout)


def test_a_side_that_has_ended_says_how() -> None:
    """As one does whose environment lacks a package: before it reads what it is asked."""
    side = Side([sys.executable, "-c", "raise SystemExit(3)"], {})
    side.process.wait()
    with pytest.raises(RuntimeError, match="ended with 3; see its messages"), side:
        side.ask(describe={})


def serving(code: str) -> list[str]:
    """Return the command of a process that answers `work` by the expression `code` of `rank`."""
    program = "import os, time; from tools.bench.protocol import serve; rank = os.environ['RANK']\n"
    return [sys.executable, "-c", f"{program}serve({{'work': lambda _: {code}}}, (ValueError,))"]


RANKS = [{"RANK": "0"}, {"RANK": "1"}]


def test_ranks_answer_as_one() -> None:
    code = "{'seconds': 1.0 + int(rank), 'cpu_seconds': 0.5, 'losses': [int(rank)]}"
    with Ranks(serving(code), RANKS) as ranks:
        assert ranks.ask(work={}) == {"seconds": 2.0, "cpu_seconds": 1.0, "losses": [0]}
        assert [answer["losses"] for answer in ranks.ask_all(work={})] == [[0], [1]]


def test_an_error_of_any_rank_is_told() -> None:
    with Ranks(serving("{} if rank == '0' else int('x')"), RANKS) as ranks:
        assert "ValueError: invalid literal" in ranks.try_ask(work={})["error"]
        with pytest.raises(RuntimeError, match="invalid literal"):
            ranks.ask_all(work={})


def test_a_rank_that_ends_is_not_waited_for_by_the_others() -> None:
    began = time.monotonic()
    code = "time.sleep(600) if rank == '0' else os._exit(3)"
    with pytest.raises(RuntimeError, match="ended with 3"), Ranks(serving(code), RANKS) as ranks:
        ranks.ask(work={})
    assert time.monotonic() - began < 300


def test_what_a_library_prints_enters_no_answer() -> None:
    with Side(serving("{'said': os.write(1, b'!\\n') + len([print('?')])}"), RANKS[0]) as side:
        assert side.ask(work={}) == {"said": 3}


def test_documents_are_shared_by_length() -> None:
    lengths = [3, 9, 4, 2]
    assert share_documents(lengths, 1) == [[1, 2, 0, 3]]
    assert share_documents(lengths, 2) == [[1], [2, 0, 3]]
    assert share_documents([5], 2) == [[0], []]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_divide_what_one_would_train(ranks: int) -> None:
    whole = random_batch(np.random.default_rng(0), 50, 4, 6)
    parts = split_rows(random_batch(np.random.default_rng(0), 50, 4, 6), ranks)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(np.concatenate([vars(p)[name] for p in parts]), value)
    lengths = [3, 9, 4, 2, 7]
    packed = random_documents(np.random.default_rng(0), 50, lengths, ranks)
    (single,) = random_documents(np.random.default_rng(0), 50, lengths)
    assert len(packed) == ranks

    def trained(batches: list[Batch]) -> list[tuple[int, int]]:
        pairs = [np.stack([b.input_ids, b.labels])[:, b.loss_mask > 0].T for b in batches]
        return sorted((int(token), int(label)) for token, label in np.concatenate(pairs))

    assert trained(packed) == trained([single])
    assert len(trained(packed)) == sum(lengths) - len(lengths)


def test_different_training_is_an_error() -> None:
    check_losses(8.31801, 8.31802, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(8.32, 8.31, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(float("nan"), 8.31, 1e-4)


def test_different_completions_are_an_error() -> None:
    ours = [list(range(COMPARED_TOKENS + 5)) for _ in range(10)]
    late = [ids[:COMPARED_TOKENS] + [0] * 5 for ids in ours]
    assert check_agreement(ours, late) == 1.0
    early = [[99, *ids[1:]] for ids in ours]
    assert check_agreement(ours, ours[:9] + early[9:]) == 0.9
    with pytest.raises(RuntimeError, match="only 80%"):
        check_agreement(ours, ours[:8] + early[8:])
    with pytest.raises(RuntimeError, match="lengths"):
        check_agreement(ours, [ids[:-1] for ids in ours])


@pytest.mark.parametrize("losses", [[8.3, 8.1], [8.3, float("nan")], [float("nan"), 8.0]])
def test_layouts_must_have_the_same_losses(losses: list[float]) -> None:
    check_layout("two ranks", [8.3, 8.0001], [8.3, 8.0])
    with pytest.raises(SystemExit, match="two ranks: losses differ by"):
        check_layout("two ranks", losses, [8.3, 8.0])
