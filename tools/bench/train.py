"""Tokens per second of our training step beside that of transformers on torch.

    python -m tools.bench.train --threads 1 [--ranks 2] [--compile] [--documents 90]

Both train the same model on the same batches with the same optimizer settings; the losses must
agree. With `--documents` a batch has as many tokens in documents of that mean length: ours packs
them, the peer pads documents of similar length in its best batch. With `--ranks` the rows or
documents of a batch are divided between that many processes of ours; the peer takes as many, with
DistributedDataParallel over gloo, or one with as many threads, whichever is faster. `versus.py`
says how the sides are measured and the figures read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tools.bench import versus
from tools.bench.protocol import document_lengths, random_batch, random_documents, split_rows
from tools.bench.ranks import Ranks
from tools.bench.versus import MODEL, Bench, Ours, Work

if TYPE_CHECKING:
    from ernie_train.data import Batch
    from ernie_train.train.trainer import Trainer

OPTIM = {
    "lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0,
}  # fmt: skip
SEED = 0
WARM_UP_STEPS = 2
SCREENING_TOKENS = 128  # `batched_mm` gathers weights for every token and takes minutes
# Both sides add up in other orders, so their weights drift apart a little in every step.
FIRST_LOSS_TOLERANCE, LAST_LOSS_TOLERANCE = 1e-4, 1e-2


class OurTraining(Ours):
    """The toolkit's own training step, on the batches that the peer trains on."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(request)
        import numpy as np

        from ernie_train.train.optimizer import OptimConfig, Optimizer
        from ernie_train.train.supervised import PackedLoss
        from ernie_train.train.trainer import Trainer

        optim: dict[str, Any] = {k: v for k, v in OPTIM.items() if k != "max_grad_norm"}
        config = OptimConfig(schedule="constant", clip_grad_norm=OPTIM["max_grad_norm"], **optim)
        self.model.train()
        self.trainer: Trainer[Any, Batch] = Trainer(self.model, Optimizer(self.model, config))
        self.loss_fn = PackedLoss("tokens")
        self.random = np.random.default_rng(SEED)

    def work(self, request: Work) -> dict[str, Any]:
        """Run `steps` optimizer steps on fresh batches; return their mean losses per token."""
        return {"losses": [self._step(request) for _ in range(request["steps"])]}

    def _step(self, request: Work) -> float:
        if lengths := request.get("documents"):
            batches = random_documents(self.random, self.vocab_size, lengths, self.ranks)
        else:
            batch = random_batch(self.random, self.vocab_size, *request["batch"])
            batches = split_rows(batch, self.ranks)
        return self.trainer.train_step(batches, self.loss_fn, sys.maxsize).metrics["loss"]


class TrainBench(Bench):
    module = "tools.bench.train"
    dimensions: tuple[str, ...] = ("experts", "attention")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, MODEL)
        self.batch = (options.rows, options.length)
        self.peer_request = {"optim": OPTIM, "seed": SEED}
        self.dimensions += ("ranks",) if options.ranks > 1 else ()
        self.dimensions += ("padded_documents",) if options.documents else ()

    def title(self) -> str:
        rows, length = self.batch
        batch = f"{rows} x {length} tokens"
        if mean := self.options.documents:
            batch = f"{rows * length} tokens in documents of {mean} on average"
        return f"model {MODEL}\noptimizer AdamW {OPTIM}, fused\nbatch {batch}"

    def _work(self, rows: int, length: int, steps: int) -> Work:
        work: Work = {"batch": [rows, length], "steps": steps}
        if mean := self.options.documents:
            work["documents"] = document_lengths(SEED, rows * length, mean)
        return work

    def trials(self) -> Iterator[tuple[Work, int]]:
        ranks = self.options.ranks
        screening = (ranks, SCREENING_TOKENS // ranks)
        sizes = [screening] * 2 + [self.batch] * (WARM_UP_STEPS + self.options.trials)
        for rows, length in sizes:
            yield self._work(rows, length, 1), rows * length

    def round(self, number: int) -> tuple[Work, int]:
        rows, length = self.batch
        steps = self.options.steps
        return self._work(rows, length, steps), rows * length * steps

    def check_start(self, ours: Ranks, peer: Ranks) -> str:
        work = self._work(*self.batch, WARM_UP_STEPS)
        first, other = (side.ask(work=work)["losses"][0] for side in (ours, peer))
        check_losses(first, other, FIRST_LOSS_TOLERANCE)
        return f"same start: first losses {first:.5f} (ours), {other:.5f} (peer)"

    def check_end(self, ours: dict[str, Any], peer: dict[str, Any]) -> str:
        last, other = ours["losses"][-1], peer["losses"][-1]
        check_losses(last, other, LAST_LOSS_TOLERANCE)
        return f"same training: last losses {last:.5f} (ours), {other:.5f} (peer)"


def check_losses(ours: float, peer: float, tolerance: float) -> None:
    """Raise `RuntimeError` if the sides do not train the same model on the same data."""
    if not abs(ours - peer) <= tolerance * abs(peer):
        raise RuntimeError(f"the sides train different things: loss {ours} (ours), {peer} (peer)")


def main() -> None:
    parser = versus.parser(__doc__)
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="processes of our side")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=0, help="mean length of short documents")
    parser.add_argument("--steps", type=int, default=2, help="steps a side does in each round")
    options = versus.parse(parser)
    if options.rows % options.ranks:
        parser.error(f"{options.rows} rows cannot be divided between {options.ranks} ranks")
    if options.serve_ours:
        OurTraining.serve()
    else:
        TrainBench(options).run()


if __name__ == "__main__":
    main()
