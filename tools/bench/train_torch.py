"""The peer's side of `tools/bench/train.py`: transformers on torch, one training step at a time.

Run by the referee's python, it answers requests (see `protocol.py`) and is idle between them:

    {"build": {"model": {...}, "batch": [4, 512], "attention": "sdpa", "experts": "grouped_mm",
               "compile": false, "optim": {...}, "seed": 0, "save_to": "DIR" or null}}
    {"steps": 5}     -> {"seconds": 1.9, "cpu_seconds": 1.9, "losses": [...]}
    {"profile": 3}   -> {"parts_ms": {"forward attention": 91.0, ...}, "operators_ms": {...}}
    {"describe": {}} -> versions, threads, the implementations that can be asked for

The step is the usual one at its fastest: fp32, no gradient checkpointing, no cache, the loss over
all tokens, `zero_grad(set_to_none=True)`, gradient clipping, fused AdamW.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import time
from collections import defaultdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an expert kernel of the hub is not this machine's

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_moe import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from tools.bench.protocol import serve

# What a combination that does not run here may raise: no kernel, no memory, no compiler.
UNSUPPORTED = (RuntimeError, ValueError, ImportError, KeyError, OSError, NotImplementedError)


class Peer:
    """A model, its optimizer and an endless supply of random batches."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Builds what `request` (the value of "build", see the head of the file) describes."""
        if request["compile"] and shutil.which("g++") is None:
            raise RuntimeError("torch.compile needs a C++ compiler")
        torch.manual_seed(request["seed"])
        config = Ernie4_5_MoeConfig(**request["model"], use_cache=False)
        config._attn_implementation = request["attention"]
        config._experts_implementation = request["experts"]
        self.model = Ernie4_5_MoeForCausalLM(config).float().train()
        if request["save_to"]:
            self.model.save_pretrained(request["save_to"])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = request["optim"]
        self.max_grad_norm = optim["max_grad_norm"]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1]},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=optim["lr"],
            betas=(optim["beta1"], optim["beta2"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            fused=True,
        )
        self.batch = request["batch"]
        self.vocab_size = request["model"]["vocab_size"]
        self.random = np.random.default_rng(request["seed"])
        self.forward = torch.compile(self.model) if request["compile"] else self.model

    def step(self) -> float:
        """One optimizer step over a fresh batch; returns its mean loss per token."""
        rows, length = self.batch
        ids = torch.from_numpy(self.random.integers(1, self.vocab_size, (rows, length + 1)))
        logits = self.forward(input_ids=ids[:, :-1]).logits
        with record_function("part:forward loss"):
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        with record_function("part:backward"):
            loss.backward()
        with record_function("part:optimizer"):
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def steps(self, count: int) -> dict[str, Any]:
        """Times `count` steps, batches included."""
        start, cpu_start = time.perf_counter(), time.process_time()
        losses = [self.step() for _ in range(count)]
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "losses": losses,
        }

    def profile(self, count: int) -> dict[str, Any]:
        """Milliseconds of a step by part (those of a module are inclusive) and by operator."""
        hooks = [
            hook
            for name, module in self.model.named_modules()
            if (part := part_of(name)) is not None
            for hook in mark(module, part)
        ]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.steps(count)
        for hook in hooks:
            hook.remove()
        parts: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            if event.name.startswith("part:"):
                parts[event.name.removeprefix("part:")] += event.cpu_time_total / count / 1e3
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
        operators = [row for row in rows if row.key.startswith("aten::")][:25]
        return {
            "parts_ms": {name: round(ms, 1) for name, ms in sorted(parts.items())},
            "operators_ms": {
                row.key: round(row.self_cpu_time_total / count / 1e3, 1) for row in operators
            },
        }


def part_of(name: str) -> str | None:
    """The part of the step that the module `name` is counted as; None: not marked."""
    suffixes = {
        "self_attn": "attention",
        "mlp.experts": "experts",
        "mlp.gate": "router",
        "mlp.shared_experts": "shared experts",
        "mlp": "mlp with router and experts",
        "lm_head": "head",
        "input_layernorm": "norms",
        "post_attention_layernorm": "norms",
    }
    return next((part for suffix, part in suffixes.items() if name.endswith(suffix)), None)


def mark(module: torch.nn.Module, part: str) -> list[Any]:
    """Puts the module's forward pass, and its backward pass if it can be told, into scopes."""
    scopes: dict[str, Any] = {}

    def enter(direction: str) -> Any:
        def hook(*_: Any) -> None:
            scopes[direction] = record_function(f"part:{direction} {part}")
            scopes[direction].__enter__()

        return hook

    def leave(direction: str) -> Any:
        def hook(*_: Any) -> None:
            if direction in scopes:
                scopes.pop(direction).__exit__(None, None, None)

        return hook

    hooks = [
        module.register_forward_pre_hook(enter("forward")),
        module.register_forward_hook(leave("forward")),
    ]
    if part != "attention":  # called with keywords, which backward hooks do not see
        hooks += [
            module.register_full_backward_pre_hook(enter("backward")),
            module.register_full_backward_hook(leave("backward")),
        ]
    return hooks


def describe() -> dict[str, Any]:
    """Versions, threads and the implementations that `build` may ask for."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "attention": ["sdpa", "eager"],
        "experts": ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())],
        "compiler": shutil.which("g++") is not None,
    }


def keep_freed_memory() -> None:
    """Has glibc reuse freed memory instead of returning it, as `ernie_train.core.cpu` does."""
    trim_threshold, mmap_threshold, size_bytes = -1, -3, 1 << 30
    mallopt = ctypes.CDLL(None).mallopt
    for parameter in (mmap_threshold, trim_threshold):
        if mallopt(parameter, size_bytes) != 1:
            raise RuntimeError("glibc's mallopt refused")


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
            "steps": lambda count: built[0].steps(count),
            "profile": lambda count: built[0].profile(count),
        },
        UNSUPPORTED,
    )


if __name__ == "__main__":
    main()
