"""Import a Llama-architecture model as an ERNIE 4.5 directory, and prove that it is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ernie_train.core.errors import UserError, WeightsError
from ernie_train.io.files import write_json
from ernie_train.io.safetensors import convert, from_bfloat16
from ernie_train.run.export import default_referee
from ernie_train.run.llama_reference import llama_logits
from ernie_train.run.proof import (
    GREEDY_TOKENS,
    Receipt,
    Referee,
    RefereeUnable,
    compare,
    differing_tensors,
    random_prompts,
    trace,
)
from ernie_train.weights.convert import convert_model
from ernie_train.weights.hf import DTYPES, load_pretrained
from ernie_train.weights.llama import Source, open_source
from ernie_train.weights.upcycle import UpcycledSource, Upcycling

RECEIPT = "import_receipt.json"


def import_model(
    path: Path,
    out: Path,
    *,
    upcycling: Upcycling | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    referee: str | None = None,
) -> Receipt:
    """Write the model at `path` as the ERNIE 4.5 directory `out`, and leave a receipt in it.

    Args:
        path: a directory with safetensors, or a GGUF file.
        out: the directory to create.
        upcycling: makes a mixture of experts of it.
        dtype: of the weights on disk; None keeps that of the source, of quantized ones float32.
        max_shard_size: the size of a file.
        referee: a Python interpreter with torch and transformers that computes the logits of the
            source; without one this toolkit does.

    Raises:
        UserError: the source cannot be expressed, is damaged, or `out` is in use.
        WeightsError: the comparison fails; directory and failed receipt are kept.
    """
    dense = open_source(path)
    source: Source | UpcycledSource = dense
    if upcycling is not None:
        source = UpcycledSource(dense, upcycling, upcycling.config(dense.config))
    elif dense.is_ernie:
        raise UserError(
            f"{path} is an ERNIE 4.5 model already; --experts makes a mixture of experts of it"
        )
    entries = convert_model(
        source, out, dtype=dtype, max_shard_size=max_shard_size, card=_card(dense, upcycling)
    )
    longest = max(1, dense.config.max_position_embeddings - GREEDY_TOKENS)
    prompts = random_prompts(dense.config.vocab_size, 0, longest)
    expected = trace(load_pretrained(out), prompts)
    found, reader, note = _source_logits(
        dense, expected.sequences, dtype or "", referee or default_referee()
    )
    result = compare(expected, found)
    noise = upcycling.noise if upcycling else 0.0
    tolerance, equal = result.tolerance, result.tokens_equal
    if noise:
        tolerance, equal = float("inf"), True
        note += f"; noise of {noise:g} was asked for, so logits may differ by any amount"
    receipt = Receipt(
        dtype or "as stored", reader, len(prompts), result.difference, tolerance, equal, note,
        result.largest, len(entries), tuple(differing_tensors(out, entries)),
    )  # fmt: skip
    write_json(out / RECEIPT, receipt.as_dict() | ({"tolerance": None} if noise else {}))
    if not receipt.passed:
        raise WeightsError(f"{out}: differs from {path}: {receipt.complaint}")
    return receipt


def _source_logits(
    source: Source, sequences: list[list[int]], dtype: str, python: str | None
) -> tuple[list[np.ndarray], str, str]:
    """Return the logits of the source along `sequences`, who computed them, what they prove."""
    reason = "no interpreter with torch was given (--referee)"
    if python is not None:
        judge = Referee(python)
        try:
            logits = list(judge.logits(source.path, sequences, dtype))
        except RefereeUnable as unable:
            reason = f"{python} cannot read {source.path.name}: {unable}"
        else:
            return logits, judge.reader, "the source's logits are those of transformers"

    def read(name: str) -> np.ndarray:
        stored = DTYPES[dtype] if dtype else "F32"
        array = convert(source.tensors[name], stored)
        return from_bfloat16(array) if stored == "BF16" else array.astype(np.float32)

    logits = llama_logits(source.config, read, sequences, source.interleaved)
    return (
        logits,
        "numpy",
        f"{reason}, so the source's logits are those of a Llama written in numpy",
    )


def _card(source: Source, upcycling: Upcycling | None) -> str:
    name = source.path.resolve().name
    kind = "dense" if upcycling is None else (
        f"upcycled to {upcycling.experts} experts, {upcycling.top_k} a token"
    )  # fmt: skip
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ernie4_5\n"
        f"- ernie_train\n---\n\n# {name}\n\nThe weights of {name} as an ERNIE 4.5 model ({kind}), "
        "converted by ernie_train. The conditions of the original hold.\n\n"
        f"How it was checked: `{RECEIPT}`.\n"
    )
