"""The check of two ranks: expert and data parallelism against one rank. Also the ranks' program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paddle

from ernie_train.core import devices, process_group
from ernie_train.core.process_group import Grid
from ernie_train.core.processes import free_ports
from ernie_train.selftest.check import Figure, Result, Skip
from ernie_train.selftest.fixture import train_small

LAYOUTS = {
    "expert": Grid(expert=2), "data": Grid(data=2), "expert, sharded": Grid(2, 1, sharding=True),
}  # fmt: skip
LOW = "expert, sharded, bfloat16"  # as GPUs train
LIMIT_S = 240.0
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-3, "last_loss": 1e-3}
LOW_TOLERANCES = {"loss": 1e-2, "grad_norm": 5e-2, "last_loss": 5e-2}  # of 8 bits


def two_ranks(device: str) -> Result:
    """Train on two ranks, over NCCL on GPUs and gloo on a CPU, and compare with one rank."""
    if device == "gpu" and (count := paddle.device.cuda.device_count()) < 2:
        raise Skip(f"two ranks need two GPUs, and there is {count}")
    found = _on_two_ranks(device)
    low = found.pop(LOW, None)
    figures = compare(found, train_small("float32"), TOLERANCES)
    if low is not None:
        figures += compare({LOW: low}, train_small("bfloat16"), LOW_TOLERANCES)
    return Result(figures, f"over {'NCCL' if device == 'gpu' else 'gloo'}, float32")


def compare(
    found: dict[str, dict[str, float]], expected: dict[str, float], tolerances: dict[str, float]
) -> list[Figure]:
    """Return how far each layout is from one rank."""
    return [
        Figure(f"{layout}: {name}, relative difference", abs(seen[name] / expected[name] - 1), most)
        for layout, seen in found.items()
        for name, most in tolerances.items()
    ]


def _on_two_ranks(device: str) -> dict[str, dict[str, float]]:
    """Run this module as two processes; return what rank 0 found under each layout."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        command = [sys.executable, "-m", "ernie_train.selftest.ranks", device, str(out)]
        logs = [Path(scratch) / f"{rank}.log" for rank in range(2)]
        ranks = []
        try:
            for log, own in zip(logs, _environments(device), strict=True):
                with log.open("w") as stream:
                    ranks.append(
                        subprocess.Popen(
                            command, env={**os.environ, **own}, stdout=stream, stderr=stream
                        )
                    )
            statuses = _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(statuses):
            first = next(at for at, status in enumerate(statuses) if status)
            end = logs[first].read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"rank {first} ended with {statuses[first]}: {' | '.join(end)}")
        found: dict[str, dict[str, float]] = json.loads(out.read_text())
        return found


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Return how the ranks ended, None for one that still waits for another, which failed."""
    end = time.monotonic() + LIMIT_S
    while None in (statuses := [rank.poll() for rank in ranks]) and not any(statuses):
        if time.monotonic() > end:
            raise RuntimeError(f"the ranks did not end in {LIMIT_S:.0f} s")
        time.sleep(0.05)
    return statuses


def _environments(device: str) -> list[dict[str, str]]:
    """Return what Paddle's launcher would set for two ranks on this machine."""
    ports = free_ports(3)
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    common = {
        "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        "PADDLE_TRAINERS_NUM": "2",
        "PADDLE_LOCAL_SIZE": "2",
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_DISTRI_BACKEND": "nccl" if device == "gpu" else "gloo",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "GLOG_minloglevel": "1",
    }
    return [
        common
        | {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoint}
        | ({"FLAGS_selected_gpus": str(rank)} if device == "gpu" else {})
        for rank, endpoint in enumerate(endpoints)
    ]


def main(device: str, out: str) -> None:
    """Train under each layout as one of two ranks; rank 0 writes what it found."""
    devices.select_device(device)
    process_group.init_process_group()
    process_group.require_backend(device)
    found = {}
    for name, grid in LAYOUTS.items():
        process_group.set_grid(grid)
        found[name] = train_small("float32")
    if devices.compute_dtype(device) == "bfloat16":
        found[LOW] = train_small("bfloat16")
    process_group.barrier()
    if process_group.is_main():
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
