"""Convert a checkpoint's state to JSON values and arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ernie_train.core.errors import CheckpointError


def split_state(
    state: Mapping[str, Any], path: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split nested dicts into plain JSON values and the arrays, which get names like "a/b"."""
    plain: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f"{key!r} cannot be a key of a checkpoint's state")
        if isinstance(value, np.ndarray):
            arrays[path + key] = value
        elif isinstance(value, Mapping):
            plain[key], nested = split_state(value, f"{path}{key}/")
            arrays |= nested
        else:
            plain[key] = value
    return plain, arrays


def merge_state(plain: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Insert the arrays into the nested dicts again: undo `split_state`."""
    for name, array in arrays.items():
        *parents, key = name.split("/")
        place = plain
        for parent in parents:
            place = place[parent]
        place[key] = array
    return plain


def read_metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return a manifest's metrics; NaN and infinities, which JSON lacks, are stored as text."""
    try:
        return {name: float(value) for name, value in manifest["metrics"].items()}
    except TypeError:
        raise CheckpointError("its metrics are as ernie_train 0.1 wrote them: use that") from None
