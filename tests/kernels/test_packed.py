"""Products with packed weights: right, and the same bits for a row whatever comes with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie_train.kernels import loading, packed
from ernie_train.kernels.packed import PackedWeight, packs
from ernie_train.model.numpy_layers import ColumnBlocks, NumpyLinear

needs_packing = pytest.mark.skipif(not packs(512), reason="MKL packs no weights on this processor")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@needs_packing
@pytest.mark.parametrize("rows", [0, 1, 7, 32, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_float64(rows: int, transposed: bool) -> None:
    x, weight = normal(rows, 520), normal(520, 70)
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    given = np.ascontiguousarray(weight.T).T if transposed else weight
    product = PackedWeight(given)
    given[:] = 0.0  # it is copied
    np.testing.assert_allclose(product(x), expected, atol=1e-4)
    columns = np.asfortranarray(x)
    np.testing.assert_array_equal(product(columns), product(x))


@needs_packing
def test_the_bits_of_a_row_depend_on_no_other_row_and_on_no_address() -> None:
    """So a batch may shrink or be divided, and a run goes on as it would have."""
    x, product = normal(64, 576), PackedWeight(normal(576, 200))
    whole = product(x)
    for rows in (1, 2, 31, 33):
        np.testing.assert_array_equal(product(x[:rows]), whole[:rows])
    for shift in (1, 3, 8):
        held = np.empty(x.size + shift, np.float32)
        moved = held[shift:].reshape(x.shape)
        moved[:] = x
        np.testing.assert_array_equal(product(moved), whole)


@needs_packing
def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 3 numbers for a weight of 520 inputs"):
        PackedWeight(normal(520, 8))(normal(2, 3))


@pytest.mark.parametrize(("kernels", "vendor"), [("plain", "GenuineIntel"), ("native", "Other")])
def test_only_where_it_was_measured_and_not_when_switched_off(
    kernels: str, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(loading.KERNELS, kernels)
    processor = replace(packed.blas.read_processor(), vendor=vendor)
    monkeypatch.setattr(packed.blas, "read_processor", lambda: processor)
    packed._library.cache_clear()
    try:
        assert not packs(4096)
        with pytest.raises(RuntimeError, match="no MKL that packs"):
            PackedWeight(normal(520, 8))
        with packed.one_mkl_thread():
            pass
    finally:
        packed._library.cache_clear()


def test_small_weights_stay_as_they_are() -> None:
    """Those of the small presets, whose bits the golden curves hold."""
    assert not packs(511)


@needs_packing
@pytest.mark.parametrize(("inputs", "kind"), [(520, PackedWeight), (40, ColumnBlocks)])
def test_the_decoder_packs_large_weights_alone(inputs: int, kind: type) -> None:
    linear = NumpyLinear(normal(inputs, 8), None)
    assert isinstance(linear.product, kind)
    x = normal(3, inputs)
    np.testing.assert_allclose(linear(x), x.astype(np.float64) @ normal(inputs, 8), atol=1e-4)
