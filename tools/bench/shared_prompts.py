"""Measure what one computation of a shared prompt saves in RL: scoring and a backward pass.

    python -m tools.bench.shared_prompts [--shape 135m] [--prompt 256] [--group 8] [--tokens 64]

One group of completions goes through a model with random weights, on one thread, with the prompt
computed for each completion and once for all. Times are of the processor, the best of `--repeats`.
`135m` has the sizes of SmolLM2-135M as an ERNIE 4.5 dense model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import paddle

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import MicroBatch, TokenizedCompletion
from ernie_train.rl.estimators import policy_logprobs

SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "moe_num_experts": 0,
    "max_position_embeddings": 8192,
}  # fmt: skip


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of a call."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["tiny", "135m"], default="tiny")
    for name, default in (("prompt", 256), ("group", 8), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    longest = options.prompt + options.tokens
    tiny = Ernie4_5_MoeConfig.preset("tiny", max_position_embeddings=longest)
    model = Ernie4_5_MoeForCausalLM(tiny if options.shape == "tiny" else Ernie4_5_MoeConfig(**SMOL))
    rng = np.random.default_rng(0)

    def draw(size: int) -> list[int]:
        ids: list[int] = rng.integers(3, model.config.vocab_size, size).tolist()
        return ids

    prompt = draw(options.prompt)
    group = [TokenizedCompletion(prompt, draw(options.tokens)) for _ in range(options.group)]

    def logprobs(share: bool) -> paddle.Tensor:
        batch = MicroBatch.without_arrays(group, share_prompts=share)
        return policy_logprobs(model, batch, temperature=1.0)[0]

    def score(share: bool) -> np.ndarray:
        with paddle.no_grad():
            found: np.ndarray = logprobs(share).numpy()
        return found

    def update(share: bool) -> None:
        logprobs(share).sum().backward()
        model.clear_gradients()

    gap = np.abs(score(True) - score(False)).max()
    print(f"{options.shape}: largest difference of a logprob {gap:.1e}")
    works: dict[str, Callable[[bool], object]] = {"scoring": score, "forward and backward": update}
    for name, function in works.items():
        each, once = (
            best_seconds(partial(function, share), options.repeats) for share in (False, True)
        )
        saved = f"{1 - once / each:.0%} less"
        print(f"{name}: {each:.3f} s, {once:.3f} s with the prompt once ({saved})")


if __name__ == "__main__":
    main()
