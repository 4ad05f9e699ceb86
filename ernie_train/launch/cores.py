"""Decide how a run uses the cores of a machine without a GPU.

Paddle's elementwise operators use one thread, so data ranks of one thread each train faster than
one process with several (on two cores 1.8 times as fast as one, against 1.2 times). A step's
micro-batches are split evenly over ranks, so that their number decides how many there can be. All
that samples, evaluates or scores in a rank shares its cores (`core.cpu` counts them), so that there
are never more busy processes than cores.

The recipe is read as it is written: the ranks validate it, which takes Paddle. What cannot be read
counts as nothing to share out.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from ernie_train.core.cpu import THREAD_VARIABLES, CpuSetup, cpu_setup
from ernie_train.core.environment import memory_bytes
from ernie_train.core.errors import UserError
from ernie_train.core.foreign_files import read_json
from ernie_train.core.processes import import_path
from ernie_train.launch.launcher import has_gpu_build, hides_gpus

# In fewer tokens a further rank does not win back the seconds that its start takes.
WORTHWHILE_TOKENS = 30_000
# Float32 weights, gradients and two moments beside the bfloat16 file of most models; a rank holds
# all of them. No more than this share of the memory is planned with: activations come on top.
_BYTES_PER_FILE_BYTE, _MEMORY_SHARE = 8, 0.6
# Of the presets as they are, so that a run with one starts without asking for its configuration.
PRESET_PARAMETERS = {
    "tiny": 2_362_496, "mini": 20_013_312, "0.3b": 360_748_032, "21b-a3b": 21_825_436_160,
}  # fmt: skip
# Guesses, to tell short runs from long ones.
_ROLLOUT_PROMPT_TOKENS, _BYTES_PER_TOKEN = 128, 4
_COMPRESSED, _TEXT_PER_BYTE = (".gz", ".zst", ".parquet"), 4
_MOST_ADVISED = 4  # micro-batches of a step: more would change it for the sake of speed alone


@dataclass(frozen=True)
class CorePlan:
    """Data ranks that a run is started as, and one line for the user that says why."""

    ranks: int
    line: str
    threads: int | None = None  # of each rank, where it is to have fewer than its share


def plan_cores(
    values: Mapping[str, Any], run_dir: Path | None, base_dir: Path, setup: CpuSetup | None = None
) -> CorePlan | None:
    """Return how a run uses this machine's cores, or None where that is not for us to say.

    values: the recipe as written, with overrides. A recipe that sets its own layout decides, and
    so does a GPU. A run keeps the ranks and threads that it began with, so that it resumes to the
    same bits, unless this machine has too few cores or the recipe no longer allows it.
    """
    setup = setup or cpu_setup()
    layout = values.get("parallel") or {}
    if _may_use_gpu(values.get("device", "auto")) or not isinstance(layout, Mapping):
        return None
    if {"data", "expert", "sharding"} & layout.keys():
        return None
    chosen = any(name in setup.kept for name in THREAD_VARIABLES)
    begun = _recorded_ranks(run_dir)
    most = max(1, setup.cores // (setup.threads if chosen else 1))
    ranks, why = _chosen_ranks(values, most, base_dir, begun)
    each = setup.threads if chosen else max(1, setup.cores // ranks)
    begun_threads = _recorded_threads(run_dir) if ranks == begun else None
    kept = None
    # Matrix products round by the number of threads.
    if begun_threads is not None and begun_threads != each:
        if chosen or begun_threads > each:
            began = _count(begun_threads, "thread")
            why = f"this run began with {began}, results differ by rounding"
        else:
            kept = each = begun_threads
    share = _count(ranks, "data rank") if ranks > 1 else "one process"
    line = f"{_count(setup.cores, 'core')}: {share} with {_count(each, 'thread')}"
    notes = [why, "--nproc 1 switches ranks off" if ranks > 1 else ""]
    said = "; ".join(filter(None, notes))
    line += " each" if ranks > 1 else ""
    return CorePlan(ranks, f"{line} ({said})" if said else line, kept)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _may_use_gpu(device: object) -> bool:
    if device != "auto":
        return device != "cpu"
    return has_gpu_build() and not hides_gpus(os.environ)


def _chosen_ranks(
    values: Mapping[str, Any], most: int, base_dir: Path, begun: int | None
) -> tuple[int, str]:
    """Return the number of ranks, and the reason unless it is all that the cores allow.

    begun: the number that the run began with, None where it begins now.
    """
    written = values.get("stages")
    stages = [
        _Stage.of(stage, base_dir) for stage in (written if isinstance(written, list) else [])
    ]
    shared, export = gcd(*(stage.micro_batches for stage in stages)), values.get("export")
    refused = ""  # why several ranks cannot be
    if isinstance(export, Mapping) and export.get("quantize"):
        refused = "export.quantize: one rank quantizes the whole model"
    allowed = begun is not None and (begun == 1 or (not refused and shared % begun == 0))
    if begun is not None and begun <= most and allowed:
        return begun, "as this run began"
    ranks, why = 1, refused if most > 1 else ""
    if most > 1 and not refused:
        ranks, why = _worthwhile_ranks(values, most, base_dir, stages)
    changed = f"this run began with {begun}, results differ by rounding" if begun else ""
    return ranks, "; ".join(filter(None, (changed, why)))


def _worthwhile_ranks(
    values: Mapping[str, Any], most: int, base_dir: Path, stages: list[_Stage]
) -> tuple[int, str]:
    """Return the most ranks that share the work evenly, pay and fit, and why there are no more."""
    shared = gcd(*(stage.micro_batches for stage in stages))
    ranks = max((n for n in range(1, most + 1) if shared % n == 0), default=1) if shared else 1
    wanted = _advised_micro_batches(stages, most) if ranks == 1 else None
    if ranks == 1 and wanted is None:
        return 1, ""
    if (tokens := sum(stage.tokens for stage in stages)) < WORTHWHILE_TOKENS:
        return 1, f"for {tokens} tokens further ranks do not pay" if ranks > 1 else ""
    copy = _BYTES_PER_FILE_BYTE * max(1, _model_bytes(values.get("model"), base_dir))
    room = _MEMORY_SHARE * memory_bytes()["total"] / copy
    if wanted is not None:
        return 1, f"grad_accum_steps: {wanted} would use more cores" if wanted <= room else ""
    fits = max((n for n in range(1, ranks + 1) if shared % n == 0 and n <= room), default=1)
    return fits, "" if fits == ranks else "memory holds no more copies of the model"


def _advised_micro_batches(stages: list[_Stage], most: int) -> int | None:
    """Return a `grad_accum_steps` that lets several ranks share, None where that is not known.

    Every stage whose micro-batches ranks cannot divide must be one that sets it, and with one
    micro-batch, since no advice is to shorten a step.
    """
    wanted = 2 if most < _MOST_ADVISED else _MOST_ADVISED
    odd = [stage for stage in stages if stage.micro_batches % wanted or not stage.micro_batches]
    return wanted if odd and all(s.accumulates and s.micro_batches == 1 for s in odd) else None


def _model_bytes(model: Any, base_dir: Path) -> int:
    """Return the size of a recipe's `model` in files of bfloat16, 0 where that is not known."""
    if not isinstance(model, Mapping):
        return 0
    with suppress(OSError, ValueError, TypeError):
        if model.get("path") is not None:
            found = (base_dir / model["path"]).rglob("*.safetensors")
            return sum(file.stat().st_size for file in found if file.is_file())  # a link may dangle
        preset, sizes = str(model.get("preset")), {**model}
        sizes.pop("preset", None)
        return 2 * (_count_parameters(preset, sizes) if sizes else PRESET_PARAMETERS.get(preset, 0))
    return 0


def _count_parameters(preset: str, sizes: Mapping[str, Any]) -> int:
    """Return the parameters of a preset with other sizes, 0 where these are impossible.

    Another process counts: the model's configuration takes Paddle, which a supervisor of ranks does
    without.
    """
    program = (
        "import json, sys\nfrom ernie_train.model import Ernie4_5_MoeConfig\n"
        "config = Ernie4_5_MoeConfig.preset(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "print(config.num_parameters()[0])"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, preset, json.dumps(sizes)]
    environment = {**os.environ, "PYTHONPATH": import_path(os.environ)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0  # the run says what is wrong


@dataclass(frozen=True)
class _Stage:
    """Work of a stage by its settings as written; 0 where they do not say it."""

    micro_batches: int = 0  # of an optimizer step
    tokens: int = 0  # about, in all
    accumulates: bool = False  # has `grad_accum_steps`

    @classmethod
    def of(cls, stage: Any, base_dir: Path) -> _Stage:
        with suppress(LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError):
            rows, kind = int(stage["micro_batch_size"]), stage["kind"]
            if kind in ("pretrain", "sft"):
                count = int(stage.get("grad_accum_steps", 1))
                if stage.get("epochs") is not None:
                    data = sum(_data_bytes(base_dir, source["path"]) for source in stage["data"])
                    return cls(count, int(stage["epochs"]) * data // _BYTES_PER_TOKEN, True)
                phases = stage.get("rope_schedule") or [stage]
                tokens = sum(_phase_tokens(phase, rows, count) for phase in phases)
                return cls(count, tokens, True)
            if kind in ("dpo", "reward"):
                pairs, length = int(stage["pairs_per_step"]), int(stage["seq_len"])
                return cls(-(-pairs // (rows // 2)), int(stage["steps"]) * pairs * 2 * length)
            rollout, policy = stage["rollout"], stage.get("policy") or {}
            sequences = int(rollout["prompts_per_iteration"]) * int(rollout.get("group_size", 8))
            length = _ROLLOUT_PROMPT_TOKENS + int(rollout["max_new_tokens"])
            count = -(-sequences // int(policy.get("minibatches", 1)) // rows)
            return cls(count, int(stage["iterations"]) * sequences * length)
        return cls(1)


def _phase_tokens(phase: Mapping[str, Any], rows: int, count: int) -> int:
    """Return the positions of a phase of a `rope_schedule`, or of a stage of one length."""
    if phase.get("tokens") is not None:
        return int(phase["tokens"])
    rows = int(phase.get("micro_batch_size") or rows)
    return int(phase["steps"]) * count * rows * int(phase["seq_len"])


def _data_bytes(base_dir: Path, path: str) -> int:
    """Return about the size of the text in the files of a path: file, directory or pattern."""
    found = {Path(match) for match in glob.glob(str(base_dir / path), recursive=True)}
    found |= {base_dir / path}  # its name may hold what a pattern holds
    files = {below for match in found for below in match.rglob("*")} | found
    return sum(
        file.stat().st_size * (_TEXT_PER_BYTE if file.suffix in _COMPRESSED else 1)
        for file in files
        if file.is_file()
    )


def _recorded_ranks(run_dir: Path | None) -> int | None:
    """Return the data ranks that a run was started with, None where nothing has begun."""
    if run_dir is None or not (run_dir / "recipe.yaml").is_file():
        return None
    with suppress(UserError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return int(load_yaml(run_dir / "recipe.yaml")["parallel"]["data"])
    return None


def _recorded_threads(run_dir: Path | None) -> int | None:
    """Return the threads of each rank at the last start of a run, None where that is not known."""
    with suppress(OSError, LookupError, TypeError, ValueError):
        threads = read_json(Path(str(run_dir)) / "environment.json")["cpu"]["threads"]
        return int(threads) if threads > 0 else None
    return None
