"""Convert a checkpoint's state to JSON values and arrays, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


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


def decode_tagged(value: dict[str, Any]) -> Any:
    """Decode an object of version 0.1.0, which wrote arrays and NaN as tagged objects."""
    kind = value.get("__ernie_train__")
    if kind is None:
        return value
    if kind == "float":
        return float(value["value"])
    if kind == "array":
        data = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["dtype"])
        return data.reshape(value["shape"]).copy()
    raise ValueError(f"unknown kind of value {kind!r}")


def read_metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return a manifest's metrics; NaN and infinities, which JSON lacks, are stored as text."""
    metrics = {
        name: decode_tagged(value) if isinstance(value, dict) else value
        for name, value in manifest["metrics"].items()
    }
    return {name: float(value) for name, value in metrics.items()}
