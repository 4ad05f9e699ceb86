"""Sweeps of two arms whose runs are never trained."""

import json
from typing import Any

from tools.evidence.sweep import Sweep

RECIPE = "recipes/balance.yaml"


def make_sweep(**changes: Any) -> Sweep:
    settings: dict[str, Any] = {
        "recipe": RECIPE, "seeds": [1, 2], "measure": {"name": "balance"}, "tables": [],
        "arms": {"quick": {"stages.sft.steps": 3}, "slow": {}}, **changes,
    }  # fmt: skip
    return Sweep.model_validate_json(json.dumps(settings))
