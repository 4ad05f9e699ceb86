"""The peer's side of `train.py` and `rollout.py`: transformers on torch.

Run by the referee's python, it answers requests (see `protocol.py`) and is idle between them:

    {"build": {"directory": DIR, "attention": "sdpa", "experts": "grouped_mm", "compile": false,
               "cache": "static", "optim": {...}, "seed": 0}}       `cache` for rollouts, or `optim`
    {"work": {"batch": [4, 512], "steps": 2}}             -> {"losses": [...], ...}
    {"work": {"prompts": [[...], ...], "new_tokens": 64, "temperature": 1.0, "seed": 0}}
                                                          -> {"ids": [[...], ...], ...}
    {"describe": {}} -> versions, and the implementations that can be asked for

Answers to `work` have `seconds` and `cpu_seconds`. A training step is the usual one at its fastest:
fp32, no gradient checkpointing, no cache, the loss over all tokens, `zero_grad(set_to_none=True)`,
gradient clipping, fused AdamW. Rollouts run under `torch.inference_mode`, without a stop token and
without scores: ours also returns the logprobs of what it sampled.

With WORLD_SIZE and the other variables of torchrun it is one of several ranks, which divide each
batch of training and average gradients by DistributedDataParallel over gloo.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an expert kernel of the hub is not this machine's

import numpy as np
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tools.bench.protocol import serve, share_documents, timed

RANKS, RANK = (int(os.environ.get(name, only)) for name, only in (("WORLD_SIZE", 1), ("RANK", 0)))

# What a combination that does not run here may raise: no kernel, no memory, no compiler.
UNSUPPORTED = (RuntimeError, ValueError, ImportError, KeyError, OSError, NotImplementedError)


def load(request: dict[str, Any]) -> Any:
    """Return the model in `directory`, under the settings of `request`."""
    if request["compile"] and shutil.which("g++") is None:
        raise RuntimeError("torch.compile needs a C++ compiler")
    return AutoModelForCausalLM.from_pretrained(
        request["directory"],
        attn_implementation=request["attention"],
        dtype=torch.float32,
        **({"experts_implementation": request["experts"]} if "experts" in request else {}),
    )


class TrainingPeer:
    """A model, its optimizer and an endless supply of random batches."""

    def __init__(self, request: dict[str, Any]) -> None:
        model = load(request).train()
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):  # gets no gradient, and DDP waits for one
                parameter.requires_grad = False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
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
        self.vocab_size = model.config.vocab_size
        self.random = np.random.default_rng(request["seed"])
        self.module = model
        if RANKS > 1:
            self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.forward = torch.compile(self.module) if request["compile"] else self.module
        self.padded_documents = request.get("padded_documents", 0)  # that share a batch

    def work(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run `steps` optimizer steps on fresh batches; return their mean losses per token."""
        return {"losses": [self._step(request) for _ in range(request["steps"])]}

    def _step(self, request: dict[str, Any]) -> float:
        if lengths := request.get("documents"):
            loss = self._documents(lengths)
        else:
            loss = self._rows(*request["batch"])
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _rows(self, rows: int, length: int) -> float:
        """Run both passes over rows without padding; return the mean loss."""
        ids = torch.from_numpy(self.random.integers(1, self.vocab_size, (rows, length + 1)))
        own = ids.chunk(RANKS)[RANK]
        logits = self.forward(input_ids=own[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
        loss.backward()
        return mean_over_ranks(loss.item())

    def _documents(self, lengths: list[int]) -> float:
        """Run both passes over documents, those of similar length padded in one batch."""
        documents = [torch.from_numpy(self.random.integers(1, self.vocab_size, n)) for n in lengths]
        own = [documents[at] for at in share_documents(lengths, RANKS)[RANK]]
        own.sort(key=len)
        own = own or [documents[0][:1]]  # nothing to predict in it, for a rank has to take part
        # Gradients of the ranks are averaged, so the sum of a rank counts as many times.
        count, total, size = (sum(lengths) - len(lengths)) / RANKS, 0.0, self.padded_documents
        for first in range(0, len(own), size):
            members = own[first : first + size]
            ids = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-100)
            mask = (labels >= 0).long()
            last = first + size >= len(own)
            with nullcontext() if RANKS == 1 or last else self.module.no_sync():
                logits = self.forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                )
                (loss / count).backward()
            total += loss.item()
        return mean_over_ranks(total / count)


def mean_over_ranks(value: float) -> float:
    """Return the mean of a number that every rank has."""
    if RANKS == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(held)
    return held.item() / RANKS


class RolloutPeer:
    """A model that completes prompts."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.model = load(request).eval()
        if request["compile"]:
            self.model.forward = torch.compile(self.model.forward)
        # None is transformers' default, a cache that grows.
        self.cache = "static" if request["cache"] == "static" else None

    def work(self, request: dict[str, Any]) -> dict[str, Any]:
        """Complete a batch of prompts; return the new ids."""
        ids = torch.tensor(request["prompts"])
        sampling: dict[str, Any] = {"do_sample": request["temperature"] > 0}
        if sampling["do_sample"]:
            sampling |= {"temperature": request["temperature"], "top_k": 0, "top_p": 1.0}
        torch.manual_seed(request["seed"])
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["new_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=self.cache,
                disable_compile=True,  # `compile` does it once, in the constructor
                **sampling,
            )
        return {"ids": output[:, ids.shape[1] :].tolist()}


def describe() -> dict[str, Any]:
    """Return versions and the implementations that `build` may ask for."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": ["sdpa", "eager"],
        "experts": ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())],
        "cache": ["dynamic", "static"],
        "padded_documents": [8, 4, 16, 64],
    }


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it, as `ernie_train.core.cpu` does."""
    trim_threshold, mmap_threshold, size_bytes = -1, -3, 1 << 30
    mallopt = ctypes.CDLL(None).mallopt
    for parameter in (mmap_threshold, trim_threshold):
        if mallopt(parameter, size_bytes) != 1:
            raise RuntimeError("glibc's mallopt refused")


def main() -> None:
    """Serve requests until standard input ends."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--keep-freed-memory", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
    if options.keep_freed_memory:
        keep_freed_memory()
    built: list[TrainingPeer | RolloutPeer] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        built.clear()
        gc.collect()
        torch._dynamo.reset()
        built.append(TrainingPeer(request) if "optim" in request else RolloutPeer(request))
        return {}

    def work(request: dict[str, Any]) -> dict[str, Any]:
        return timed(lambda: built[0].work(request))

    serve({"describe": lambda _: describe(), "build": build, "work": work}, UNSUPPORTED)


if __name__ == "__main__":
    main()
