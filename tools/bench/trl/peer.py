"""TRL's side of `rl.py` and `sft.py`: one whole run of its trainer, by the referee's python.

    python -m tools.bench.trl.peer REQUEST.json

The request names `model` (a directory), `rows` (a file of JSON lines), `out` (a directory) and the
settings below. A JSON line an iteration or step goes to `out`/progress.jsonl, with its seconds and
where they went. Gradient checkpointing, evaluation, checkpoints, reports and processes that load
data are off; the optimizer is torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tools.bench.peer import keep_freed_memory
from tools.bench.trl.reward import score
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Request = dict[str, Any]


class Clock:
    """Seconds of named phases since the last line of progress, and the lines."""

    def __init__(self, path: Path) -> None:
        self.phases: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._last = time.perf_counter()
        self._file = path.open("w")

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.add(phase, time.perf_counter() - started)
            return result

        return call

    def add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def restart(self) -> None:
        self._last = time.perf_counter()

    def write(self) -> None:
        now = time.perf_counter()
        line = {"seconds": now - self._last, "phases": self.phases, **self.facts}
        print(json.dumps(line), file=self._file, flush=True)
        self.phases, self.facts, self._last = {}, {}, now


class Progress(TrainerCallback):
    """Writes a line every so many optimizer steps."""

    def __init__(self, clock: Clock, every: int) -> None:
        self.clock, self.every = clock, every

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.restart()

    def on_log(self, _: Any, state: Any, *__: Any, logs: dict[str, Any], **___: Any) -> None:
        self.clock.facts.setdefault("losses", []).append(logs.get("loss"))
        if state.global_step % self.every == 0 and "loss" in logs:
            self.clock.write()


def common(request: Request) -> dict[str, Any]:
    """Return the settings that both trainers have."""
    optim = request["optim"]
    return {
        "output_dir": request["out"], "use_cpu": True, "bf16": False, "fp16": False,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_num_workers": 0,
        "optim": "adamw_torch_fused", "lr_scheduler_type": "constant",
        "learning_rate": optim["lr"], "weight_decay": optim["weight_decay"],
        "adam_beta1": optim["beta1"], "adam_beta2": optim["beta2"],
        "adam_epsilon": optim["eps"], "max_grad_norm": optim["clip_grad_norm"], "seed": 1,
    }  # fmt: skip


def load(directory: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, tokenizer, and settings that a mixture of experts alone takes."""
    is_moe = hasattr(AutoConfig.from_pretrained(directory), "moe_num_experts")
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa",
        **({"experts_implementation": "grouped_mm"} if is_moe else {}),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, {"router_aux_loss_coef": 0.0} if is_moe else {}


def run_sft(request: Request, clock: Clock) -> None:
    """Train on all rows in every step, packed or padded in batches."""
    model, tokenizer, extra = load(request["model"])
    rows = [json.loads(line) for line in Path(request["rows"]).read_text().splitlines()]
    config = SFTConfig(
        **common(request),
        **extra,
        max_steps=request["steps"],
        packing=request["packing"],
        max_length=request["seq_len"],
        per_device_train_batch_size=1 if request["packing"] else request["batch"],
        # More than there are: a step ends with the epoch, as the Trainer's last step does.
        gradient_accumulation_steps=len(rows),
        # Rows of similar length share a batch, so that little is padding.
        train_sampling_strategy="random" if request["packing"] else "group_by_length",
    )
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Progress(clock, 1)],
    )
    trainer.compute_loss = clock.timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    trainer.train()


def run_grpo(request: Request, clock: Clock) -> None:
    """Run iterations of GRPO: one generation, then `updates` optimizer steps on it."""
    model, tokenizer, extra = load(request["model"])
    rows = [json.loads(line) for line in Path(request["rows"]).read_text().splitlines()]
    sequences, batch, updates = (
        len(rows) * request["group_size"],
        request["batch"],
        request["updates"],
    )
    config = GRPOConfig(
        **common(request),
        **extra,
        max_steps=request["steps"] * updates,
        num_generations=request["group_size"],
        max_completion_length=request["new_tokens"],
        temperature=request["temperature"],
        top_p=1.0,
        top_k=0,
        per_device_train_batch_size=batch,
        steps_per_generation=sequences // batch,
        gradient_accumulation_steps=sequences // batch // updates,
        num_iterations=1,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        cache_implementation=request["cache"],
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        # The text as written: TRL's `completions` are what the tokenizer's schema reads in it.
        return [score({}, text) for text in tokenizer.batch_decode(completion_ids)]

    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Progress(clock, updates)],
    )
    _watch(trainer, clock)
    trainer.train()


def _watch(trainer: Any, clock: Clock) -> None:
    """Time the parts of an iteration, and note what was sampled."""
    generate, rewards = trainer._generate_single_turn, trainer._calculate_rewards
    logprobs = trainer._get_per_token_logps_and_entropies

    def noted(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completion_ids, other = generate(prompt_ids, *args, **kwargs)
        clock.facts["prompt_tokens"] = sum(map(len, prompt_ids))
        clock.facts["completion_tokens"] = sum(map(len, completion_ids))
        return completion_ids, other

    def scored(*args: Any, **kwargs: Any) -> Any:
        found = rewards(*args, **kwargs)
        groups = found.reshape(-1, trainer.num_generations)
        clock.facts["reward"] = float(found.mean())
        clock.facts["reward_std"] = float(groups.std(1, correction=0).mean())
        return found

    def old_logprobs(*args: Any, **kwargs: Any) -> Any:
        # Within the update the same function runs with gradients.
        call = logprobs if torch.is_grad_enabled() else clock.timed("logprobs", logprobs)
        return call(*args, **kwargs)

    trainer._generate_single_turn = clock.timed("sampling", noted)
    trainer._calculate_rewards = clock.timed("scoring", scored)
    trainer._get_per_token_logps_and_entropies = old_logprobs


def main() -> None:
    """Run the request."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("request", type=Path)
    request = json.loads(parser.parse_args().request.read_text())
    if request["keep_freed_memory"]:
        keep_freed_memory()
    torch.set_num_threads(request["threads"])
    disable_progress_bars()
    sys.stdout = sys.stderr
    clock = Clock(Path(request["out"]) / "progress.jsonl")
    (run_grpo if request["kind"] == "rl" else run_sft)(request, clock)


if __name__ == "__main__":
    main()
