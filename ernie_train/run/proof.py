"""Compare two models that must compute the same: logits, greedy tokens and stored tensors.

Shapes: S positions of a prompt and its greedy completion, V vocabulary.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_train.core.errors import WeightsError
from ernie_train.generate.engine import generate
from ernie_train.io.safetensors import TensorEntry, TensorFiles, convert
from ernie_train.model import Ernie4_5_MoeForCausalLM

# Largest difference of a logit relative to the largest logit. float32 rounds at 6e-8; over 30
# layers two orders of summation differ by 3e-6, transformers' own two attentions by 1.3e-6.
TOLERANCE = 1e-5
GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Receipt:
    """Result of comparing a directory with the model it was made from."""

    dtype: str
    reader: str  # the program that computed the other side's logits
    prompts: int
    max_logit_difference: float
    tolerance: float  # of the difference: TOLERANCE times the largest logit
    greedy_tokens_equal: bool
    note: str  # what the comparison proves
    max_logit: float = 0.0  # largest magnitude
    stored_tensors: int = 0  # read back and compared bit for bit
    differing_tensors: tuple[str, ...] = ()
    # What means nothing here and was passed on unchanged: of the tensors, of config.json.
    carried_tensors: tuple[str, ...] = ()
    carried_keys: tuple[str, ...] = ()
    # Of a quantized export: scheme, method, and which weights were rounded for want of tokens.
    quantization: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        difference = self.max_logit_difference
        close = math.isfinite(difference) and difference <= self.tolerance
        return self.greedy_tokens_equal and close and not self.differing_tensors

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON with the verdict; NaN and infinities are texts ("nan")."""
        plain = {
            name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**plain, "passed": self.passed}

    @property
    def complaint(self) -> str:
        """Return what differs."""
        stored = ", ".join(self.differing_tensors[:5])
        return (
            f"largest logit difference {self.max_logit_difference:.2e} (allowed "
            f"{self.tolerance:.0e}), greedy tokens "
            f"{'equal' if self.greedy_tokens_equal else 'differ'}, "
            f"{len(self.differing_tensors)} of {self.stored_tensors} stored tensors differ"
            + (f": {stored}" if stored else "")
        )


@dataclass(frozen=True)
class Trace:
    """Hold prompts with their greedy completions, and a model's logits along them.

    prompt_lengths: tokens of each sequence that are prompt.
    sequences: ids of prompt and completion.
    logits: [S,V] float32 of each sequence.
    """

    prompt_lengths: list[int]
    sequences: list[list[int]]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Hold the largest difference of logits, the largest logit and whether tokens are equal."""

    difference: float
    largest: float
    tokens_equal: bool

    @property
    def tolerance(self) -> float:
        return TOLERANCE * self.largest


def random_prompts(vocab_size: int, seed: int, longest: int = 64) -> list[list[int]]:
    """Return four prompts of random ids, which reach every embedding and expert."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    lengths = (min(length, longest) for length in (16, 32, 48, 64))
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def trace(model: Ernie4_5_MoeForCausalLM, prompts: Sequence[Sequence[int]]) -> Trace:
    """Complete the prompts greedily, then compute the logits of the whole sequences."""
    model.eval()
    completions = generate(model, prompts, max_new_tokens=GREEDY_TOKENS)
    sequences = [[*p, *c.ids] for p, c in zip(prompts, completions, strict=True)]
    return Trace(list(map(len, prompts)), sequences, list(own_logits(model, sequences)))


def own_logits(
    model: Ernie4_5_MoeForCausalLM, sequences: Iterable[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Yield the logits [S,V] of each sequence, computed by this toolkit."""
    model.eval()
    with paddle.no_grad():
        for sequence in sequences:
            yield model(paddle.to_tensor([list(sequence)])).logits[0].astype("float32").numpy()


def compare(expected: Trace, found: Iterable[np.ndarray]) -> Comparison:
    """Compare a trace with another model's logits [S,V] along the same sequences.

    Greedy tokens are equal if the other model too prefers each one, or likes it as well as its own
    choice within the tolerance.
    """
    difference, largest, equal = 0.0, 0.0, True
    every = zip(expected.prompt_lengths, expected.sequences, expected.logits, found, strict=True)
    for length, sequence, ours, theirs in every:
        # Unlike Python's max these keep a NaN.
        difference = float(np.maximum(difference, np.abs(ours - theirs).max()))
        largest = float(np.maximum(largest, np.abs(theirs).max()))
        before = theirs[length - 1 : -1]  # position s predicts token s + 1
        chosen = before[np.arange(len(before)), sequence[length:]]
        equal &= bool((before.max(-1) - chosen <= 2 * TOLERANCE * largest).all())
    return Comparison(difference, largest, equal)


def differing_tensors(directory: Path, entries: Iterable[TensorEntry]) -> list[str]:
    """Return the names of stored tensors that are not those of `entries`, bit for bit."""
    files = TensorFiles(directory)
    return [
        entry.name
        for entry in entries
        if entry.name not in files
        or files.stored[entry.name].dtype != entry.dtype
        or convert(files[entry.name], entry.dtype).tobytes()
        != convert(entry.produce(), entry.dtype).tobytes()
    ]


class RefereeUnable(Exception):
    """The interpreter lacks a package that reading the model needs."""


class Referee:
    """Compute logits with transformers in another interpreter; `reader` names its versions then."""

    def __init__(self, python: str) -> None:
        self.python, self.reader = python, ""

    def logits(
        self, model: Path, sequences: Sequence[Sequence[int]], round_to: str = ""
    ) -> Iterator[np.ndarray]:
        """Yield the logits [S,V] of each sequence, one at a time.

        Args:
            model: a model directory or a GGUF file.
            sequences: token ids.
            round_to: a dtype that the weights are rounded to before.

        Raises:
            WeightsError: transformers cannot load the model.
            RefereeUnable: the interpreter lacks a package that a GGUF file needs.
        """
        script = Path(__file__).with_name("referee_script.py")
        with tempfile.TemporaryDirectory(prefix="ernie_train_proof_") as folder:
            request = {
                "model": str(model.resolve()), "out": folder, "round_to": round_to,
                "sequences": [list(map(int, sequence)) for sequence in sequences],
            }  # fmt: skip
            answer = self._ask(script, request, model)
            self.reader = str(answer["reader"])
            for number in range(len(sequences)):
                yield np.load(Path(folder) / f"{number}.npy")

    def _ask(self, script: Path, request: dict[str, Any], model: Path) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [self.python, str(script)],
                input=json.dumps(request), capture_output=True, text=True, check=False,
                start_new_session=True,  # Ctrl-C must not look like a model that cannot be loaded
            )  # fmt: skip
        except OSError as error:
            raise WeightsError(f"{self.python}: cannot be started: {error.strerror}") from None
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        try:
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            raise WeightsError(f"{model}: transformers could not load it: {reason}") from None
        if "unable" in answer:
            raise RefereeUnable(answer["unable"])
        return answer
