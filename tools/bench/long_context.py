"""Memory and time of one forward and backward pass over long documents.

    python -m tools.bench.long_context [--preset tiny] [--threads 1] [--recompute]

Each line is a process of its own, which trains on random tokens: one document of 4K to 32K tokens,
then 32K tokens packed from documents of 512. `peak` is the high-water mark of resident memory,
`over base` what it is above that of the same process with Paddle imported and no model made. The
ratios are to the line before: a length doubled costs twice the memory where nothing grows with its
square. Time grows with the sum of squared document lengths, in attention alone; its ratio is that
of processor seconds (`cpu s`), which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.protocol import ROOT, random_batch

LENGTHS = (4096, 8192, 16384, 32768)
PACKED = (32768, 512)
MIB = 1024


def peak_kib() -> int:
    """Return the high-water mark of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    # Not getrusage: its mark counts what the parent held when it started this process.
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one forward and backward pass over `length` tokens in documents of `document`."""
    import numpy as np

    # The package's import sets the processor up, before Paddle is imported.
    from ernie_train.data import Batch
    from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
    from ernie_train.parallel import enable_recompute
    from ernie_train.train.supervised import PackedLoss

    base = peak_kib()
    length, document = options.measure
    config = Ernie4_5_MoeConfig.preset(options.preset, max_position_embeddings=length)
    model = Ernie4_5_MoeForCausalLM(config)
    model.train()
    if options.recompute:
        enable_recompute(model)
    loss_fn = PackedLoss("tokens")

    def batch_of(tokens: int, document: int) -> Batch:
        return random_batch(np.random.default_rng(0), config.vocab_size, 1, tokens, document)

    loss_fn(model, batch_of(256, 256)).terms[0].sum.backward()  # first calls load libraries
    batch = batch_of(length, document)
    start, cpu_start = time.perf_counter(), time.process_time()
    loss_fn(model, batch).terms[0].sum.backward()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    memory = {"base": base / MIB, "peak": peak_kib() / MIB}
    return {**memory, "seconds": seconds, "cpu_seconds": cpu_seconds}


def run(options: argparse.Namespace, length: int, document: int) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "tools.bench.long_context", "--preset", options.preset]
    command += ["--recompute"] if options.recompute else []
    command += ["--measure", str(length), str(document)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(options: argparse.Namespace) -> None:
    """Measure and print line by line."""
    kept = "layers recomputed" if options.recompute else "activations kept"
    print(f"preset {options.preset}, float32, {options.threads} thread(s), {kept}")
    header = ("tokens", "document", "peak MiB", "over base", "ratio", "seconds", "cpu s", "ratio")
    print(" ".join(f"{name:>10}" for name in header))
    before: tuple[float, float] | None = None
    for length, document in [*((n, n) for n in options.lengths), options.packed]:
        result = run(options, length, document)
        over = result["peak"] - result["base"]
        now = (over, result["cpu_seconds"])
        ratios = ["", ""]
        if before and document == length:
            ratios = [f"{new / old:.2f}" for new, old in zip(now, before, strict=True)]
        cells = (
            length, document, f"{result['peak']:.0f}", f"{over:.0f}", ratios[0],
            f"{result['seconds']:.2f}", f"{now[1]:.2f}", ratios[1],
        )  # fmt: skip
        print(" ".join(f"{cell:>10}" for cell in cells), flush=True)
        before = now


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--packed", type=int, nargs=2, default=PACKED)
    parser.add_argument("--recompute", action="store_true", help="run layers again, keep less")
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
    else:
        print_table(options)


if __name__ == "__main__":
    main()
