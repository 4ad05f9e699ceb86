"""Seconds of a step of SFT on short rows, ours beside TRL's SFTTrainer.

    python -m tools.bench.sft --model-135m DIRECTORY [--threads 1] [--model tiny]

A step trains on all rows, so that both sides do the same whatever their order: ours packs them, TRL
packs them too or pads them in batches of similar length, by what is fastest of what was tried. Both
get the same token ids, of which the answers' are trained, and the same optimizer; the losses of the
steps must agree. A setting of TRL whose first loss is another (documents that see one another) is
left out. `trl/runs.py` says how runs are measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, ClassVar

from tools.bench.rl import check_near
from tools.bench.trl import runs
from tools.bench.trl.runs import OPTIM, SEED, WARM_UP, Comparison, Line, Run

WORDS = (
    "river", "stone", "winter", "garden", "market", "letter", "island", "candle", "bridge",
    "forest", "mirror", "button", "engine", "pepper", "saddle", "window", "copper", "harbor",
)  # fmt: skip
FIRST_LOSS_TOLERANCE, LAST_LOSS_TOLERANCE = 1e-4, 1e-2  # relative; weights drift apart a little
SHORTEST, LONGEST = 2, 40  # words of a question


class SftComparison(Comparison):
    kind = "sft"
    defaults: ClassVar = {
        "tiny": {"rounds": 3, "steps": 3, "trial_steps": 3, "rows": 48, "seq_len": 512},
        "135m": {"rounds": 2, "steps": 2, "trial_steps": 1, "rows": 24, "seq_len": 512},
    }

    def title(self) -> str:
        o = self.options
        return (
            f"SFT step, model {self.model}, {o.rows} short rows, packed by us in {o.seq_len} tokens"
        )

    def write_rows(self) -> None:
        """Write conversations for us; for TRL the token ids and labels that we make of them."""
        from ernie_train.data import DataSource, PackedLoader, load_sources, load_tokenizer

        path = self.directory / "ours.jsonl"
        path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in self._conversations()))
        tokenizer = load_tokenizer(self.model_directory)
        documents, _ = load_sources(
            [DataSource(path=str(path))], tokenizer, kind="sft",
            seq_len=self.options.seq_len, base_dir=".",
        )  # fmt: skip
        with (self.directory / "peer.jsonl").open("w") as file:
            for document in documents[0]:
                ids = document.ids.tolist()
                pairs = zip(ids, document.trainable.tolist(), strict=True)
                labels = [i if trained else -100 for i, trained in pairs]
                print(json.dumps({"input_ids": ids, "labels": labels}), file=file)
        loader = PackedLoader(
            documents, [1.0], self.options.seq_len, 1, seed=SEED, epochs=1,
            pad_id=tokenizer.pad_token_id,
        )  # fmt: skip
        self.packed_rows = len(loader)
        self.tokens = sum(documents[0].lengths.tolist())

    def _conversations(self) -> Iterator[list[dict[str, str]]]:
        chosen = random.Random(SEED)
        for _ in range(self.options.rows):
            words = chosen.choices(WORDS, k=chosen.randint(SHORTEST, LONGEST))
            yield [
                {"role": "user", "content": f"Say these words backwards: {' '.join(words)}"},
                {"role": "assistant", "content": " ".join(reversed(words))},
            ]

    def stage(self) -> dict[str, Any]:
        return {
            "name": self.kind, "kind": "sft", "data": [{"path": f"{self.directory}/ours.jsonl"}],
            "seq_len": self.options.seq_len, "micro_batch_size": 1,
            "grad_accum_steps": self.packed_rows, "steps": WARM_UP + self.options.steps,
            "optim": {**OPTIM, "schedule": "constant", "warmup_steps": 0},
        }  # fmt: skip

    def peer_request(self) -> dict[str, Any]:
        return {"seq_len": self.options.seq_len}

    def peer_settings(self) -> Iterator[dict[str, Any]]:
        padded = {"packing": False, "batch": 8, "keep_freed_memory": True}
        yield padded
        if not self.options.quick:
            yield {**padded, "packing": True}
            yield {**padded, "batch": 4}
            yield {**padded, "batch": 16}
            yield {**padded, "keep_freed_memory": False}

    def run_peer(self, setting: dict[str, Any], steps: int | None = None) -> Run:
        """Run TRL; a setting that computes another loss is refused."""
        run = super().run_peer(setting, steps)
        (loss,) = run.first[0]["losses"]
        self.peer_loss = getattr(self, "peer_loss", loss)
        check_near("first loss", loss, self.peer_loss, FIRST_LOSS_TOLERANCE)
        return run

    def check(self, ours: Run, peer: Run) -> str:
        first = (ours.first[0]["loss"], peer.first[0]["losses"][0])
        last = (ours.lines[-1]["loss"], peer.lines[-1]["losses"][0])
        check_near("first loss", *first, FIRST_LOSS_TOLERANCE)
        check_near("last loss", *last, LAST_LOSS_TOLERANCE)
        return (
            f"same work: {self.tokens} tokens a step, {self.tokens / self.options.rows:.0f} a row; "
            f"first losses {first[0]:.5f} (ours), {first[1]:.5f} (TRL); last {last[0]:.5f}, "
            f"{last[1]:.5f}"
        )

    def phases(self, line: Line, side: str) -> dict[str, float]:
        if side == "TRL":
            told = {name: line["phases"].get(name, 0.0) for name in ("forward", "backward")}
        else:
            told = {name: line["time"][f"{name}_seconds"] for name in ("forward", "backward")}
        return {**told, "update and rest": line["seconds"] - sum(told.values())}


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seq-len", type=int)
    runs.compare(parser, SftComparison)


if __name__ == "__main__":
    main()
