"""Our side beside the peer's: what the benchmarks of training and rollouts share.

Each side has a process of its own, or one for each of its ranks; they take turns. First the peer's
implementations are tried, then its best combination and ours are measured alternately. The rates
are medians over the rounds, the ratio is ours / peer.

Other programs on the machine disturb both sides: close them, and look at the spread that is
printed. `cores` is processor time / wall time: well below the number of threads of all ranks, the
side did not get its processors, and tokens per processor second (one thread) say more than tokens
per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from tools.bench.protocol import ROOT, serve, timed
from tools.bench.ranks import Ranks, paddle_environments, torch_environments

Setting = dict[str, Any]
Work = dict[str, Any]

MODEL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "rope_theta": 500000.0, "moe_num_experts": 16, "moe_intermediate_size": 128, "moe_k": 4,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 0, "tie_word_embeddings": True,
}  # fmt: skip
# Those that the peer has several of, and the number of its processes.
IMPLEMENTATIONS = ("attention", "experts", "cache", "padded_documents", "ranks")
GIVE_UP_FACTOR = 6  # slower than the best setting so far: no further trials
PEER = "tools.bench.peer"


def referee_python() -> Path:
    """Return the python that has torch: that of ERNIE_TRAIN_REFEREE, or of .venv-referee."""
    home = os.environ.get("ERNIE_TRAIN_REFEREE") or ROOT / ".venv-referee"
    return Path(home) / "bin" / "python"


class Ours:
    """Our side, in a process of its own; a benchmark says what its work is."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Make the random model `model`, a preset or keys; save it in `directory` for the peer."""
        # The package's import sets the processor up, before Paddle is imported.
        from ernie_train.core import process_group
        from ernie_train.core.devices import seed_everything
        from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
        from ernie_train.weights.hf import load_pretrained
        from ernie_train.weights.saving import save_pretrained

        self.ranks = process_group.world_size()
        process_group.set_grid(process_group.Grid(data=self.ranks))
        seed_everything(0)
        keys = request["model"]
        named = isinstance(keys, str)
        config = Ernie4_5_MoeConfig.preset(keys) if named else Ernie4_5_MoeConfig(**keys)
        save_pretrained(Ernie4_5_MoeForCausalLM(config), request["directory"])
        self.model = load_pretrained(request["directory"])
        self.vocab_size = config.vocab_size

    def work(self, request: Work) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def serve(cls) -> None:
        """Answer `build`, `work` and `describe` until standard input ends."""
        built: list[Ours] = []

        def build(request: dict[str, Any]) -> dict[str, Any]:
            built.append(cls(request))
            return {"vocab_size": built[0].vocab_size}

        def work(request: Work) -> dict[str, Any]:
            return timed(lambda: built[0].work(request))

        def describe(_: Any) -> dict[str, Any]:
            from ernie_train.core.cpu import cpu_setup_report

            return {"set_up": cpu_setup_report()}

        serve({"build": build, "work": work, "describe": describe}, unsupported=())


class Bench:
    """The driver; a benchmark says what is built and worked on, and how the sides must agree."""

    module: ClassVar[str]  # serves our side
    dimensions: tuple[str, ...]  # settings of the peer to choose from
    compile_with: ClassVar[Setting] = {}  # what torch.compile needs of the other settings

    def __init__(self, options: argparse.Namespace, model: str | dict[str, Any]) -> None:
        self.options = options
        self.model = model
        self.vocab_size = 0  # known once our side has made the model
        self.peer_request: dict[str, Any] = {}  # of `build`, besides the directory and the settings

    def title(self) -> str:
        raise NotImplementedError

    def trials(self) -> Iterator[tuple[Work, int]]:
        """Yield pieces of work and their tokens, small ones first: a slow setting is given up."""
        raise NotImplementedError

    def round(self, number: int) -> tuple[Work, int]:
        """Return the work of a round, the same for both sides, and its tokens."""
        raise NotImplementedError

    def check_start(self, ours: Ranks, peer: Ranks) -> str:
        """Return in words that both sides compute the same; `RuntimeError` if they do not."""
        raise NotImplementedError

    def check_end(self, ours: dict[str, Any], peer: dict[str, Any]) -> str:
        """Check the answers of the last round in the same way."""
        return ""

    def run(self) -> float:
        """Print everything; return the ratio."""
        print(f"{self.title()}, float32, {self._workers()}")
        with tempfile.TemporaryDirectory() as directory, self._ours() as ours:
            built = ours.ask(build={"model": self.model, "directory": directory})
            self.vocab_size = built["vocab_size"]
            self.peer_request["directory"] = directory
            setting = self._best_setting()
            print("peer's best:", describe_setting(setting), flush=True)
            with self._peer(setting) as peer:
                peer.ask(build={**self.peer_request, **setting})
                return self._compare(ours, peer)

    def _compare(self, ours: Ranks, peer: Ranks) -> float:
        agreement = self.check_start(ours, peer)
        sides = {"ours": ours, "peer": peer}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(self.options.rounds):
            work, tokens = self.round(number)
            for name in list(sides)[:: 1 if number % 2 else -1]:
                answer = sides[name].ask(work=work)
                measured[name].append({**answer, "tokens": tokens})
        print("ours:", "; ".join(ours.ask(describe={})["set_up"]))
        end = self.check_end(*(rounds[-1] for rounds in measured.values()))
        print("\n".join(filter(None, (agreement, end))))
        rates = [print_side(name, rounds) for name, rounds in measured.items()]
        wall, processor = (ours / peer for ours, peer in zip(*rates, strict=True))
        print(f"ratio ours / peer: {wall:.3f} with {self._workers()}", end="")
        print(f"; {processor:.3f} in tokens per processor second")
        return wall

    def _workers(self) -> str:
        """Return in words what our side runs on; the peer has as many cores."""
        ranks, threads = self.options.ranks, self.options.threads
        return (f"{ranks} ranks of " if ranks > 1 else "") + f"{threads} thread(s)"

    def _ours(self) -> Ranks:
        # As the toolkit sets itself up on a machine with that many cores: threads for matmul only,
        # and as many processes that sample.
        command = [sys.executable, "-W", "ignore", "-m", self.module, "--serve-ours"]
        return Ranks(command, paddle_environments(self.options.ranks, self.options.threads))

    def _peer(self, setting: Setting) -> Ranks:
        """Return the peer's processes for `setting`: its ranks share the cores of ours."""
        ranks = setting.get("ranks", 1)
        threads = self.options.ranks * self.options.threads // ranks
        command = [str(self.options.referee_python), "-m", PEER, "--threads", str(threads)]
        command += ["--keep-freed-memory"] if setting["keep_freed_memory"] else []
        return Ranks(command, torch_environments(ranks, threads))

    def _best_setting(self) -> Setting:
        """Try the peer's implementations, one dimension after the other; return the fastest."""
        rates: list[tuple[float, Setting]] = []

        def attempt(setting: Setting) -> None:
            best = max((rate for rate, _ in rates), default=0.0)
            rates.append((self._try(peers.of(setting), setting, best), setting))

        def fastest() -> Setting:
            return max(rates, key=lambda pair: pair[0])[1]

        with PeerProcesses(self._peer) as peers:
            first: Setting = {"compile": False, "keep_freed_memory": False}
            about = peers.of(first).ask(describe={})
            about["ranks"] = [1, self.options.ranks]
            print("trying the peer:", {k: about[k] for k in ("torch", "transformers")})
            attempt({**{name: about[name][0] for name in self.dimensions}, **first})
            for name in self.dimensions:
                for value in about[name][1:]:
                    attempt({**fastest(), name: value})
            if self.options.compile:
                attempt({**fastest(), **self.compile_with, "compile": True})
            attempt({**fastest(), "keep_freed_memory": True})
        if max(rate for rate, _ in rates) == 0:
            raise RuntimeError("no setting of the peer runs here")
        return fastest()

    def _try(self, side: Ranks, setting: Setting, best: float) -> float:
        """Return the peer's tokens per second by the fastest of short trials; 0 if it fails."""
        label = f"  {describe_setting(setting):<70}"
        # On one core processor time, which other programs hardly change.
        alone = self.options.threads * self.options.ranks == 1
        clock = "cpu_seconds" if alone else "seconds"
        built = side.try_ask(build={**self.peer_request, **setting})
        rate, note = 0.0, ""
        for number, (work, tokens) in enumerate(self.trials()):
            done = built if "error" in built else side.try_ask(work=work)
            if "error" in done:
                print(f"{label} not here: {done['error'][:150]}")
                return 0.0
            rate = max(rate, tokens / done[clock])
            if number and rate < best / GIVE_UP_FACTOR and not setting["compile"]:
                note = ", given up"
                break
        print(f"{label} {rate:6.0f} tokens/s{note}", flush=True)
        return rate


class PeerProcesses:
    """The peer's processes: others are started where a setting needs them; a context manager."""

    def __init__(self, start: Callable[[Setting], Ranks]) -> None:
        self._start, self._held = start, ExitStack()
        self._fits: tuple[Any, ...] = ()

    def __enter__(self) -> PeerProcesses:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def of(self, setting: Setting) -> Ranks:
        """Return processes for `setting`, those at hand if they fit."""
        fits = (setting.get("ranks", 1), setting["keep_freed_memory"])
        if fits != self._fits:
            self._held.close()
            self._side, self._fits = self._held.enter_context(self._start(setting)), fits
        return self._side


def print_side(name: str, rounds: list[dict[str, Any]]) -> tuple[float, float]:
    """Print a side; return its median tokens per second and per processor second."""
    rates = [r["tokens"] / r["seconds"] for r in rounds]
    cpu_rate = statistics.median(r["tokens"] / r["cpu_seconds"] for r in rounds)
    cores = statistics.median(r["cpu_seconds"] / r["seconds"] for r in rounds)
    median = statistics.median(rates)
    print(
        f"{name}: {median:6.0f} tokens/s, median of {len(rates)} rounds "
        f"(from {min(rates):.0f} to {max(rates):.0f}); "
        f"cores {cores:.2f}, {cpu_rate:.0f} tokens per processor second"
    )
    return median, cpu_rate


def describe_setting(setting: Setting) -> str:
    extras = [word for word in ("compile", "keep_freed_memory") if setting[word]]
    names = [f"{name} {setting[name]}" for name in IMPLEMENTATIONS if name in setting]
    return ", ".join(names + extras)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that both benchmarks have."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--threads", type=int, choices=(1, 2), default=1)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--trials", type=int, default=4, help="of each setting of the peer")
    made.add_argument("--compile", action="store_true", help="try torch.compile too (minutes)")
    made.add_argument("--referee-python", type=Path, default=referee_python())
    made.set_defaults(ranks=1)
    made.add_argument("--serve-ours", action="store_true", help=argparse.SUPPRESS)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    options = made.parse_args()
    if not options.serve_ours and not options.referee_python.exists():
        made.error(f"no {options.referee_python}: make the referee environment (README)")
    return options
