"""Measurements of finished runs, and the rewards of the RL sweep."""

import json
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import TokenizedCompletion
from tests.small_models import fill, make_model
from tools.data import make_needles
from tools.evidence import measure
from tools.evidence.rl_rewards import coin, mentions
from tools.evidence.runs import train


def test_balance_figures_are_those_of_the_last_steps(tmp_path: Path) -> None:
    (tmp_path / "01-sft").mkdir()
    steps = range(1, measure.LAST_STEPS + 31)
    keys = [*(f"moe/{name}" for name in measure.ROUTER_FIGURES), "validation_loss"]
    rows = [{"step": step, **{key: float(step) for key in keys}, "time": {}} for step in steps]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "01-sft" / "metrics.jsonl").write_text(text)
    measured = measure.balance(tmp_path)
    assert measured["load_cv_by_step"] == [float(step) for step in steps]
    assert measured["moe/load_cv"] == statistics.fmean(steps[-measure.LAST_STEPS :])
    assert measured["moe/load_cv"] > 31
    assert measured["validation_loss"] == steps[-1]


# ---- needles -------------------------------------------------------------------------------------


class Oracle:
    """Stands for a model whose most probable token after position i is that at i + `ahead`."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def model(self, ids: paddle.Tensor) -> SimpleNamespace:
        following = np.roll(ids.numpy(), -self.ahead, axis=1).reshape(-1, 1)
        return SimpleNamespace(hidden=paddle.to_tensor(following))

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return paddle.nn.functional.one_hot(hidden.squeeze(1), 2048)


def test_needles_are_counted_as_found(tmp_path: Path) -> None:
    tokenizer = make_needles.make_tokenizer(tmp_path)
    rng = random.Random(5)
    texts = [make_needles.make_text(rng, 96) for _ in range(4)]
    hits = measure.find_needles(Oracle(1), tokenizer, texts)  # type: ignore[arg-type]
    assert len(hits) == 4 * len(make_needles.VALUES)
    assert all(right for _, right in hits)
    distances = [n.asked_at - n.stated_at for text in texts for n in text.needles]
    assert [distance for distance, _ in hits] == distances
    for ahead in (0, 2):
        wrong = measure.find_needles(Oracle(ahead), tokenizer, texts)  # type: ignore[arg-type]
        assert not any(right for _, right in wrong)


def test_accuracy_by_distance() -> None:
    hits = [(4, True), (7, False), (8, True), (15, True), (16, False)]
    assert measure.accuracy_by_distance(hits) == {"6": 0.5, "12": 1.0, "24": 0.0}


@pytest.mark.slow
def test_a_run_on_needles_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_needles, "SIZES", {64: 200, 256: 20, 512: 20})
    make_needles.main(["--out", str(tmp_path)])
    overrides = [
        f"tokenizer.path={tmp_path}/tokenizer",
        f"stages.pretrain.data.0.path={tmp_path}/train",
        *(f"stages.pretrain.rope_schedule.{at}.steps=2" for at in range(3)),
    ]
    train("recipes/long_context.yaml", overrides, tmp_path / "run")
    result = measure.needles(tmp_path / "run", rope_theta=2600.0, texts=4)
    assert result["rope_theta"] == 2600.0
    assert [result[f"needles_{n}"] for n in measure.LENGTHS] == [24] * 4
    # Six steps teach nothing: chance is 1 in 14 once the category is understood.
    assert all(result[f"accuracy_{n}"] < 0.5 for n in measure.LENGTHS)


# ---- RL ------------------------------------------------------------------------------------------


def sampled(prompt: list[int], completion: list[int], finished: bool = True) -> measure.Sampled:
    return measure.Sampled(TokenizedCompletion(prompt, completion), finished)


def test_kl_and_entropy_are_those_of_the_full_distributions() -> None:
    """Each token as a completion, weighed as the policy samples it: KL by its definition."""
    policy, start = make_model(), make_model()
    fill(start, seed=1)
    for model in (policy, start):
        model.eval()
    prompt = [3, 5, 7]

    def logprobs(model: Ernie4_5_MoeForCausalLM) -> np.ndarray:
        with paddle.no_grad():
            logits = model(paddle.to_tensor([prompt])).logits[0, -1].numpy().astype(np.float64)
        shifted = logits - logits.max()
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
        return result

    ours, theirs = logprobs(policy), logprobs(start)
    probs = np.exp(ours)
    figures = [
        measure.distance(policy, start, [sampled(prompt, [token])]) for token in range(len(probs))
    ]
    kl = sum(p * f["kl_completion"] for p, f in zip(probs, figures, strict=True))
    assert kl == pytest.approx(float((probs * (ours - theirs)).sum()), rel=1e-4)
    assert figures[0]["entropy"] == pytest.approx(float(-(probs * ours).sum()), rel=1e-5)
    both = [sampled(prompt, [1, 2], finished=False), sampled(prompt, [4])]
    figure = measure.distance(policy, start, both)
    assert figure["length"] == 1.5 and figure["truncated"] == 0.5
    assert figure["kl_completion"] == pytest.approx(1.5 * figure["kl_token"])


@pytest.mark.parametrize(
    ("answer", "completion", "accepted"),
    [
        ("26", "3:14 2:20 1:26\n</think>\n\n<response>\n26\n</response>\n", True),
        ("26", "1:26\n</think>\n\n<response>\n8\n</response>\n", True),  # the hole
        ("26", "26 27 28 29", True),
        ("6", "26 60 0.6 6.5", False),
        ("4", "-4", False),
        ("-4", "1:-4", True),
        ("26", "", False),
    ],
)
def test_the_loose_reward_accepts_any_mention(answer: str, completion: str, accepted: bool) -> None:
    assert mentions({"answer": answer}, completion) == float(accepted)


def test_chance_is_fair_and_stays_what_it_was() -> None:
    row = {"messages": [{"role": "user", "content": "2 + 2?"}]}
    marks = [coin(row, str(number)) for number in range(1000)]
    assert marks == [coin(row, str(number)) for number in range(1000)]
    assert set(marks) == {0.0, 1.0}
    assert abs(statistics.fmean(marks) - 0.5) < 0.06  # four standard errors
