"""Loads adapters with peft onto base models and writes what they compute; trains one of them.

    peft_lora.py WORK_DIR

WORK_DIR/cases.json lists for each case its directory, which holds `base` and `adapter`, and
`inputs.npz` with input_ids [B,S]. It leaves logits.npz there with `logits` [B,S,V], and `merged`,
those after `merge_and_unload`. A case with `steps` trains as well: see `train`. A case with `make`,
arguments of peft's LoraConfig, gets its `adapter` from peft, of random numbers. A case without
`adapter` trains and computes with the base itself.

Any warning of peft's about keys that are missing or left over is an error.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def train(model: torch.nn.Module, ids: torch.Tensor, settings: dict[str, Any]) -> list[float]:
    """Returns the loss of each step of AdamW on batches [steps,B,S]; mean over all next tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95), eps=1e-8)
    model.train()
    losses = []
    for batch in ids:
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_adapter(base: Path, directory: Path, settings: dict[str, Any]) -> None:
    """Saves an adapter of random numbers as peft does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            parameter.data = 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)


def main() -> None:
    """Runs every case of the work directory."""
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    for case in json.loads((work / "cases.json").read_text()):
        directory = work / case["name"]
        inputs = {k: torch.from_numpy(v) for k, v in np.load(directory / "inputs.npz").items()}
        if "make" in case:
            make_adapter(directory / "base", directory / "adapter", case["make"])
        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
        model = base
        if (directory / "adapter").is_dir():
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*adapter keys.*")
                warnings.filterwarnings("error", message=".*nexpected key.*")
                model = PeftModel.from_pretrained(
                    base, directory / "adapter", is_trainable="steps" in case
                )
        result: dict[str, Any] = {}
        if "steps" in case:
            result["losses"] = train(model, inputs["batches"], case["steps"])
        model.eval()
        with torch.no_grad():
            result["logits"] = model(input_ids=inputs["input_ids"]).logits.numpy()
            if model is not base:
                merged = model.merge_and_unload()
                result["merged"] = merged(input_ids=inputs["input_ids"]).logits.numpy()
        np.savez(directory / "logits.npz", **result)


if __name__ == "__main__":
    main()
