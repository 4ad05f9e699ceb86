"""A prompt that is computed once for all of its completions: the same numbers, and fewer tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.model.attention import layer
from ernie_train.model.batch_layout import BatchLayout, Document
from ernie_train.rl.batch import MicroBatch
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import policy_logprobs, sequence_logprobs, sequence_values
from tests.rl.test_batch import sharing_sequences
from tests.small_models import make_model

KINDS: dict[str, dict[str, Any]] = {"moe": {}, "dense": {"moe_num_experts": 0}}


def logprobs_and_gradients(model: Any, *, share: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    batch = MicroBatch.without_arrays(sharing_sequences(), share_prompts=share)
    logprobs, _, _ = policy_logprobs(model, batch, temperature=0.7)
    weights = np.random.default_rng(1).normal(size=logprobs.shape[0]).astype(np.float32)
    (logprobs * paddle.to_tensor(weights)).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return logprobs.numpy(), gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["blocked", "online"])
def test_logprobs_and_gradients_are_those_of_prompts_computed_each_time(
    kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "online":
        monkeypatch.setattr(layer, "_kernel", lambda bucket: layer.online)
    model = make_model(**KINDS[kind])
    plain, expected = logprobs_and_gradients(model, share=False)
    shared, found = logprobs_and_gradients(model, share=True)
    np.testing.assert_allclose(shared, plain, rtol=1e-5, atol=2e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, atol=1e-4 * size + 1e-6, err_msg=name)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_scores_are_the_same_in_batches_of_any_size(batch_size: int) -> None:
    model, sequences = make_model(), sharing_sequences()
    critic = Critic(model)
    values = np.random.default_rng(3).normal(0, 0.3, critic.value_head.weight.shape)
    critic.value_head.weight.set_value(values.astype(np.float32))
    for score in (
        lambda **share: (
            sequence_logprobs(
                model, sequences, temperature=1.0, batch_size=batch_size, **share
            ).logprobs
        ),
        lambda **share: sequence_values(critic, sequences, batch_size=batch_size, **share),
    ):
        for one, other in zip(score(), score(share_prompts=True), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_the_router_sees_each_prompt_once() -> None:
    """What statistics count is what went through the model, and what the balance is divided by."""
    batch = MicroBatch.without_arrays(sharing_sequences(), share_prompts=True)
    _, _, stats = policy_logprobs(make_model(), batch, temperature=1.0)
    assert [one.router_probs.shape[0] for one in stats] == [batch.num_tokens] * len(stats)


def test_a_prompt_ends_for_flashmask_with_the_last_that_continues_it() -> None:
    layout = BatchLayout.shared_prompts([(3, [2, 0, 1]), (2, [1])])
    ends = layout.attention(4, 2).document_ends.numpy().reshape(-1)
    assert ends.tolist() == [6, 6, 6, 5, 5, 6, 9, 9, 9]
    assert layout.default_positions().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    prompt = Document(0, 3)
    assert layout.documents[:2] == [prompt, Document(3, 2, prompt)]
