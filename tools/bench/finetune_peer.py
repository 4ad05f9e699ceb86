"""The peer's side of `tools.evidence.own_model`: transformers on torch, and peft for LoRA.

Run by the referee's python, it answers requests (see `protocol.py`):

    {"build": {"model": DIR, "batches": FILE.npz, "adapter": DIR, "optim": {...}, "rates": [...]}}
        an `adapter` of PEFT's to train; null for the whole model
    {"work": {"steps": 5}} -> {"losses": [...], "seconds": 1.0, "cpu_seconds": 2.0}
    {"peak": {}}           -> {"gb": the most memory that was resident since `build`}
    {"logits": {"model": DIR, "adapter": DIR, "ids": [[...]], "ours": FILE.npy}}
        -> {"largest": 20.0, "difference": 1e-5, "merged": 1e-5} of logits, and after merging

A step is the usual one: fp32, sdpa, logits of all tokens, no cache, fused AdamW, clipping.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tools.bench.protocol import begin_peak, peak_gb, serve, timed


class FineTune:
    """A model, its optimizer and the batches of all steps."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.model = load(request["model"], request["adapter"], trains=True).train()
        self.batches = {k: torch.from_numpy(v) for k, v in np.load(request["batches"]).items()}
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.rates, self.optim, self.step = request["rates"], request["optim"], 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1]},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=(self.optim["beta1"], self.optim["beta2"]),
            eps=self.optim["eps"],
            weight_decay=self.optim["weight_decay"],
            fused=True,
        )
        begin_peak()

    def work(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the next `steps` optimizer steps; return their losses."""
        return {"losses": [self._step() for _ in range(request["steps"])]}

    def _step(self) -> float:
        batch = {name: array[self.step] for name, array in self.batches.items()}
        output = self.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=within_documents(batch["document_ids"]),
            use_cache=False,
        )
        losses = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        )
        mask = batch["loss_mask"].flatten()
        loss = (losses * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optim["clip_grad_norm"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()


def load(model: str, adapter: str | None, *, trains: bool) -> Any:
    """Return the model of a directory, with an adapter of PEFT's if there is one."""
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    if adapter is None:
        return base
    return PeftModel.from_pretrained(base, adapter, is_trainable=trains)


def within_documents(documents: torch.Tensor) -> torch.Tensor:
    """Return a mask [B,1,S,S]: a token attends to those of its document, up to itself."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


def compare_logits(request: dict[str, Any]) -> dict[str, Any]:
    """Compare the logits of an adapter on its base with ours, before and after merging."""
    ours, ids = np.load(request["ours"]), torch.tensor(request["ids"])
    model = load(request["model"], request["adapter"], trains=False).eval()
    with torch.no_grad():
        alone = model(input_ids=ids).logits.numpy()
        merged = model.merge_and_unload()(input_ids=ids).logits.numpy()
    return {
        "largest": float(np.abs(ours).max()),
        "difference": float(np.abs(ours - alone).max()),
        "merged": float(np.abs(ours - merged).max()),
    }


def main() -> None:
    """Serve requests until standard input ends."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(arguments.parse_args().threads)
    built: list[FineTune] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        built.append(FineTune(request))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions | {"peft": peft.__version__}}

    handlers = {
        "build": build,
        "work": lambda request: timed(lambda: built[0].work(request)),
        "peak": lambda _: {"gb": peak_gb()},
        "logits": compare_logits,
    }
    serve(handlers, unsupported=())


if __name__ == "__main__":
    main()
