"""Export to a Hugging Face directory, and proof that the export computes what the model does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import WeightsError
from ernie_train.data import Tokenizer
from ernie_train.generate.engine import generate
from ernie_train.io.files import write_json, write_text
from ernie_train.io.safetensors import from_bfloat16, to_bfloat16
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import load_pretrained, save_pretrained

RECEIPT = "export_receipt.json"
TOLERANCE = 2e-5  # largest difference of a logit, absolute, in float32
_GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Receipt:
    """Result of comparing an export with the model it was made from."""

    dtype: str
    reader: str  # the program that loaded the exported directory
    prompts: int
    max_logit_difference: float
    tolerance: float
    greedy_tokens_equal: bool
    note: str

    @property
    def passed(self) -> bool:
        return self.greedy_tokens_equal and self.max_logit_difference <= self.tolerance


def export(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    dtype: str,
    card: str,
    max_shard_size: int | str = "5GB",
    referee: str | None = None,
    thinking: bool = True,
    seed: int = 0,
) -> Receipt:
    """Write `directory`, read it back, compare, and leave the receipt and model card in it.

    Every rank must call it. The comparison is on `comparison_prompts` of this `seed`. With bfloat16
    the reference is the float32 model on bfloat16-rounded weights.

    Args:
        card: the text of README.md.
        referee: a Python interpreter with torch and transformers that reads the directory back;
            by default this one if it has them, else this toolkit's own reader does.
        thinking: picks the chat template that is written beside the model.

    Raises:
        WeightsError: the comparison fails; directory and failed receipt are kept.
    """
    prompts = comparison_prompts(tokenizer, seed)
    files = _TokenizerFiles(tokenizer, thinking)
    save_pretrained(model, directory, files, dtype=dtype, max_shard_size=max_shard_size)
    consensus.run_on_main(lambda: write_text(directory / "README.md", card))
    reference = rounded_copy(model) if dtype == "bfloat16" else model
    expected = _own_results(reference, prompts)
    if referee is None and find_spec("torch") and find_spec("transformers"):
        referee = sys.executable
    if referee is None:
        found = _own_results(load_pretrained(directory, dtype="float32"), prompts)
        reader = "ernie_train"
        note = "torch is not installed here: the export was read back by this toolkit's own reader"
    else:
        python = referee
        found, reader = consensus.run_on_main(lambda: _referee_results(python, directory, prompts))
        note = "the export was loaded by transformers from the directory alone"
    worst = max(float(np.abs(a - b).max()) for a, b in zip(expected[0], found[0], strict=True))
    receipt = Receipt(dtype, reader, len(prompts), worst, TOLERANCE, expected[1] == found[1], note)
    with consensus.fail_together():
        if process_group.is_main():
            write_json(directory / RECEIPT, {**asdict(receipt), "passed": receipt.passed})
        if not receipt.passed:
            raise WeightsError(
                f"{directory}: the exported model differs from the trained one: largest logit "
                f"difference {worst:.2e} (allowed {TOLERANCE:.0e}), greedy tokens "
                f"{'equal' if receipt.greedy_tokens_equal else 'differ'}"
            )
    return receipt


@dataclass(frozen=True)
class _TokenizerFiles:
    """A tokenizer that is saved with the chat template that its model was trained with."""

    tokenizer: Tokenizer
    thinking: bool

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stop_token_ids(self) -> list[int]:
        return self.tokenizer.stop_token_ids

    def save_pretrained(self, directory: Path, /) -> None:
        self.tokenizer.save_pretrained(directory, thinking=self.thinking)


def rounded_copy(model: Ernie4_5_MoeForCausalLM) -> Ernie4_5_MoeForCausalLM:
    """Return a float32 model with weights rounded to bfloat16, except those of routers."""
    copy = Ernie4_5_MoeForCausalLM(model.config, model.model.placement)
    for name, tensor in model.state_dict().items():
        array = tensor.astype("float32").numpy()
        if not name.endswith((".mlp.gate.weight", ".e_score_correction_bias")):
            array = from_bfloat16(to_bfloat16(array))
        copy.state_dict()[name].set_value(paddle.to_tensor(array))
    return copy


def comparison_prompts(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """Return token ids of some texts, and random ones, which reach every embedding and expert."""
    texts = [
        "What is 12 + 30?",
        "Name three prime numbers.",
        "def f(x):\n    return",
        "If A then B.",
    ]
    rng = np.random.Generator(np.random.Philox(key=seed))
    random = [rng.integers(0, tokenizer.vocab_size, length).tolist() for length in (16, 32, 48, 64)]
    return [tokenizer.encode(text) for text in texts] + random


Results = tuple[list[np.ndarray], list[list[int]]]


def _own_results(model: Ernie4_5_MoeForCausalLM, prompts: Sequence[Sequence[int]]) -> Results:
    """Return logits [len(prompt),V] of each prompt and the tokens of its greedy completion."""
    model.eval()
    with paddle.no_grad():
        logits = [model(paddle.to_tensor([list(p)])).logits[0].numpy() for p in prompts]
    completions = generate(model, prompts, max_new_tokens=_GREEDY_TOKENS)
    return logits, [completion.ids for completion in completions]


def _referee_results(
    python: str, directory: Path, prompts: Sequence[Sequence[int]]
) -> tuple[Results, str]:
    """Return the results of transformers in the interpreter `python`, and its version."""
    script = Path(__file__).with_name("referee_script.py")
    request = {
        "directory": str(directory),
        "prompts": [[int(token) for token in prompt] for prompt in prompts],
        "greedy_tokens": _GREEDY_TOKENS,
    }
    done = subprocess.run(
        [python, str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WeightsError(f"{directory}: transformers could not load the export: {reason[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    logits = [np.array(rows, np.float32) for rows in answer["logits"]]
    return (logits, answer["tokens"]), str(answer["reader"])
