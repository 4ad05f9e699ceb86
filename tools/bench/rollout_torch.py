"""The peer's side of `tools/bench/rollout.py`: `generate` of transformers on torch.

Run by the referee's python, it answers requests (see `protocol.py`) and is idle between them:

    {"build": {"directory": DIR, "attention": "sdpa", "experts": "grouped_mm", "cache": "static",
               "compile": false}}
    {"rollout": {"prompts": [[...], ...], "new_tokens": 64, "temperature": 1.0, "seed": 0}}
        -> {"seconds": 1.1, "cpu_seconds": 1.1, "ids": [[...], ...]}
    {"describe": {}} -> versions and the implementations that can be asked for

Under `torch.inference_mode`, in float32, without a stop token, and without scores: ours also
returns the logprobs of what it sampled.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an expert kernel of the hub is not this machine's

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tools.bench.protocol import serve
from tools.bench.train_torch import UNSUPPORTED, keep_freed_memory


class Peer:
    """A model under one combination of settings."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Loads what `request` (the value of "build", see the head of the file) describes."""
        if request["compile"] and shutil.which("g++") is None:
            raise RuntimeError("torch.compile needs a C++ compiler")
        self.model = AutoModelForCausalLM.from_pretrained(
            request["directory"],
            attn_implementation=request["attention"],
            experts_implementation=request["experts"],
            dtype=torch.float32,
        ).eval()
        if request["compile"]:
            self.model.forward = torch.compile(self.model.forward)
        # None is transformers' default, a cache that grows.
        self.cache = "static" if request["cache"] == "static" else None

    def rollout(self, request: dict[str, Any]) -> dict[str, Any]:
        """Times one batch of completions."""
        ids = torch.tensor(request["prompts"])
        sampling: dict[str, Any] = {"do_sample": request["temperature"] > 0}
        if sampling["do_sample"]:
            sampling |= {"temperature": request["temperature"], "top_k": 0, "top_p": 1.0}
        torch.manual_seed(request["seed"])
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["new_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=self.cache,
                disable_compile=True,  # what "compile" asks for is done once, in the constructor
                **sampling,
            )
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "ids": output[:, ids.shape[1] :].tolist(),
        }


def describe() -> dict[str, Any]:
    """Versions, threads and the implementations that `build` may ask for."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "attention": ["sdpa", "eager"],
        "experts": ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())],
        "cache": ["dynamic", "static"],
    }


def main() -> None:
    """Serves requests until standard input ends."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--keep-freed-memory", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        keep_freed_memory()
    built: list[Peer] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        built.clear()
        gc.collect()
        torch._dynamo.reset()
        built.append(Peer(request))
        return {}

    serve(
        {
            "describe": lambda _: describe(),
            "build": build,
            "rollout": lambda request: built[0].rollout(request),
        },
        UNSUPPORTED,
    )


if __name__ == "__main__":
    main()
