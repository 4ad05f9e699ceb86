"""Export to a Hugging Face directory, and proof that the export computes what the model does."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_train.core import consensus, devices, process_group
from ernie_train.core.errors import UserError, WeightsError
from ernie_train.data import Tokenizer
from ernie_train.io.files import (
    FileDigest,
    write_directory,
    write_json,
    write_text,
)
from ernie_train.io.run_dir import RECEIPT
from ernie_train.io.safetensors import (
    TensorFiles,
    array_entries,
    convert,
    from_bfloat16,
    write_tensor_files,
)
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.reward import SCORE
from ernie_train.run.proof import (
    Comparison,
    Receipt,
    Referee,
    RefereeUnable,
    Trace,
    compare,
    differing_tensors,
    own_logits,
    random_prompts,
    trace,
)
from ernie_train.run.quantize import Quantizer, describe
from ernie_train.weights.adapters import ADAPTER, BASE, describe_base, find_base, is_partial
from ernie_train.weights.hf import DTYPES, load_pretrained, read_parameters
from ernie_train.weights.peft_config import ADAPTER_CONFIG, read_json_object
from ernie_train.weights.saving import save_pretrained, tensor_entries


@dataclass(frozen=True)
class Extras:
    """Hold what an export has beside weights and tokenizer.

    card: the text of README.md.
    score: the directory with a reward model's head, which is copied; see `find_score`.
    """

    card: str
    score: Path | None = None


@dataclass(frozen=True)
class WeightFormat:
    """Dtype of stored weights, size of a file, and the quantizer of a quantized export.

    With a quantizer the reference is the model with what its weights dequantize to; for one rank.
    """

    dtype: str
    max_shard_size: int | str = "5GB"
    quantizer: Quantizer | None = None


def export(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    weight_format: WeightFormat,
    extras: Extras,
    referee: str | None = None,
    seed: int = 0,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Receipt:
    """Write `directory`, read it back, compare, and leave the receipt and model card in it.

    Every rank must call it. Stored tensors are compared bit for bit, logits and greedy tokens on
    `comparison_prompts` of this `seed`. With a narrower dtype the reference is the float32 model on
    rounded weights.

    Args:
        weight_format: how weights are stored.
        extras: what lies beside weights and tokenizer.
        referee: a Python interpreter with torch and transformers that reads the directory back;
            by default this one if it has them, else this toolkit's own reader does.
        interruptible: makes the context of what a stop may cut off; `Interrupted` leaves an export
            without a receipt.

    Raises:
        WeightsError: the comparison fails; directory and failed receipt are kept.
    """
    dtype, quantization = weight_format.dtype, None
    if weight_format.quantizer is not None:
        model = rounded_copy(model, "float32")
        with interruptible():
            quantization = weight_format.quantizer.run(model, tokenizer, dtype)
    save_pretrained(
        model, directory, _ExportedTokenizer(tokenizer, extras), dtype=dtype,
        max_shard_size=weight_format.max_shard_size, quantization=quantization,
    )  # fmt: skip
    prompts = comparison_prompts(tokenizer, seed)
    with _room_for_float32():
        expected = trace(_as_stored(model, dtype), prompts)
        result, reader, note = _read_back(directory, expected, referee, interruptible)
    entries = tensor_entries(model, dtype, quantization=quantization)
    with consensus.fail_together():
        odd = differing_tensors(directory, entries)
    told = process_group.all_gather_objects((len(entries), odd))
    receipt = Receipt(
        dtype, reader, len(prompts), result.difference, result.tolerance, result.tokens_equal,
        note, result.largest, sum(n for n, _ in told), tuple(n for _, odd in told for n in odd),
        tuple(consensus.run_on_main(lambda: sorted(model.carried))),
        tuple(model.config.carried_keys), describe(quantization),
    )  # fmt: skip
    with consensus.fail_together():
        if process_group.is_main():
            write_json(directory / RECEIPT, receipt.as_dict())
        if not receipt.passed:
            raise WeightsError(
                f"{directory}: the exported model differs from the trained one: {receipt.complaint}"
            )
    return receipt


def _room_for_float32() -> AbstractContextManager[None]:
    """Return a context that computes where float32 weights fit beside the trained ones.

    A GPU that holds a whole model in bfloat16 has no room for them. Several ranks have a part each,
    and exchange rows of experts between GPUs alone.
    """
    return devices.on_cpu() if process_group.world_size() == 1 else nullcontext()


def _as_stored(model: Ernie4_5_MoeForCausalLM, dtype: str) -> Ernie4_5_MoeForCausalLM:
    """Return the float32 model that a `dtype` export holds, on the device that computes now."""
    on_gpu = model.model.norm.weight.place.is_gpu_place()
    is_here = on_gpu == paddle.get_device().startswith("gpu")
    return model if dtype == "float32" and is_here else rounded_copy(model, dtype)


def _read_back(
    directory: Path,
    expected: Trace,
    referee: str | None,
    interruptible: Callable[[], AbstractContextManager[None]],
) -> tuple[Comparison, str, str]:
    """Compare the logits of an export with `expected`: the comparison, who read it, what it proves.

    Every rank must call it.
    """
    with consensus.fail_together(), interruptible():
        python = referee or default_referee()
    reason = "torch is not installed here (--referee names a Python that has it)"
    if python is not None:
        judge = Referee(python)

        def judged() -> tuple[Comparison | None, str]:
            try:
                with interruptible():
                    return compare(expected, judge.logits(directory, expected.sequences)), ""
            except RefereeUnable as unable:
                return None, f"{python} cannot read the export: {unable}"

        result, reason = consensus.run_on_main(judged)
        if result is not None:
            note = "the export was loaded by transformers from the directory alone"
            return result, consensus.run_on_main(lambda: judge.reader), note
    found = load_pretrained(directory, dtype="float32")
    result = compare(expected, own_logits(found, expected.sequences))
    note = (
        f"{reason}, so the export was read back by this toolkit's own reader, which proves the "
        "files, not that transformers computes the same"
    )
    return result, "ernie_train", note


def require_change(weights: Path, dtype: str) -> None:
    """Refuse a merge that `dtype` rounds to its base; models without an adapter pass.

    Raises:
        WeightsError: no stored number would differ from the base's.
    """
    if not is_partial(weights):
        return
    base = find_base(weights)
    both = zip(read_parameters(weights), read_parameters(base), strict=True)
    for (_, merged), (_, before) in both:
        if not np.array_equal(convert(merged, DTYPES[dtype]), convert(before, DTYPES[dtype])):
            return
    raise WeightsError(
        f"{weights}: as {dtype}, the merge equals its base {base}: what was trained is lost in "
        "rounding. Export as float32, or train longer or at a higher rate"
    )


def export_adapter(source: Path, directory: Path) -> dict[str, Any]:
    """Write the adapter in `source`, a checkpoint of a LoRA stage, alone; return its settings.

    Raises:
        UserError: there is none, or it is not all that makes the model of its base.
    """
    if not (source / ADAPTER_CONFIG).exists():
        raise UserError(f"{source}: no stage with lora made it, so it holds no adapter")
    base = find_base(source, verify=True)
    if is_partial(base):
        raise UserError(
            f"{source}: its base {base} is an adapter's result too, which no loader of adapters "
            "merges: export without --adapter holds both"
        )
    if list(source.glob("model*.safetensors*")):
        raise UserError(
            f"{source}: the stage trained parameters as well (train:), which an adapter does not "
            "hold: export without --adapter"
        )
    if (source / "config.json").exists():
        one, other = (read_json_object(place / "config.json") for place in (source, base))
        keys = ("rope_theta", "max_position_embeddings")
        if changed := [key for key in keys if one.get(key) != other.get(key)]:
            raise UserError(
                f"{source}: the stage changed {' and '.join(changed)}, which an adapter does not "
                "hold: export without --adapter"
            )
    settings = {**read_json_object(source / ADAPTER_CONFIG), "base_model_name_or_path": str(base)}
    files = TensorFiles(source, ADAPTER)

    def write(temporary: Path) -> dict[str, FileDigest]:
        # In one file, however large: PEFT reads no other.
        digests = write_tensor_files(temporary, ADAPTER, array_entries(files), "1000000GB")
        write_json(temporary / ADAPTER_CONFIG, settings)
        write_json(temporary / BASE, describe_base(base))
        return digests

    write_directory(directory, write, manifest_all=False)
    return settings


def default_referee() -> str | None:
    """Return this interpreter if it has torch and transformers."""
    return sys.executable if find_spec("torch") and find_spec("transformers") else None


@dataclass(frozen=True)
class _ExportedTokenizer:
    """A tokenizer that is saved together with an export's extras."""

    tokenizer: Tokenizer
    extras: Extras

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stop_token_ids(self) -> list[int]:
        return self.tokenizer.stop_token_ids

    def save_pretrained(self, directory: Path, /) -> None:
        self.tokenizer.save_pretrained(directory)
        write_text(directory / "README.md", self.extras.card)
        if self.extras.score is not None:
            shutil.copytree(self.extras.score, directory / SCORE)


def rounded_copy(model: Ernie4_5_MoeForCausalLM, dtype: str) -> Ernie4_5_MoeForCausalLM:
    """Return a float32 model with weights rounded to `dtype`, except those of routers."""
    copy = Ernie4_5_MoeForCausalLM(model.config, model.model.placement, initialize=False)
    for name, tensor in model.state_dict().items():
        array = tensor.astype("float32").numpy()
        if not name.endswith((".mlp.gate.weight", ".e_score_correction_bias")):
            array = convert(array, DTYPES[dtype])
            array = from_bfloat16(array) if dtype == "bfloat16" else array.astype("float32")
        copy.state_dict()[name].set_value(paddle.to_tensor(array))
    copy.carried, copy.generation = model.carried, model.generation
    return copy


def comparison_prompts(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """Return token ids of some texts, and random ones, which reach every embedding and expert."""
    texts = [
        "What is 12 + 30?",
        "Name three prime numbers.",
        "def f(x):\n    return",
        "If A then B.",
    ]
    return [tokenizer.encode(t) for t in texts] + random_prompts(tokenizer.vocab_size, seed)
