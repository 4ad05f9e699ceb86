"""Tokens per second of our `generate` beside that of transformers on torch.

    python -m tools.bench.rollout --threads 1 [--model tiny] [--temperature 0] [--compile]

Two models: the preset `tiny` and that of `train.py`. Both sides complete the same random
prompts with the same exported weights, all to the same length, in processes of their own that take
turns. First the peer's implementations of attention, experts and cache are tried, then its best
combination and ours are measured alternately. The rates are medians over the rounds, the ratio is
ours / peer; greedy completions must agree. Ours returns the logprobs of what it sampled, the peer
is spared them.

`cores` is processor time, that of forked processes too, / wall time: well below the number of
threads, other programs disturbed; with one thread the tokens per processor second then tell more
than tokens per second.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.protocol import Side, serve
from tools.bench.train import MODEL, referee_python

if TYPE_CHECKING:
    from ernie_train.model import Ernie4_5_MoeForCausalLM

MODELS = ("tiny", "bench_train")
TRIAL_TOKENS, GIVE_UP_FACTOR = 16, 4
# Sums in another order turn a choice between equals around; from there on a completion differs.
COMPARED_TOKENS, LEAST_AGREEMENT = 8, 0.9


def processor_seconds() -> float:
    """Of this process and of those that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def serve_ours() -> None:
    """Our side: answers `build`, `describe` and `rollout`."""
    built: list[Ernie4_5_MoeForCausalLM] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        """Makes the model `model` (of `MODELS`), random, and saves it in `directory`."""
        # The package's import sets the processor up, before Paddle is imported.
        from ernie_train.core.devices import seed_everything
        from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
        from ernie_train.weights.hf import load_pretrained, save_pretrained

        seed_everything(0)
        tiny = request["model"] == "tiny"
        config = Ernie4_5_MoeConfig.preset("tiny") if tiny else Ernie4_5_MoeConfig(**MODEL)
        save_pretrained(Ernie4_5_MoeForCausalLM(config), request["directory"])
        built.append(load_pretrained(request["directory"]))
        return {"vocab_size": config.vocab_size}

    def describe(_: Any) -> dict[str, Any]:
        import paddle

        from ernie_train.core.cpu import cpu_setup_report

        return {"paddle": paddle.__version__, "set_up": cpu_setup_report()}

    def rollout(request: dict[str, Any]) -> dict[str, Any]:
        from ernie_train.generate.engine import generate

        start, cpu_start = time.perf_counter(), processor_seconds()
        completions = generate(
            built[0],
            request["prompts"],
            max_new_tokens=request["new_tokens"],
            temperature=request["temperature"],
            seed=request["seed"],
        )
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": processor_seconds() - cpu_start,
            "ids": [completion.ids for completion in completions],
        }

    serve({"build": build, "describe": describe, "rollout": rollout}, unsupported=())


class Bench:
    """The driver for one model."""

    def __init__(self, options: argparse.Namespace, model: str, directory: str) -> None:
        self.options = options
        self.model = model
        self.directory = directory
        self.threads = str(options.threads)

    def peer(self, *flags: str) -> Side:
        return Side(
            [
                str(self.options.referee_python),
                "-m",
                "tools.bench.rollout_torch",
                "--threads",
                self.threads,
                *flags,
            ],
            {"OMP_NUM_THREADS": self.threads, "MKL_NUM_THREADS": self.threads},
        )

    def ours(self) -> Side:
        # As the toolkit sets itself up on a machine with that many cores: threads for matmul, and
        # as many processes that sample.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": self.threads}
        return Side([sys.executable, "-m", "tools.bench.rollout", "--serve-ours"], environment)

    def request(self, vocab_size: int, seed: int, **changes: Any) -> dict[str, Any]:
        """A batch of random prompts, all different."""
        import numpy as np

        shape = (self.options.batch, self.options.prompt_tokens)
        prompts = np.random.default_rng(seed).integers(3, vocab_size, shape).tolist()
        return {
            "prompts": prompts,
            "new_tokens": self.options.new_tokens,
            "temperature": self.options.temperature,
            "seed": seed,
            **changes,
        }

    def try_peer(self, side: Side, setting: dict[str, Any], best: float, vocab: int) -> float:
        """The peer's tokens per processor second, by the best of short trials; 0: no use."""
        label = f"  {describe_setting(setting):<70}"
        built = side.try_ask(build={**setting, "directory": self.directory})
        tokens = self.options.batch * TRIAL_TOKENS
        rate = 0.0
        for trial in range(1 + self.options.trials):
            request = self.request(vocab, trial, new_tokens=TRIAL_TOKENS)
            done = built if "error" in built else side.try_ask(rollout=request)
            if "error" in done:
                print(f"{label} not here: {done['error'][:150]}")
                return 0.0
            # With one thread processor time, which other programs hardly change.
            clock = "cpu_seconds" if self.options.threads == 1 else "seconds"
            rate = max(rate, tokens / done[clock])
            if rate < best / GIVE_UP_FACTOR and not setting["compile"]:
                break
        print(f"{label} {rate:6.0f} tokens/s", flush=True)
        return rate

    def best_peer_setting(self, vocab: int) -> dict[str, Any]:
        """Tries what the peer has and returns its fastest setting."""
        rates: list[tuple[float, dict[str, Any]]] = []

        def attempt(side: Side, setting: dict[str, Any]) -> None:
            best = max((rate for rate, _ in rates), default=0.0)
            rates.append((self.try_peer(side, setting, best, vocab), setting))

        def fastest() -> dict[str, Any]:
            return max(rates, key=lambda pair: pair[0])[1]

        plain = {"compile": False, "keep_freed_memory": False}
        with self.peer() as side:
            about = side.ask(describe={})
            print("trying the peer:", {k: about[k] for k in ("torch", "transformers")})
            first = {"attention": about["attention"][0], "cache": about["cache"][0]}
            for experts in about["experts"]:
                attempt(side, {**first, "experts": experts, **plain})
            for attention in about["attention"]:
                for cache in about["cache"]:
                    if {"attention": attention, "cache": cache} != first:
                        attempt(side, {**fastest(), "attention": attention, "cache": cache})
            if self.options.compile:
                attempt(side, {**fastest(), "cache": "static", "compile": True})
        with self.peer("--keep-freed-memory") as side:
            attempt(side, {**fastest(), "keep_freed_memory": True})
        return fastest()

    def run(self) -> float:
        """Prints everything and returns the ratio."""
        options = self.options
        kind = "greedy" if options.temperature == 0 else f"sampling at {options.temperature}"
        print(
            f"model {self.model}, batch {options.batch}, prompts of {options.prompt_tokens} tokens,"
            f" {options.new_tokens} new ones, {kind}, float32, {options.threads} thread(s)"
        )
        with self.ours() as ours:
            vocab = ours.ask(build={"model": self.model, "directory": self.directory})["vocab_size"]
            setting = self.best_peer_setting(vocab)
            print("peer's best:", describe_setting(setting), "+ inference_mode", flush=True)
            flags = ["--keep-freed-memory"] if setting["keep_freed_memory"] else []
            with self.peer(*flags) as peer:
                peer.ask(build={**setting, "directory": self.directory})
                sides = {"ours": ours, "peer": peer}
                greedy = self.request(vocab, 0, temperature=0.0)
                ids = {name: side.ask(rollout=greedy)["ids"] for name, side in sides.items()}
                agreement = check_agreement(ids["ours"], ids["peer"])
                measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
                for turn in range(options.rounds):
                    request = self.request(vocab, turn + 1)
                    for name in list(sides)[:: 1 if turn % 2 else -1]:
                        measured[name].append(sides[name].ask(rollout=request))
            print("ours:", "; ".join(ours.ask(describe={})["set_up"]))
        print(f"first {COMPARED_TOKENS} greedy tokens agree in {agreement:.0%} of the completions")
        rates = [self.print_side(name, measured[name]) for name in sides]
        wall, processor = (ours / peer for ours, peer in zip(*rates, strict=True))
        print(f"ratio ours / peer: {wall:.3f} with {options.threads} thread(s)", end="")
        print(f"; {processor:.3f} in tokens per processor second")
        return wall

    def print_side(self, name: str, rounds: list[dict[str, Any]]) -> tuple[float, float]:
        """Prints a side; its median tokens per second and per processor second."""
        tokens = self.options.batch * self.options.new_tokens
        rates = [tokens / r["seconds"] for r in rounds]
        cpu_rate = statistics.median(tokens / r["cpu_seconds"] for r in rounds)
        cores = statistics.median(r["cpu_seconds"] / r["seconds"] for r in rounds)
        median = statistics.median(rates)
        print(
            f"{name}: {median:6.0f} tokens/s, median of {len(rates)} rounds "
            f"(from {min(rates):.0f} to {max(rates):.0f}); "
            f"cores {cores:.2f}, {cpu_rate:.0f} tokens per processor second"
        )
        return median, cpu_rate


def describe_setting(setting: dict[str, Any]) -> str:
    extras = [word for word in ("compile", "keep_freed_memory") if setting[word]]
    names = [f"{name} {setting[name]}" for name in ("attention", "experts", "cache")]
    return ", ".join(names + extras)


def check_agreement(ours: list[list[int]], peer: list[list[int]]) -> float:
    """The share of completions that begin alike; `RuntimeError` if the sides compute others."""
    if [len(ids) for ids in ours] != [len(ids) for ids in peer]:
        raise RuntimeError("the sides completed to different lengths")
    alike = [a[:COMPARED_TOKENS] == b[:COMPARED_TOKENS] for a, b in zip(ours, peer, strict=True)]
    agreement = sum(alike) / len(alike)
    if agreement < LEAST_AGREEMENT:
        raise RuntimeError(f"only {agreement:.0%} of the greedy completions begin alike")
    return agreement


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--model", choices=MODELS, help="only this one (default: both)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="try torch.compile too (minutes)")
    parser.add_argument("--referee-python", type=Path, default=referee_python())
    parser.add_argument("--serve-ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_ours:
        serve_ours()
        return
    if not options.referee_python.exists():
        parser.error(f"no {options.referee_python}: make the referee environment (README)")
    for model in [options.model] if options.model else MODELS:
        with tempfile.TemporaryDirectory() as directory:
            Bench(options, model, directory).run()


if __name__ == "__main__":
    main()
