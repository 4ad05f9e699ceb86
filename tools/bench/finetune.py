"""Our side of `tools.evidence.own_model`: fine-tunes a model, in turns with a peer.

It answers requests (see `protocol.py`) and is idle between them:

    {"build": {"model": DIR, "template": NAME_OR_FILE, "train": FILE, "held_out": FILE,
               "directory": DIR, "lora": {...}, "seq_len": 512, "optim": {...}, "steps": 30}}
        writes the batches of all steps and, with LoRA, the fresh adapter in `directory`
    {"work": {"steps": 5}} -> {"losses": [...], "tokens": 1234, "seconds": 1.0, "cpu_seconds": 2.0}
    {"peak": {}}           -> {"gb": the most memory that was resident since `build`}
    {"held_out": {}}       -> {"loss": mean in nats over the trained tokens of the held-out rows}
    {"solve": {}}          -> {"solved": 12, "problems": 40}, greedy, by the rows' verifier
    {"save": {}}           -> {"checkpoint": DIR}
    {"logits": {"ids": [[...]]}} -> {"file": FILE.npy}
    {"describe": {}}       -> {"set_up": [...]} of this process
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.protocol import begin_peak, peak_gb, serve, timed

if TYPE_CHECKING:
    from ernie_train.data import Documents

NEW_TOKENS = 96  # of an answer to a tool problem
SEED = 1


class FineTune:
    """A model of one's own with its optimizer, and the batches of all steps."""

    def __init__(self, request: dict[str, Any]) -> None:
        # The package's import sets the processor up, before Paddle is imported.
        from ernie_train.core.devices import seed_everything
        from ernie_train.data import load_tokenizer
        from ernie_train.train import OptimConfig, Optimizer, PackedLoss, Trainer
        from ernie_train.weights import load_pretrained

        seed_everything(SEED)
        self.request, self.directory = request, Path(request["directory"])
        self.tokenizer = load_tokenizer(request["model"], template=request["template"])
        self.model = load_pretrained(request["model"])
        self.batches = self._write_batches()
        if request["lora"] is not None:
            self._adapt(request["lora"])
            self.save("start")
        self.model.train()
        self.loss = PackedLoss("tokens")
        self.optimizer = Optimizer(self.model, OptimConfig(**request["optim"]))
        self.trainer: Any = Trainer(self.model, self.optimizer)
        begin_peak()

    def _documents(self, file: str) -> list[Documents]:
        from ernie_train.data import DataSource, load_sources

        documents, _ = load_sources(
            [DataSource(path=file)],
            self.tokenizer,
            kind="sft",
            seq_len=self.request["seq_len"],
            base_dir=".",
        )
        return documents

    def _loader(self, file: str, epochs: int | None) -> Any:
        from ernie_train.data import PackedLoader

        length, pad = self.request["seq_len"], self.tokenizer.pad_token_id
        return PackedLoader(
            self._documents(file), [1.0], length, 1, seed=SEED, epochs=epochs, pad_id=pad
        )

    def _write_batches(self) -> list[Any]:
        """Return the batch of each step, and leave them for the peer: arrays [steps,1,S]."""
        import numpy as np

        batches = iter(self._loader(self.request["train"], None))
        made = [next(batches) for _ in range(self.request["steps"])]
        names = ("input_ids", "labels", "loss_mask", "position_ids", "document_ids")
        arrays: dict[str, Any] = {n: np.stack([getattr(b, n) for b in made]) for n in names}
        np.savez(self.directory / "batches.npz", **arrays)
        return made

    def _adapt(self, settings: dict[str, Any]) -> None:
        from ernie_train.model.lora import LoraConfig
        from ernie_train.model.partial import begin_partial_training, select
        from ernie_train.weights.adapters import describe_base
        from ernie_train.weights.layout import parameter_shapes

        lora = LoraConfig(**settings)
        selection = select(parameter_shapes(self.model.config), lora, [], [])
        base = describe_base(Path(self.request["model"]))
        begin_partial_training(self.model, selection, lora, base, SEED)

    def work(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the next `steps` optimizer steps; return their losses."""
        losses, tokens, total = [], 0, self.request["steps"]
        for _ in range(request["steps"]):
            result = self.trainer.train_step([self.batches[self.trainer.step]], self.loss, total)
            losses.append(result.metrics["loss"])
            tokens += result.tokens
        return {"losses": losses, "tokens": tokens}

    def held_out(self) -> dict[str, Any]:
        """Return the mean loss over the trained tokens of the held-out rows."""
        import paddle

        total = count = 0.0
        self.model.eval()
        with paddle.no_grad():
            for batch in self._loader(self.request["held_out"], 1):
                mean = self.loss(self.model, batch).metrics["loss"]
                total, count = total + mean.sum, count + mean.count
        self.model.train()
        return {"loss": total / count}

    def solve(self) -> dict[str, Any]:
        """Return how many of the held-out problems a greedy answer solves."""
        from ernie_train.eval.evaluation import EvalConfig, evaluate
        from ernie_train.eval.problems import load_problems

        self.model.eval()
        problems = load_problems(self.request["held_out"])
        config = EvalConfig(max_new_tokens=NEW_TOKENS, batch_size=len(problems))
        found = evaluate(self.model, self.tokenizer, problems, config)
        self.model.train()
        solved = sum(sample["status"] == "correct" for sample in found.samples)
        return {"solved": solved, "problems": len(problems)}

    def save(self, run: str) -> dict[str, Any]:
        """Write a checkpoint and the tokenizer, as in the run directory `run`."""
        from ernie_train.weights import CheckpointStore

        root = self.directory / run
        store = CheckpointStore(root / "01-sft" / "checkpoints")
        self.tokenizer.save_pretrained(root / "tokenizer")
        return {"checkpoint": str(store.save(1, model=self.model, optimizer={}, state={}))}

    def logits(self, ids: list[list[int]]) -> dict[str, Any]:
        """Return a file of the logits [B,S,V] of ids [B,S]."""
        import numpy as np
        import paddle

        self.model.eval()
        with paddle.no_grad():
            found = self.model(paddle.to_tensor(ids)).logits.numpy()
        np.save(self.directory / "logits.npy", found)
        return {"file": str(self.directory / "logits.npy")}


def main() -> None:
    """Serve requests until standard input ends."""
    built: list[FineTune] = []

    def build(request: dict[str, Any]) -> dict[str, Any]:
        built.append(FineTune(request))
        return {}

    def describe(_: Any) -> dict[str, Any]:
        from ernie_train.core.cpu import cpu_setup_report
        from ernie_train.kernels import describe_kernels

        return {"set_up": [f"kernels: {describe_kernels()}", *cpu_setup_report()]}

    handlers = {
        "build": build,
        "work": lambda request: timed(lambda: built[0].work(request)),
        "peak": lambda _: {"gb": peak_gb()},
        "held_out": lambda _: built[0].held_out(),
        "solve": lambda _: built[0].solve(),
        "save": lambda _: built[0].save("run"),
        "logits": lambda request: built[0].logits(request["ids"]),
        "describe": describe,
    }
    serve(handlers, unsupported=())


if __name__ == "__main__":
    main()
