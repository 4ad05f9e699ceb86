"""Stops at chosen moments of a stage that runs in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import paddle

from ernie_train.data import load_tokenizer
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.train.stage import StageData, StageRun

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "head_dim": 8, "moe_intermediate_size": 16, "max_position_embeddings": 256,
}  # fmt: skip


class Moments:
    """Stands for the signals of a run: asks for a stop at the `at`-th moment.

    A moment is a watched line that is about to run, or a question whether to stop.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.passed = at, 0

    def one_more(self) -> None:
        self.passed += 1

    @property
    def requested(self) -> bool:
        self.one_more()
        return self.at is not None and self.passed >= self.at

    @contextmanager
    def watching_lines(self, *files: str | None) -> Iterator[None]:
        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                self.one_more()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


def stage_run(root: Path, directory: Path, stop: Moments) -> StageRun:
    """A stage on a small model, the same in every run, with the tokenizer of a workspace."""
    directory.mkdir(parents=True, exist_ok=True)
    paddle.seed(3)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig.preset("tiny", **SIZES))
    data = StageData(root, load_tokenizer(root / "tokenizer"), 5)
    return StageRun(data, directory, model, stop, terminal=False)  # type: ignore[arg-type]
