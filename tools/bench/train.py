"""Tokens per second of our training step beside that of transformers on torch.

    python -m tools.bench.train --threads 1 [--compile] [--profile]

Both train the same model (the peer makes it, we load it) on the same batches with the same
optimizer settings, in processes of their own that take turns; the losses must agree. First the
peer's implementations of attention and experts are tried, then its best combination and our step
are measured alternately. The rates are medians over the rounds, the ratio is ours / peer.

Other programs on the machine disturb both sides: close them, and look at the spread that is
printed. `cores` is processor time / wall time: well below the number of threads, the side did not
get its processors, and tokens per processor second (one thread) tell more than tokens per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.protocol import Side, serve

if TYPE_CHECKING:
    from ernie_train.data import Batch
    from ernie_train.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
MODEL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "rope_theta": 500000.0, "moe_num_experts": 16, "moe_intermediate_size": 128, "moe_k": 4,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 0, "tie_word_embeddings": True,
}  # fmt: skip
OPTIM = {
    "lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0,
}  # fmt: skip
WARM_UP_STEPS = 2
SCREENING_BATCH, GIVE_UP_FACTOR = [1, 128], 6
# Both sides add up in other orders, so their weights drift apart a little in every step.
FIRST_LOSS_TOLERANCE, LAST_LOSS_TOLERANCE = 1e-4, 1e-2


class Ours:
    """Our model and the toolkit's own training step, on the batches that the peer trains on."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Loads the model in `directory`; the other keys are those of the peer's `build`."""
        import numpy as np

        from ernie_train.train.optimizer import OptimConfig, Optimizer
        from ernie_train.train.supervised import PackedLoss
        from ernie_train.train.trainer import Trainer

        # The package's import sets the processor up, before Paddle is imported.
        from ernie_train.weights.hf import load_pretrained

        optim = dict(request["optim"])
        optim["clip_grad_norm"] = optim.pop("max_grad_norm")
        config = OptimConfig(schedule="constant", **optim)
        model = load_pretrained(request["directory"])
        model.train()
        self.trainer: Trainer[Any, Batch] = Trainer(model, Optimizer(model, config))
        self.loss_fn = PackedLoss("tokens")
        self.batch = request["batch"]
        self.vocab_size = model.config.vocab_size
        self.random = np.random.default_rng(request["seed"])

    def step(self) -> float:
        """One optimizer step over a fresh batch; returns its mean loss per token."""
        import numpy as np

        from ernie_train.data import Batch

        rows, length = self.batch
        ids = self.random.integers(1, self.vocab_size, (rows, length + 1))
        batch = Batch(
            input_ids=ids[:, :-1],
            labels=ids[:, 1:],
            position_ids=np.tile(np.arange(length), (rows, 1)),
            document_ids=np.ones((rows, length), np.int64),
            loss_mask=np.ones((rows, length), np.float32),
        )
        return self.trainer.train_step([batch], self.loss_fn, sys.maxsize).metrics["loss"]

    def steps(self, count: int) -> dict[str, Any]:
        """Times `count` steps, batches included."""
        start, cpu_start = time.perf_counter(), time.process_time()
        losses = [self.step() for _ in range(count)]
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "losses": losses,
        }


def serve_ours() -> None:
    """Our side: answers `build`, `describe` and `steps`."""
    built: list[Ours] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        built.append(Ours(request))
        return {}

    def describe(_: Any) -> dict[str, Any]:
        import paddle

        from ernie_train.core.cpu import cpu_setup_report

        return {"paddle": paddle.__version__, "set_up": cpu_setup_report()}

    handlers = {"build": build, "describe": describe, "steps": lambda n: built[0].steps(n)}
    serve(handlers, unsupported=())


def referee_python() -> Path:
    """The python that has torch and transformers: of ERNIE_TRAIN_REFEREE or .venv-referee."""
    home = os.environ.get("ERNIE_TRAIN_REFEREE") or ROOT / ".venv-referee"
    return Path(home) / "bin" / "python"


class Bench:
    """The driver."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.batch = [options.rows, options.length]
        self.request = {"model": MODEL, "batch": self.batch, "optim": OPTIM, "seed": 0}

    def rate(self, seconds: float, steps: int = 1) -> float:
        """Tokens per second."""
        return self.batch[0] * self.batch[1] * steps / seconds

    def peer(self, *flags: str) -> Side:
        threads = str(self.options.threads)
        return Side(
            [
                str(self.options.referee_python),
                "-m",
                "tools.bench.train_torch",
                "--threads",
                threads,
                *flags,
            ],
            {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def ours(self) -> Side:
        # As the toolkit sets itself up on a machine with that many cores: threads for matmul only.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": str(self.options.threads)}
        return Side([sys.executable, "-m", "tools.bench.train", "--serve-ours"], environment)

    def try_peer(self, side: Side, setting: dict[str, Any], best: float) -> float | None:
        """The peer's tokens per second under `setting`, by a few steps; None if it is no use."""
        label = f"  {describe_setting(setting):<58}"
        request = {**self.request, **setting, "save_to": None}
        if best and not setting["compile"]:
            # A small batch first: `batched_mm` gathers weights for every token and takes minutes.
            small = side.try_ask(build={**request, "batch": SCREENING_BATCH})
            steps = [small if "error" in small else side.try_ask(steps=1) for _ in range(2)]
            if all("error" not in step for step in steps):
                fewest_s = min(step["cpu_seconds"] for step in steps) / self.options.threads
                rate = SCREENING_BATCH[0] * SCREENING_BATCH[1] / fewest_s
                if rate < best / GIVE_UP_FACTOR:
                    print(f"{label} {rate:6.0f} tokens/s at {SCREENING_BATCH}, given up")
                    return None
        start = time.perf_counter()
        built = side.try_ask(build=request)
        first = built if "error" in built else side.try_ask(steps=WARM_UP_STEPS)
        if "error" in first:
            print(f"{label} not here: {first['error'][:150]}")
            return None
        warm_up_s = time.perf_counter() - start
        # A disturbed trial must not cost a setting the choice: the best step counts, and with one
        # thread its processor time, which other programs hardly change.
        clock = "cpu_seconds" if self.options.threads == 1 else "seconds"
        seconds = [side.ask(steps=1)[clock] for _ in range(self.options.trial_steps)]
        rate = self.rate(min(seconds))
        print(f"{label} {rate:6.0f} tokens/s (ready after {warm_up_s:.0f} s)", flush=True)
        return rate

    def best_peer_setting(self) -> dict[str, Any]:
        """Tries what the peer has and returns its fastest setting."""
        rates: list[tuple[float, dict[str, Any]]] = []

        def attempt(side: Side, **setting: Any) -> bool:
            known = any(setting["experts"] == other["experts"] for _, other in rates)
            to_beat = 0.0 if known else max((rate for rate, _ in rates), default=0.0)
            if (rate := self.try_peer(side, setting, to_beat)) is not None:
                rates.append((rate, setting))
            return rate is not None

        def fastest() -> dict[str, Any]:
            return max(rates, key=lambda pair: pair[0])[1]

        plain = {"compile": False, "keep_freed_memory": False}
        with self.peer() as side:
            about = side.ask(describe={})
            print("trying the peer:", {k: about[k] for k in ("torch", "transformers")})
            experts = about["experts"]
            for attention in about["attention"]:
                # What does not run under one attention does not run under the other either.
                experts = [
                    e for e in experts if attempt(side, attention=attention, experts=e, **plain)
                ]
            if self.options.compile:
                for name in experts:
                    attempt(side, **{**fastest(), "experts": name, "compile": True})
        with self.peer("--keep-freed-memory") as side:
            attempt(side, **{**fastest(), "keep_freed_memory": True})
        return fastest()

    def compare(self, setting: dict[str, Any], model_directory: str) -> float:
        """Measures both sides alternately, prints the table and returns the ratio."""
        flags = ["--keep-freed-memory"] if setting["keep_freed_memory"] else []
        with self.peer(*flags) as peer, self.ours() as ours:
            peer.ask(build={**self.request, **setting, "save_to": model_directory})
            ours.ask(build={**self.request, "directory": model_directory})
            sides = {"ours": ours, "peer": peer}
            losses = {name: side.ask(steps=WARM_UP_STEPS)["losses"] for name, side in sides.items()}
            check_losses(losses["ours"][0], losses["peer"][0], FIRST_LOSS_TOLERANCE)
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for turn in range(self.options.rounds):
                for name in list(sides)[:: 1 if turn % 2 else -1]:
                    measured[name].append(sides[name].ask(steps=self.options.steps))
            print("ours:", "; ".join(ours.ask(describe={})["set_up"]))
            if self.options.profile:
                print_profile(peer.ask(profile=3))
        last = {name: rounds[-1]["losses"][-1] for name, rounds in measured.items()}
        check_losses(last["ours"], last["peer"], LAST_LOSS_TOLERANCE)
        rates = {name: self.print_side(name, rounds) for name, rounds in measured.items()}
        print(f"same training: last losses {last['ours']:.5f} (ours), {last['peer']:.5f} (peer)")
        return rates["ours"] / rates["peer"]

    def print_side(self, name: str, rounds: list[dict[str, Any]]) -> float:
        """Prints median and spread of a side; returns the median of its tokens per second."""
        rates = [self.rate(r["seconds"], self.options.steps) for r in rounds]
        cpu_rates = [self.rate(r["cpu_seconds"], self.options.steps) for r in rounds]
        cores = statistics.median(r["cpu_seconds"] / r["seconds"] for r in rounds)
        median = statistics.median(rates)
        print(
            f"{name}: {median:6.0f} tokens/s, median of {len(rates)} rounds of "
            f"{self.options.steps} steps (from {min(rates):.0f} to {max(rates):.0f}); "
            f"cores {cores:.2f}, {statistics.median(cpu_rates):.0f} tokens per processor second"
        )
        return median

    def run(self) -> None:
        """Prints everything."""
        rows, length = self.batch
        print(f"model {MODEL}\noptimizer AdamW {OPTIM}")
        print(f"batch {rows} x {length} tokens, float32, {self.options.threads} thread(s)")
        setting = self.best_peer_setting()
        print("peer's best:", describe_setting(setting), "+ fused AdamW")
        with tempfile.TemporaryDirectory() as directory:
            ratio = self.compare(setting, directory)
        print(f"ratio ours / peer: {ratio:.3f} with {self.options.threads} thread(s)")


def describe_setting(setting: dict[str, Any]) -> str:
    extras = [word for word in ("compile", "keep_freed_memory") if setting[word]]
    names = [f"attention {setting['attention']}", f"experts {setting['experts']}", *extras]
    return ", ".join(names)


def check_losses(ours: float, peer: float, tolerance: float) -> None:
    """Raises `RuntimeError` if the sides do not train the same model on the same data."""
    if not abs(ours - peer) <= tolerance * abs(peer):
        raise RuntimeError(f"the sides train different things: loss {ours} (ours), {peer} (peer)")


def print_profile(profile: dict[str, dict[str, float]]) -> None:
    """Prints where the peer's step goes."""
    for title, values in profile.items():
        print(f"peer, {title} of a step (profiled, therefore slower):")
        for name, milliseconds in sorted(values.items(), key=lambda item: -item[1]):
            print(f"  {name:<60} {milliseconds:8.1f}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a side does in each round")
    parser.add_argument("--trial-steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="try torch.compile too (minutes)")
    parser.add_argument("--profile", action="store_true", help="show where the peer's step goes")
    parser.add_argument("--referee-python", type=Path, default=referee_python())
    parser.add_argument("--serve-ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_ours:
        serve_ours()
    elif not options.referee_python.exists():
        parser.error(f"no {options.referee_python}: make the referee environment (README)")
    else:
        Bench(options).run()


if __name__ == "__main__":
    main()
