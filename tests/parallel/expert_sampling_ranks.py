"""On every rank of an expert group: groups of prompts are sampled in a few lanes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle

import ernie_train  # noqa: F401
from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.generate.sharded import generate_sharded
from tests.small_models import make_config


def sampled() -> dict[str, np.ndarray]:
    """All that is recorded of completions of very different lengths."""
    paddle.seed(4)
    model = parallel.new_model(make_config(initializer_range=0.2), "float32")
    rng = np.random.default_rng(0)
    prompts = [p for n in (2, 5, 20, 9, 3) for p in [rng.integers(8, 96, n).tolist()] * 4]
    limits = [40 if i % 7 == 3 else 3 + i % 5 for i in range(20)]
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    found = generate_sharded(
        model, prompts, limits=limits, batch_size=3, eos_token_id=[5, 6], record_experts=True,
        record_prompt_experts=True, stop_requested=lambda: False, **settings,
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    for i, completion in enumerate(found):
        assert completion.expert_ids is not None and completion.prompt_expert_ids is not None
        arrays[f"{i} ids"] = np.array(completion.ids)
        arrays[f"{i} experts"] = np.sort(completion.expert_ids)
        arrays[f"{i} prompt"] = np.sort(completion.prompt_expert_ids)
    return arrays


if __name__ == "__main__":
    process_group.set_grid(Grid(expert=process_group.world_size()))
    np.savez(Path(sys.argv[1]) / f"{process_group.rank()}.npz", **sampled())
