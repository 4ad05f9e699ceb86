"""Tokens per second of our `generate` beside that of transformers on torch.

    python -m tools.bench.rollout --threads 1 [--model tiny] [--temperature 0] [--compile]
    python -m tools.bench.rollout --threads 1 --model 135m --batch 32 --rounds 5 --trials 2

Models: the preset `tiny`, that of `versus.py`, and if asked for a dense one of SmolLM2-135M's shape
with random weights. Both sides complete the same random prompts
with the same exported weights, all to the same length; greedy completions must agree. Ours returns
the logprobs of what it sampled, the peer is spared them. `versus.py` says how the sides are
measured and the figures read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tools.bench import versus
from tools.bench.ranks import Ranks
from tools.bench.versus import MODEL, Bench, Ours, Work

DENSE_135M: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "moe_num_experts": 0,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, str | dict[str, Any]] = {"tiny": "tiny", "bench": MODEL, "135m": DENSE_135M}
BY_DEFAULT = ("tiny", "bench")
TRIAL_TOKENS = 16
# Sums in another order turn a choice between equals around; from there on a completion differs.
COMPARED_TOKENS, LEAST_AGREEMENT = 8, 0.9


class OurRollouts(Ours):
    """Completions by `generate`."""

    def work(self, request: Work) -> dict[str, Any]:
        """Complete a batch of prompts; return the new ids."""
        from ernie_train.generate.engine import generate

        completions = generate(
            self.model,
            request["prompts"],
            max_new_tokens=request["new_tokens"],
            temperature=request["temperature"],
            seed=request["seed"],
        )
        return {"ids": [completion.ids for completion in completions]}


class RolloutBench(Bench):
    module = "tools.bench.rollout"
    dimensions: tuple[str, ...] = ("experts", "attention", "cache")
    compile_with = {"cache": "static"}

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        super().__init__(options, MODELS[name])
        self.name = name
        if name == "135m":
            self.dimensions = ("attention", "cache")

    def title(self) -> str:
        options = self.options
        kind = "greedy" if options.temperature == 0 else f"sampling at {options.temperature}"
        return (
            f"model {self.name}, batch {options.batch}, prompts of {options.prompt_tokens} tokens, "
            f"{options.new_tokens} new ones, {kind}"
        )

    def trials(self) -> Iterator[tuple[Work, int]]:
        for trial in range(self.options.trials):
            work = self._work(trial, new_tokens=TRIAL_TOKENS)
            yield work, self.options.batch * TRIAL_TOKENS

    def round(self, number: int) -> tuple[Work, int]:
        return self._work(number + 1), self.options.batch * self.options.new_tokens

    def check_start(self, ours: Ranks, peer: Ranks) -> str:
        greedy = self._work(0, temperature=0.0)
        agreement = check_agreement(*(side.ask(work=greedy)["ids"] for side in (ours, peer)))
        return f"first {COMPARED_TOKENS} greedy tokens agree in {agreement:.0%} of the completions"

    def _work(self, seed: int, **changes: Any) -> Work:
        """Return a batch of random prompts, all different."""
        import numpy as np

        shape = (self.options.batch, self.options.prompt_tokens)
        prompts = np.random.default_rng(seed).integers(3, self.vocab_size, shape).tolist()
        sampling = {"temperature": self.options.temperature, "seed": seed}
        return {"prompts": prompts, "new_tokens": self.options.new_tokens, **sampling, **changes}


def check_agreement(ours: list[list[int]], peer: list[list[int]]) -> float:
    """Return the share of completions that begin alike; `RuntimeError` if too few do."""
    if [len(ids) for ids in ours] != [len(ids) for ids in peer]:
        raise RuntimeError("the sides completed to different lengths")
    alike = [a[:COMPARED_TOKENS] == b[:COMPARED_TOKENS] for a, b in zip(ours, peer, strict=True)]
    agreement = sum(alike) / len(alike)
    if agreement < LEAST_AGREEMENT:
        raise RuntimeError(f"only {agreement:.0%} of the greedy completions begin alike")
    return agreement


def main() -> None:
    parser = versus.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, help="default: tiny, then bench")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    options = versus.parse(parser)
    if options.serve_ours:
        OurRollouts.serve()
        return
    for name in [options.model] if options.model else BY_DEFAULT:
        RolloutBench(options, name).run()


if __name__ == "__main__":
    main()
