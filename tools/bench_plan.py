"""The memory that `plan` states beside what a training process really takes at its peak.

    python tools/bench_plan.py [--only mini] [--default-allocator]

Each case is an SFT step of one rank on a CPU, in a process of its own, one after another. Measured
is the most memory that the process had resident (VmHWM) less its base: what it has resident after
training a minimal model, so with everything loaded and warmed up. `tensors` is the most that Paddle
had given out to tensors by its own count, which depends on no allocator.

The C library is told to return freed memory to the system at once. With `--default-allocator` it
keeps it for reuse, as in a run of the toolkit (see runtime.py): faster, with a higher peak, the
more so the more is freed and made again.

Exits with 1 where plan and measurement differ by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie_train.plan.layout import Layout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOLERANCE = 0.10
STEPS = 3  # memory settles in the second: gradients stay allocated after the first
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MINIMAL = {
    "hidden_size": 16, "vocab_size": 64, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "moe_num_experts": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rows of `seq_len` tokens in documents of `document_tokens` each.

    recompute: as in a recipe.
    """

    preset: str
    seq_len: int
    rows: int
    document_tokens: int
    recompute: bool | dict[str, Any]

    def layout(self) -> Layout:
        """One rank."""
        from ernie_train.config import parse_config
        from ernie_train.plan.layout import Layout
        from ernie_train.recipe import ParallelConfig

        parallel = parse_config(ParallelConfig, {"recompute": self.recompute}, "case")
        return Layout(parallel.expert, parallel.data, parallel.sharding, parallel.recompute)


EXPERTS: dict[str, Any] = {"parts": ["experts"]}
ATTENTION: dict[str, Any] = {"parts": ["attention"]}
CASES = [
    Case("tiny", 1024, 1, 1024, False),
    Case("tiny", 1024, 1, 1024, True),
    Case("tiny", 1024, 1, 1024, ATTENTION),
    Case("tiny", 1024, 1, 1024, EXPERTS),
    Case("tiny", 1024, 4, 128, False),
    Case("mini", 1024, 1, 1024, False),
    Case("mini", 1024, 1, 1024, True),
    Case("mini", 1024, 1, 1024, ATTENTION),
    Case("mini", 1024, 1, 1024, EXPERTS),
    Case("mini", 1024, 1, 1024, EXPERTS | {"layers": 5}),
    Case("mini", 512, 2, 128, False),
    Case("mini", 2048, 1, 2048, False),
    Case("mini", 2048, 1, 2048, True),
]


def planned_bytes(case: Case) -> float:
    """What `plan` says that one rank needs."""
    from ernie_train.model import Ernie4_5_MoeConfig
    from ernie_train.plan.activations import MicroBatch
    from ernie_train.plan.layout import Precision
    from ernie_train.plan.memory import Job, Machine, rank_memory

    machine = Machine(on_gpu=False, precision=Precision("float32", "float32"))
    job = Job(MicroBatch(case.rows, case.seq_len, case.document_tokens), "cross_entropy")
    return rank_memory(Ernie4_5_MoeConfig.preset(case.preset), machine, case.layout(), job).peak


def train(config: Any, case: Case) -> None:
    """A few optimizer steps of SFT on random tokens."""
    import numpy as np

    from ernie_train.datasets import Batch
    from ernie_train.optim import OptimConfig, Optimizer
    from ernie_train.parallel import enable_recompute, new_model
    from ernie_train.stages.supervised import PackedLoss
    from ernie_train.trainer import Trainer

    model = new_model(config, "float32")
    model.train()
    enable_recompute(model, case.layout().recompute)
    optimizer = Optimizer(model, OptimConfig(lr=1e-4, schedule="constant"))
    trainer: Trainer[Any, Batch] = Trainer(model, optimizer)
    random = np.random.default_rng(0)
    places = np.tile(np.arange(case.seq_len), (case.rows, 1))
    for _ in range(STEPS):
        ids = random.integers(1, config.vocab_size, (case.rows, case.seq_len + 1))
        batch = Batch(
            input_ids=ids[:, :-1],
            labels=ids[:, 1:],
            position_ids=places % case.document_tokens,
            document_ids=places // case.document_tokens + 1,
            loss_mask=np.ones(places.shape, np.float32),
        )
        trainer.train_step([batch], PackedLoss("tokens"), STEPS)


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: Case) -> dict[str, float]:
    """Trains in this process; bytes at the peak less the base."""
    from ernie_train.model import Ernie4_5_MoeConfig  # before Paddle: it sets the processor up

    import paddle  # isort: skip

    # Paddle has no public function for the memory that tensors take on a CPU.
    from paddle.base import core  # isort: skip

    small = Case("tiny", 64, 1, 32, case.recompute)
    train(Ernie4_5_MoeConfig.preset("tiny", **MINIMAL), small)
    square = paddle.ones([1024, 1024])
    paddle.matmul(square, square)  # MKL keeps the buffers of its first large product for good
    del square
    base = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    train(Ernie4_5_MoeConfig.preset(case.preset), case)
    return {
        "base": base,
        "resident": resident_bytes("VmHWM") - base,
        "tensors": core.host_memory_stat_peak_value("Allocated", 0),
        "planned": planned_bytes(case),
    }


def measured_apart(case: Case, environment: dict[str, str]) -> dict[str, float]:
    """`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(asdict(case))],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose preset has this name")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return 0
    print(
        "preset  tokens     document        recompute   plan MB  peak MB  plan/peak  tensors MB"
        "  base MB"
    )
    worst = 0.0
    for case in CASES:
        if options.only and options.only != case.preset:
            continue
        found = measured_apart(case, {} if options.default_allocator else RETURN_FREED)
        mb = {name: value / 1e6 for name, value in found.items()}
        ratio = mb["planned"] / mb["resident"]
        worst = max(worst, abs(ratio - 1))
        print(
            f"{case.preset:6}  {case.rows} x {case.seq_len:<6} {case.document_tokens:8} "
            f"{case.layout().again:>16}  {mb['planned']:8.1f} {mb['resident']:8.1f}  "
            f"{ratio:9.3f}  {mb['tensors']:10.1f}  {mb['base']:7.1f}",
            flush=True,
        )
    print(f"largest difference: {100 * worst:.1f} %")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
