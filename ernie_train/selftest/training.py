"""Checks of training and sampling: precision, steps, recomputation, memory and speed."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import numpy as np
import paddle

from ernie_train.core import devices
from ernie_train.core.cpu import cpu_setup
from ernie_train.core.devices import compute_dtype
from ernie_train.data import Batch
from ernie_train.generate.engine import generate
from ernie_train.kernels import plain_operators
from ernie_train.losses import token_logprobs
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Recompute, RecomputeConfig
from ernie_train.plan.cost import mean_context, token_flops
from ernie_train.plan.layout import Layout, Machine, Precision
from ernie_train.plan.memory import GPU_RESERVE_BYTES, memory_demand
from ernie_train.plan.workload import MicroBatch, Workload
from ernie_train.selftest.check import Figure, Result, Skip
from ernie_train.selftest.fixture import (
    gradients,
    largest_error,
    new_trainer,
    packed_batch,
    small_config,
    train_small,
)
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer

# Dense bfloat16 products, 10^12 operations a second, as vendors state them.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L20": 119, "A10": 125, "4090": 165, "3090": 71,
}  # fmt: skip
TIMED_STEPS = 5


def low_precision(device: str) -> Result:
    """Compare loss and gradients of a batch in bfloat16 with float32."""
    if compute_dtype(device) != "bfloat16":
        raise Skip("this device trains in float32: Paddle has no products in bfloat16 for it")
    return precision_figures("bfloat16")


def precision_figures(dtype: str) -> Result:
    """Compare loss and gradients in `dtype` with those in float32.

    The gradient of all parameters is one vector; rounding turns it by a small angle.
    """
    (low_loss, low), (loss, exact) = gradients(dtype), gradients("float32")
    missing = len(exact.keys() ^ low.keys())
    ours, theirs = (np.concatenate([g[n].ravel() for n in exact]) for g in (low, exact))
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
    length = float(np.linalg.norm(ours) / np.linalg.norm(theirs))
    figures = [
        Figure("loss, relative difference", abs(low_loss / loss - 1), most=0.01),
        Figure("1 - cosine of the gradients", 1 - cosine, most=0.02),
        Figure("length of the gradient, ratio", length, least=0.9, most=1.1),
        Figure("parameters without a gradient in one of them", missing, most=0),
    ]
    return Result(figures, f"forward and backward in {dtype} and float32")


def training_step(device: str) -> Result:
    """Train some steps here and by plain operators of the CPU in float32, and see the loss fall."""
    ours = train_small("float32")
    with devices.on_cpu(), plain_operators():
        theirs = train_small("float32")
    figures = [
        Figure(f"{name}, relative difference", abs(ours[name] / theirs[name] - 1), most=1e-3)
        for name in ("loss", "grad_norm", "last_loss")
    ]
    dtype = compute_dtype(device)
    trained = ours if dtype == "float32" else train_small(dtype)
    figures.append(
        Figure("loss at the end / at first", trained["last_loss"] / trained["loss"], most=0.99)
    )
    return Result(figures, f"4 steps in {dtype}; float32 beside a CPU's plain operators")


def recompute(device: str) -> Result:
    """Compare gradients with recomputed layers and experts with those of one pass."""
    loss, kept = gradients("float32")
    figures = []
    chunks = RecomputeConfig(parts=("experts",), chunk_tokens=64)
    kinds: dict[str, Recompute] = {"layers": True, "experts in chunks": chunks}
    for name, what in kinds.items():
        again_loss, again = gradients("float32", what)
        error = largest_error((again[key] for key in kept), kept.values())
        figures.append(Figure(f"{name}: gradients, relative difference", error, most=1e-4))
        figures.append(
            Figure(f"{name}: loss, relative difference", abs(again_loss / loss - 1), most=1e-5)
        )
    return Result(figures, "float32")


def sampling(device: str) -> Result:
    """Compare the logprobs of sampled tokens with those of the forward pass of training."""
    figures = []
    for dtype in sorted({compute_dtype(device), "float32"}, reverse=True):
        model = new_trainer(small_config(), dtype).model
        errors = np.abs(_sampled_minus_trained(model))
        most = 1e-3 if dtype == "float32" else 0.5
        figures.append(Figure(f"{dtype}: largest difference, nats", errors.max(), most=most))
        figures.append(Figure(f"{dtype}: mean difference", errors.mean(), most=most / 10))
    return Result(figures, "8 completions of 24 tokens, with a key/value cache")


def _sampled_minus_trained(model: Ernie4_5_MoeForCausalLM) -> np.ndarray:
    prompts = np.random.default_rng(2).integers(1, model.config.vocab_size, (8, 9)).tolist()
    completions = generate(model, prompts, max_new_tokens=24, temperature=1.0, seed=3)
    differences = []
    model.eval()
    with paddle.no_grad():
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = prompt + completion.ids
            output = model.model(paddle.to_tensor([ids[:-1]]))
            predicted = paddle.to_tensor(completion.ids)
            hidden = output.hidden[len(prompt) - 1 :]
            logprobs, _ = token_logprobs(hidden, *model.head(), predicted)
            differences.append(np.asarray(completion.logprobs) - logprobs.numpy())
    return np.concatenate(differences)


def _timed_trainer(
    device: str,
) -> tuple[Ernie4_5_MoeConfig, Trainer[Any, Batch], Batch, MicroBatch]:
    config = Ernie4_5_MoeConfig.preset("mini" if device == "gpu" else "tiny")
    rows, length = (8, 2048) if device == "gpu" else (1, 512)
    trainer = new_trainer(config, compute_dtype(device))
    batch = packed_batch(config.vocab_size, rows, length, length // 2)
    return config, trainer, batch, MicroBatch(rows, length, length // 2)


def memory(device: str) -> Result:
    """Measure the most memory that tensors take in a step, beside what `plan` states."""
    gc.collect()  # what earlier checks left would be freed while this one measures
    held = _allocated(device)
    config, trainer, batch, shape = _timed_trainer(device)
    with plain_operators():  # which the plan counts
        trainer.train_step([batch], PackedLoss(), 3)
        _reset_peak(device)
        trainer.train_step([batch], PackedLoss(), 3)
    measured = _peak(device) - held
    dtype: Any = compute_dtype(device)
    machine = Machine(device == "gpu", Precision(dtype))
    demand = memory_demand(config, machine, Layout(1, 1, False, False), Workload("check", shape))
    planned = demand.peak - (GPU_RESERVE_BYTES if device == "gpu" else 0)
    figures = [
        Figure("measured, MB", measured / 1e6, least=0),
        Figure("plan, MB", planned / 1e6, least=0),
        Figure("plan / measured", planned / measured, least=0.75, most=1.33),
    ]
    what = f"a step of {shape.rows} x {shape.seq_len} tokens by plain operators, without reserves"
    return Result(figures, what)


def _allocated(device: str) -> int:
    if device == "gpu":
        return int(paddle.device.cuda.memory_allocated())
    # Paddle has no public function for the memory that tensors take on a CPU.
    return int(paddle.base.core.host_memory_stat_current_value("Allocated", 0))


def _reset_peak(device: str) -> None:
    if device == "gpu":
        paddle.device.cuda.reset_max_memory_allocated()
    else:
        paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)


def _peak(device: str) -> int:
    if device == "gpu":
        return int(paddle.device.cuda.max_memory_allocated())
    return int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0))


def speed(device: str) -> Result:
    """Measure training in tokens a second, and its share of what the device could compute.

    A share above 1 would mean that the clock or the count of operations is wrong.
    """
    config, trainer, batch, shape = _timed_trainer(device)
    trainer.train_step([batch], PackedLoss(), TIMED_STEPS)
    seconds = []
    for _ in range(TIMED_STEPS):
        _wait(device)
        began = time.perf_counter()
        trainer.train_step([batch], PackedLoss(), TIMED_STEPS)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    tokens_per_s = shape.tokens / statistics.median(seconds)
    flops = token_flops(config, mean_context(shape.document_tokens)).training(0.0)
    peak, source = peak_tflops(device)
    figures = [Figure("tokens/s", tokens_per_s, least=1)]
    if peak is not None:
        share = tokens_per_s * flops / (peak * 1e12)
        figures.append(Figure("MFU", share, least=1e-6, most=1.0))
    note = f"{shape.rows} x {shape.seq_len} tokens in {compute_dtype(device)}; {source}"
    return Result(figures, note)


def _wait(device: str) -> None:
    if device == "gpu":
        paddle.device.synchronize()


def peak_tflops(device: str) -> tuple[float | None, str]:
    """Return the peak of the device in 10^12 operations a second, and its source; None: unknown."""
    if device == "gpu":
        name = paddle.device.cuda.get_device_name()
        known = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        stated = f"peak {known} TFLOP/s" if known else "its peak is not in the list, so no MFU"
        return known, f"{name}: {stated}"
    setup = cpu_setup()
    gflops = setup.processor.peak_gflops(setup.threads)
    if gflops is None:
        return None, "the processor's peak is not known, so no MFU"
    return gflops / 1e3, f"{setup.threads} threads allow {gflops:.0f} GFLOP/s"
