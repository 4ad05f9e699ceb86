"""Router replay: the update takes the experts of sampling, and its router still learns.

Referees: a router in float64 numpy, finite differences of it, and the model's own forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie_train.core.errors import CheckpointError, UserError
from ernie_train.environments import Episode, StepResult
from ernie_train.generate import generate
from ernie_train.model.moe import Router
from ernie_train.parallel.recompute import RecomputeConfig, enable_recompute
from ernie_train.rl.batch import MicroBatch, RolloutBatch, TokenizedCompletion, micro_batches
from ernie_train.rl.estimators import policy_logprobs, sequence_logprobs
from ernie_train.rl.loss import UpoLoss
from ernie_train.rl.rollout import read_rollout, write_rollout
from ernie_train.rl.routing import require_experts
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.trainer import Trainer
from tests.losses.finite_differences import gradient
from tests.rl.records import make_scored, make_sequences
from tests.small_models import make_config, make_model, state


def sampled(model, count=6):
    """Completions of `model` with all that sampling knows."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 90, n).tolist() for n in rng.integers(2, 14, count)]
    found = generate(model, prompts, max_new_tokens=12, temperature=1.0, seed=5,
                     record_experts=True, record_prompt_experts=True)  # fmt: skip
    return [
        TokenizedCompletion(p, c.ids, expert_ids=c.expert_ids,
                            prompt_expert_ids=c.prompt_expert_ids)
        for p, c in zip(prompts, found, strict=True)
    ], [np.array(c.logprobs, np.float32) for c in found]  # fmt: skip


def moved(scale=0.05):
    """The model of `make_model` after a change of all its weights, as by an update."""
    model = make_model()
    rng = np.random.default_rng(2)
    for tensor in model.state_dict().values():
        noise = rng.normal(0, scale, tensor.shape).astype(np.float32)
        tensor.set_value(tensor.numpy() + noise)
    return model


def estimates(model, sequences, replay):
    found = sequence_logprobs(model, sequences, temperature=1.0, batch_size=4, router_replay=replay)
    return found.logprobs, found.experts_changed


def test_the_same_weights_give_the_sampled_logprobs_with_replay_and_without():
    sequences, logprobs = sampled(make_model())
    for replay in (False, True):
        found, changed = estimates(make_model(), sequences, replay)
        assert changed == 0.0
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(logprobs), atol=2e-5)


def test_after_an_update_the_experts_stay_and_logprobs_are_nearer_to_the_sampled_ones():
    sequences, logprobs = sampled(make_model(), 32)
    gaps = {}
    for replay in (False, True):
        found, changed = estimates(moved(0.002), sequences, replay)
        gaps[replay] = np.abs(np.expm1(np.concatenate(found) - np.concatenate(logprobs)))
        assert (changed == 0.0) == replay
    assert gaps[True].mean() < 0.9 * gaps[False].mean()


@pytest.mark.parametrize("norm_min", [1e-12, 0.9])
def test_the_router_at_replayed_experts_is_that_of_numpy_and_so_is_its_gradient(norm_min):
    rng = np.random.default_rng(3)
    router = Router(make_config(moe_norm_min=norm_min))
    weight = rng.normal(0, 0.3, router.weight.shape)
    router.weight.set_value(weight.astype(np.float32))
    x, factors = rng.normal(size=(5, 32)), rng.normal(size=(5, 2))
    taken = np.array([[3, 0], [-1, -1], [1, 2], [0, 1], [2, 3]])
    bias = paddle.to_tensor(np.array([[5.0, 0.0, 0.0, 1.0]], np.float32))

    def by_hand(weight):
        logits = x @ weight
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        ids = np.where(taken < 0, np.argsort(-(probs + bias.numpy()))[:, :2], taken)
        chosen = np.take_along_axis(probs, ids, 1)
        return chosen / np.maximum(chosen.sum(-1, keepdims=True), norm_min), ids

    _, weights, ids = router(paddle.to_tensor(x.astype(np.float32)), bias, paddle.to_tensor(taken))
    expected, expected_ids = by_hand(weight)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    (weights * paddle.to_tensor(factors.astype(np.float32))).sum().backward()
    slopes = gradient(lambda w: float((by_hand(w)[0] * factors).sum()), weight)
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(router.weight.grad.numpy(), slopes, atol=1e-5)


def update_batch(sequences, logprobs):
    rng = np.random.default_rng(4)
    advantages = [np.full(len(a), rng.normal(), np.float32) for a in logprobs]
    count = len(sequences)
    return RolloutBatch(sequences, (), count, 1, None, logprobs, (), advantages)


def step(model, batch, replay, recompute=None):
    model.train()
    if recompute is not None:
        enable_recompute(model, recompute)
    trainer = Trainer(model, Optimizer(model, OptimConfig(lr=1e-3, schedule="constant")))
    loss = UpoLoss(1.0, (0.2, 0.2), router_replay=replay)
    result = trainer.train_step(micro_batches(batch, range(len(batch.sequences)), (), 3), loss, 9)
    return result, state(model)


def test_an_update_takes_the_recorded_experts_and_moves_the_router():
    """Also those of prompts: the load of the step is that of the recorded experts."""
    sequences, logprobs = sampled(make_model())
    batch = update_batch(sequences, logprobs)
    before = state(moved())
    result, after = step(moved(), batch, replay=True)
    recorded = np.concatenate([s.routing for s in sequences])
    assert (recorded >= 0).all()
    for layer in range(recorded.shape[1]):
        counts = np.bincount(recorded[:, layer].reshape(-1), minlength=4)
        np.testing.assert_array_equal(result.load.tokens_per_expert[layer], counts)
    routers = [name for name in after if name.endswith("gate.weight")]
    assert routers and all((after[name] != before[name]).any() for name in routers)
    _, free = step(moved(), batch, replay=False)
    assert any((after[name] != free[name]).any() for name in after)


@pytest.mark.parametrize(
    "recompute",
    [True, RecomputeConfig(parts=("experts",)), RecomputeConfig(chunk_tokens=7),
     RecomputeConfig(parts=("attention",)), RecomputeConfig(parts=("experts",), chunk_tokens=5)],
)  # fmt: skip
def test_recomputed_layers_take_the_recorded_experts_again(recompute):
    batch = update_batch(*sampled(make_model()))
    plain, expected = step(moved(), batch, replay=True)
    found, weights = step(moved(), batch, True, recompute)
    assert found.metrics["policy"] == pytest.approx(plain.metrics["policy"], rel=1e-5)
    assert found.metrics["grad_norm"] == pytest.approx(plain.metrics["grad_norm"], rel=1e-4)
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, atol=3e-5, err_msg=name)


def test_sequences_without_experts_are_routed_freely_beside_those_with_them():
    """Such as those of offline pairs."""
    sequences, _ = sampled(make_model())
    bare = make_sequences(3)
    mixed = MicroBatch.without_arrays([bare[0], sequences[0], bare[1]])
    with paddle.no_grad():
        found, _, _ = policy_logprobs(moved(), mixed, temperature=1.0, router_replay=True)
        alone = [
            policy_logprobs(moved(), MicroBatch.without_arrays([s]), temperature=1.0,
                            router_replay=True)[0].numpy()
            for s in mixed.sequences
        ]  # fmt: skip
        free = MicroBatch.without_arrays(bare)
        assert free.routing is None
    np.testing.assert_allclose(found.numpy(), np.concatenate(alone), atol=1e-5)


class Numbers:
    """A tokenizer for turns of which no text is read."""

    def decode(self, ids):
        return str(ids)


def played(model, *, record_prompts=True):
    """An episode of two calls and an answer, as `play_episodes` puts it together."""
    episode, prompt = Episode(), [5, 6, 7, 8]
    for turn, results in enumerate(([11, 12, 13], [14], None)):
        (one,) = generate(
            model, [prompt + episode.completion_ids], max_new_tokens=4, temperature=1.0, seed=turn,
            record_experts=True, record_prompt_experts=record_prompts,
        )  # fmt: skip
        episode.add_turn(one, Numbers())
        if results is not None:
            assert episode.add_results(StepResult([], done=False), results, most=99)
    return TokenizedCompletion(
        prompt, episode.completion_ids, sampled_mask=episode.sampled_mask,
        expert_ids=episode.expert_ids, prompt_expert_ids=episode.prompt_expert_ids,
    )  # fmt: skip


def test_results_of_tools_take_the_experts_that_the_next_turn_chose_for_them():
    """Referee: the model's own forward pass over the whole episode."""
    model, made = make_model(), played(make_model())
    assert sum(made.sampled_mask) == 12 and len(made.completion_ids) == 16
    ids = paddle.to_tensor(np.array([made.prompt_ids + made.completion_ids[:-1]]))
    with paddle.no_grad():
        stats = model.model(ids).router_stats
    np.testing.assert_array_equal(
        np.sort(made.routing, -1), np.sort(np.stack([s.expert_ids.numpy() for s in stats], 1), -1)
    )
    require_experts([made], model, "it")
    assert estimates(moved(), [made], replay=True)[1] == 0.0
    result, _ = step(moved(), update_batch([made], [np.zeros(12, np.float32)]), replay=True)
    for layer in range(made.routing.shape[1]):
        counts = np.bincount(made.routing[:, layer].reshape(-1), minlength=4)
        np.testing.assert_array_equal(result.load.tokens_per_expert[layer], counts)


def test_results_whose_experts_no_turn_tells_are_unknown_and_refused():
    made = played(make_model(), record_prompts=False)
    results = made.routing[3:][~np.array(made.sampled_mask)]
    assert len(results) == 4 and (results == -1).all()
    assert (made.routing[3:][made.sampled_places] >= 0).all()
    with pytest.raises(UserError, match="it gives no experts"):
        require_experts([made], make_model(), "it")


def test_experts_of_an_episode_survive_the_disk(tmp_path):
    made = played(make_model())
    written = make_scored(**vars(made), sampled_logprobs=np.zeros(12, np.float32))
    write_rollout(tmp_path / "1.jsonl", [[written]])
    ((read,),) = read_rollout(tmp_path / "1.jsonl")
    np.testing.assert_array_equal(read.routing, made.routing)


# ---- files ---------------------------------------------------------------------------------------


def scored(**changes):
    sequences, logprobs = sampled(make_model(), 1)
    (s,) = sequences
    made = make_scored(
        prompt_ids=s.prompt_ids, completion_ids=s.completion_ids, sampled_logprobs=logprobs[0],
        expert_ids=s.expert_ids, prompt_expert_ids=s.prompt_expert_ids,
    )  # fmt: skip
    return replace(made, **changes)


def test_experts_survive_the_disk(tmp_path):
    made = scored()
    write_rollout(tmp_path / "1.jsonl", [[made]])
    ((read,),) = read_rollout(tmp_path / "1.jsonl")
    np.testing.assert_array_equal(read.routing, made.routing)
    assert read.prompt_expert_ids.dtype == np.uint8
    require_experts([read], make_model(), "it")


@pytest.mark.parametrize(
    "changes, model, message",
    [
        ({"expert_ids": None}, {}, "it gives no experts for policy.router_replay"),
        ({"prompt_expert_ids": None}, {}, "it gives no experts for policy.router_replay"),
        ({}, {"moe_num_experts": 2, "moe_k": 1}, "experts of another model"),
        ({}, {"num_hidden_layers": 2}, "experts of another model"),
        ({}, {"moe_num_experts": 3}, "experts of another model"),
    ],
)
def test_experts_that_are_missing_or_of_another_model_are_refused(changes, model, message):
    with pytest.raises(UserError, match=message):
        require_experts([scored(**changes)], make_model(**model), "it")


@pytest.mark.parametrize("broken", ["AAAA", "eJw=", "not base64!", 3, "eJwDAAAAAAE="])
def test_experts_that_are_broken_are_told_in_one_message(tmp_path, broken):
    import json

    path = tmp_path / "1.jsonl"
    write_rollout(path, [[scored()]])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experts": broken}) + "\n")
    with pytest.raises(CheckpointError, match=r"1\.jsonl: not a rollout that can be replayed"):
        read_rollout(path)
