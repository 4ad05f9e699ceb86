"""Compares the memory that `plan` states with the measured peak of training processes.

    python -m tools.bench.plan [--only mini] [--ranks 4] [--default-allocator]

Each case is an SFT step on a CPU, by one rank or by several over gloo, or sampling after it, in
processes of its own, one case after another. Measured is the most memory that the fullest rank had
resident (VmHWM) less its base: what it has resident after training a minimal model among as many
ranks, so with everything loaded, joined and warmed up. `tensors` is the most that Paddle had given
out to tensors by its own count, which depends on no allocator and knows nothing of numpy's arrays.

The C library is told to return freed memory to the system at once. With `--default-allocator` it
keeps it for reuse, as in a run of the toolkit (see core/cpu.py): faster, with a higher peak, the
more so the more is freed and made again.

Exits with 1 where plan and measurement differ by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie_train.model import Ernie4_5_MoeConfig
    from ernie_train.model.lora import LoraConfig
    from ernie_train.model.partial import Selection
    from ernie_train.plan.layout import Layout

from tools.bench.protocol import begin_peak, resident_bytes
from tools.bench.ranks import paddle_environments

TOLERANCE = 0.15
# `plan` counts what plain operators keep for the way back, as on a GPU; the native kernels of CPUs
# keep less.
PLAIN_KERNELS = {"ERNIE_TRAIN_KERNELS": "plain"}
HEADING = """\
| preset | layout | tokens of a rank | plan MB | measured MB | plan / measured | tensors MB |
|---|---|---|---:|---:|---:|---:|"""
STEPS = 3  # memory settles in the second
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MINIMAL = {
    "hidden_size": 16, "vocab_size": 64, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "moe_num_experts": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rows of `seq_len` tokens in documents of `document_tokens` each, for each rank.

    recompute: as in a recipe.
    sequences: measured is not the training step but the sampling after it, of so many sequences
        with prompts and completions of half `seq_len` each.
    micro_batches: of a step, on each rank.
    lora: the rank of pairs beside all matrices, which then train alone; 0 trains the whole model.
    dora: whether the pairs are DoRA's.
    """

    preset: str
    seq_len: int
    rows: int
    document_tokens: int
    recompute: bool | dict[str, Any]
    expert: int = 1
    data: int = 1
    sharding: bool = False
    sequences: int = 0
    micro_batches: int = 1
    lora: int = 0
    dora: bool = False

    @property
    def ranks(self) -> int:
        return self.expert * self.data

    def layout(self) -> Layout:
        """Return the layout that a recipe of such a job has."""
        from ernie_train.core.config import parse_config
        from ernie_train.plan.layout import Layout
        from ernie_train.run.recipe import ParallelConfig

        own = {name: getattr(self, name) for name in ("expert", "data", "sharding", "recompute")}
        parallel = parse_config(ParallelConfig, own, "case")
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
    Case("mini", 8192, 1, 1024, True),
    Case("mini", 8192, 1, 1024, {"chunk_tokens": 1024}),
    Case("mini", 1024, 1, 1024, False, micro_batches=2),
    Case("tiny", 1024, 1, 1024, False, lora=16),
    Case("mini", 1024, 1, 1024, False, lora=16),
    Case("mini", 1024, 1, 1024, True, lora=16),
    Case("tiny", 256, 1, 256, False, sequences=256),
    Case("mini", 256, 1, 256, False, sequences=64),
    Case("mini", 1024, 1, 1024, False, sequences=16),
    Case("mini", 1024, 1, 1024, False, expert=2),
    Case("mini", 1024, 1, 1024, True, expert=2),
    Case("mini", 4096, 1, 1024, {"chunk_tokens": 512}, expert=2),
    Case("mini", 1024, 1, 1024, False, data=2),
    Case("mini", 1024, 1, 1024, False, data=2, sharding=True),
    Case("mini", 1024, 1, 1024, False, expert=2, sharding=True),
    Case("mini", 1024, 1, 1024, False, expert=2, data=2, sharding=True),
    Case("mini", 1024, 1, 1024, True, expert=2, data=2, sharding=True),
    Case("mini", 1024, 1, 1024, False, expert=4, sharding=True),
    Case("mini", 1024, 1, 1024, False, data=4, sharding=True),
]


def planned_bytes(case: Case) -> float:
    """Return the memory that `plan` states for the fullest rank."""
    from ernie_train.model import Ernie4_5_MoeConfig
    from ernie_train.plan.layout import Machine, Precision, count_part
    from ernie_train.plan.memory import memory_demand
    from ernie_train.plan.workload import MicroBatch, Sampling, Workload

    machine = Machine(on_gpu=False, precision=Precision("float32"))
    half = case.seq_len // 2
    sampling = Sampling(case.sequences, 1, half, half, case.sequences) if case.sequences else None
    batch = MicroBatch(case.rows, case.seq_len, case.document_tokens)
    config = Ernie4_5_MoeConfig.preset(case.preset)
    part = count_part(config, *pairs(config, case)) if case.lora else None
    micro_batches = case.micro_batches * case.ranks
    load = Workload("case", batch, micro_batches=micro_batches, sampling=sampling, part=part)
    demand = memory_demand(config, machine, case.layout(), load)
    return demand.resident + demand.rollouts if case.sequences else demand.peak


def pairs(config: Ernie4_5_MoeConfig, case: Case) -> tuple[Selection, LoraConfig]:
    """Return pairs of LoRA beside all matrices of a model."""
    from ernie_train.model.lora import LoraConfig
    from ernie_train.model.partial import select
    from ernie_train.weights.layout import parameter_shapes

    lora = LoraConfig(rank=case.lora, dora=case.dora)
    return select(parameter_shapes(config), lora, [], []), lora


def train(config: Any, case: Case) -> Any:
    """Run a few optimizer steps of SFT on random tokens; return the trainer with all it holds."""
    import numpy as np

    from ernie_train.data import Batch
    from ernie_train.model.partial import begin_partial_training
    from ernie_train.parallel import enable_recompute, new_model
    from ernie_train.train.optimizer import OptimConfig, Optimizer
    from ernie_train.train.supervised import PackedLoss
    from ernie_train.train.trainer import Trainer

    model = new_model(config, "float32")
    model.train()
    enable_recompute(model, case.layout().recompute)
    if case.lora:
        begin_partial_training(model, *pairs(config, case), {}, seed=0)
    optimizer = Optimizer(model, OptimConfig(lr=1e-4, schedule="constant"))
    trainer: Trainer[Any, Batch] = Trainer(model, optimizer)
    random = np.random.default_rng(0)
    places = np.tile(np.arange(case.seq_len), (case.rows, 1))
    for _ in range(STEPS):
        batches = []
        for _ in range(case.ranks * case.micro_batches):
            ids = random.integers(1, config.vocab_size, (case.rows, case.seq_len + 1))
            batches.append(
                Batch(
                    input_ids=ids[:, :-1],
                    labels=ids[:, 1:],
                    position_ids=places % case.document_tokens,
                    document_ids=places // case.document_tokens + 1,
                    loss_mask=np.ones(places.shape, np.float32),
                )
            )
        trainer.train_step(batches, PackedLoss("tokens"), STEPS)
    return trainer


def sample(model: Any, sequences: int, seq_len: int) -> None:
    """Sample completions of full length; prompts all differ."""
    import numpy as np

    from ernie_train.generate.engine import generate

    half = seq_len // 2
    prompts = np.random.default_rng(1).integers(1, model.config.vocab_size, (sequences, half))
    generate(
        model, prompts.tolist(), max_new_tokens=half, temperature=1.0, batch_size=sequences,
        record_experts=True,
    )  # fmt: skip


def measure(case: Case) -> dict[str, float]:
    """Train in this process; return bytes at the peak less the base."""
    from ernie_train.core import process_group
    from ernie_train.model import Ernie4_5_MoeConfig  # before Paddle: it sets the processor up

    import paddle  # isort: skip

    # Paddle has no public function for the memory that tensors take on a CPU.
    from paddle.base import core  # isort: skip

    def begin() -> None:
        process_group.barrier()
        begin_peak()
        core.host_memory_stat_reset_peak_value("Allocated", 0)

    process_group.set_grid(process_group.Grid(case.expert, case.data, case.sharding))
    small = replace(case, seq_len=64, rows=1, document_tokens=32)
    minimal = train(Ernie4_5_MoeConfig.preset("tiny", **MINIMAL), small)
    if case.sequences:
        sample(minimal.model, 4, 16)
    del minimal
    square = paddle.ones([1024, 1024])
    paddle.matmul(square, square)  # MKL keeps the buffers of its first large product for good
    del square
    base = resident_bytes("VmRSS")
    begin()
    trainer = train(Ernie4_5_MoeConfig.preset(case.preset), case)
    if case.sequences:
        begin()
        sample(trainer.model, case.sequences, case.seq_len)
    return {
        "base": base,
        "resident": resident_bytes("VmHWM") - base,
        "tensors": core.host_memory_stat_peak_value("Allocated", 0),
        "planned": planned_bytes(case),
    }


def measured_apart(case: Case, environment: dict[str, str]) -> dict[str, float]:
    """Run `measure` in a fresh process for each rank; return the most that any of them took."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench.plan"]
    command += ["--case", json.dumps(asdict(case))]
    shared = {**os.environ, **PLAIN_KERNELS, **environment}
    ranks = [
        subprocess.Popen(command, env={**shared, **own}, stdout=subprocess.PIPE, text=True)
        for own in paddle_environments(case.ranks)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if failed := [at for at, rank in enumerate(ranks) if rank.returncode]:
        raise SystemExit(f"{case}: rank {failed[0]} failed")
    found = [json.loads(text.splitlines()[-1]) for text in told]
    return {name: max(each[name] for each in found) for name in found[0]}


def row(case: Case, found: dict[str, float]) -> str:
    """Return a line of the table in docs/memory.md."""
    mb = {name: value / 1e6 for name, value in found.items()}
    layout = f"expert {case.expert}, data {case.data}" + (", sharded" if case.sharding else "")
    what = f"{case.rows} x {case.seq_len} in {case.document_tokens}"
    if case.micro_batches > 1:
        what = f"{case.micro_batches} times {what}"
    if case.sequences:
        what = f"{case.sequences} x {case.seq_len} sampled"
    if case.lora:
        what += f", LoRA of rank {case.lora}"
    if case.recompute:
        parts, comma, first = case.layout().recompute_label.partition(", ")
        what += ", recompute" if parts == "layers" else f", recompute {parts}"
        what += comma + first
    cells = (
        case.preset, "1 rank" if case.ranks == 1 else layout, what, f"{mb['planned']:.1f}",
        f"{mb['resident']:.1f}", f"{mb['planned'] / mb['resident']:.3f}", f"{mb['tensors']:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose preset has this name")
    parser.add_argument("--ranks", type=int, default=0, help="cases of so many ranks; 0: all")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return 0
    print(HEADING)
    worst = 0.0
    for case in CASES:
        if options.only not in ("", case.preset) or options.ranks not in (0, case.ranks):
            continue
        found = measured_apart(case, {} if options.default_allocator else RETURN_FREED)
        print(row(case, found), flush=True)
        worst = max(worst, abs(found["planned"] / found["resident"] - 1))
    print(f"largest difference: {100 * worst:.1f} %")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
