"""GPTQ: quantize a weight so that its outputs on given inputs change least (arXiv:2210.17323)."""

from __future__ import annotations

import numpy as np

from ernie_train.weights.quantize.scheme import QuantizationScheme, QuantizedTensor

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it; the paper's
_BLOCK = 128  # columns whose errors reach the rest together, where there are no groups


def gptq(
    weight: np.ndarray, factor: np.ndarray, scheme: QuantizationScheme, dtype: str
) -> QuantizedTensor:
    """Quantize a float32 weight W [out,in], column after column in the order that they have.

    The error of a column is made up for by the columns that are not rounded yet. What is made small
    is trace((W - Q) H (W - Q)^T). A group's scales are taken when its first column is reached;
    those of whole rows come from W. The weights of inputs that never occur are rounded to nearest.

    Args:
        weight: W.
        factor: `inverse_factor` of H [in,in], the sum of x x^T over inputs x.
        scheme: bits and groups.
        dtype: the stored dtype of the scales.
    """
    rest, grouped = weight.astype(np.float64), scheme.group_size is not None
    scales, codes = scheme.scales(weight, dtype), np.empty(weight.shape, np.int8)
    columns, width = weight.shape[1], scheme.group_size or _BLOCK
    for start in range(0, columns, width):
        end = min(start + width, columns)
        group = start // width if grouped else 0
        if grouped:
            scales[:, group] = scheme.scales(rest[:, start:end], dtype)[:, 0]
        scale = scales[:, group].astype(np.float64)
        errors = np.empty((len(rest), end - start))
        for at in range(start, end):
            codes[:, at] = scheme.encode(rest[:, at], scale)
            error = (rest[:, at] - codes[:, at] * scale) / factor[at, at]
            rest[:, at:end] -= np.outer(error, factor[at, at:end])
            errors[:, at - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return QuantizedTensor.of(codes, scales, dtype, scheme)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return the upper triangular U with U^T U = H^-1, of the damped Hessian [in,in].

    An input that never occurs gets the mean of the diagonal, and stands alone.
    """
    damped = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal[diagonal == 0] = diagonal.mean() or 1.0
    diagonal += DAMPING * diagonal.mean()
    # With the order reversed, J H J = L L^T: so H = V V^T with the upper triangular V = J L J, and
    # H^-1 = V^-T V^-1: U is V^-1.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.linalg.inv(lower[::-1, ::-1])
