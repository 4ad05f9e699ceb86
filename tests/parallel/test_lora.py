"""LoRA over ranks: pairs of routed experts lie with their experts, and train as on one rank."""

from pathlib import Path

import numpy as np
import pytest

from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.io.safetensors import TensorFiles
from ernie_train.weights import load_pretrained, save_pretrained
from tests.parallel.lora_ranks import train
from tests.parallel.ranks import start_on_ranks
from tests.small_models import make_model

CASES = ["lora:2,1,0", "lora:2,1,1", "lora:1,2,1", "dora:2,1,0", "dora:2,1,1", "dora:1,2,1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    save_pretrained(make_model(tie_word_embeddings=False), out / "base")
    for method in ("lora", "dora"):
        train(out / "base", out / method, Grid(), dora=method == "dora")
    process_group.set_grid(Grid())
    start_on_ranks(2, "lora_ranks.py", out / "base", out, *CASES, timeout_s=300)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stem", ["adapter_model", "model", "optimizer"])
def test_ranks_save_what_one_rank_does(found: Path, case: str, stem: str) -> None:
    names = case.partition(":")[0], case
    one, ranks = (TensorFiles(found / name / "step_000002", stem) for name in names)
    assert set(ranks) == set(one)
    for name in one:
        scale = max(np.abs(one[name]).max(), 1e-6)
        # Adam divides by the root of a square: of a gradient near 0 little is left but rounding.
        tolerance = 2e-3 if stem != "optimizer" else 1e-4
        np.testing.assert_allclose(
            ranks[name] / scale, one[name] / scale, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_ranks_write_the_merged_model_bit_for_bit(found: Path, case: str, tmp_path: Path) -> None:
    """As one process reads and writes their checkpoint; an engine is given these files."""
    save_pretrained(load_pretrained(found / case / "step_000002"), tmp_path / "merged")
    expected, written = TensorFiles(tmp_path / "merged"), TensorFiles(found / case / "merged")
    assert set(written) == set(expected)
    for name in expected:
        assert written[name].tobytes() == expected[name].tobytes(), name
