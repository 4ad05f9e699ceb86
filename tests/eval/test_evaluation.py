"""What an evaluation counts and shows; a stop while scoring must not pass for one."""

from __future__ import annotations

import pytest

from ernie_train.core.errors import DataError, Interrupted
from ernie_train.data import Record, load_tokenizer
from ernie_train.environments import Episode
from ernie_train.eval import evaluation as module
from ernie_train.eval.evaluation import EvalConfig, Evaluation, TaskResult, evaluate
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import encode_prompt, user_prompt
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.rewards import Score
from tests.workspace import make_workspace, rows, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    make_workspace(root)
    return load_tokenizer(root / "tokenizer")


@pytest.fixture(scope="module")
def model():
    config = Ernie4_5_MoeConfig.preset(
        "tiny", vocab_size=384, hidden_size=32, num_hidden_layers=1, head_dim=8
    )
    return Ernie4_5_MoeForCausalLM(config)


def problem(*messages):
    turns = [{"role": role, "content": content} for role, content in messages]
    fields = {"reward": "exact", "answer": "2", "task": "sum", "domain": "math"}
    return Record(kind="prompt", messages=turns, fields=fields)


ASKED = ("user", "What is 1 + 1?")


def let_it_say(monkeypatch, texts):
    """Put these texts in the place of what the model completes."""
    said = [Episode(text=text) for text in texts]
    monkeypatch.setattr(module, "play_episodes", lambda *_, **__: said)


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([ASKED], ASKED[1]),
        ([("system", "Be brief."), ASKED], ASKED[1]),
        ([("user", "Hello"), ("assistant", "Hi"), ASKED], ASKED[1]),
        ([ASKED, ("assistant", "2")], ASKED[1]),
        ([ASKED, ("assistant", "hm"), ("tool", "2")], ASKED[1]),
        ([("system", "Say a number.")], "Say a number."),
    ],
)
def test_samples_show_what_the_user_asked(messages, shown):
    assert user_prompt(problem(*messages)) == shown


def test_completions_that_never_close_the_thinking_part_are_counted(model, tokenizer, monkeypatch):
    texts = ["<think>\n1 + 1", "hm\n</think>\n\n<response>\n2\n</response>\n", "", "2"]
    let_it_say(monkeypatch, texts)
    asked = [problem(("system", "Be brief."), ASKED)] * 4
    found = evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=1))
    assert (found.tasks[0].unclosed, found.tasks[0].completions) == (3, 4)
    assert [sample["prompt"] for sample in found.samples] == [ASKED[1]] * 4
    let_it_say(monkeypatch, ["2"] * 4)
    own = load_tokenizer(tokenizer.directory, template="ernie_plain")
    plain = evaluate(model, own, asked, EvalConfig(max_new_tokens=1))
    assert plain.tasks[0].unclosed == 0


def test_completions_have_1024_tokens_or_what_the_context_leaves(model, tokenizer, monkeypatch):
    given: list[int | None] = []

    def play(starts, *_, **__):
        given[:] = [start.max_new_tokens for start in starts]
        return [Episode(text="2") for _ in starts]

    monkeypatch.setattr(module, "play_episodes", play)
    asked = [problem(ASKED), problem(("user", "What is 1 + 1? " * 20))]
    longest = [len(encode_prompt(tokenizer, record)) for record in asked]
    for positions in (4096, max(longest) + 5):
        room = model.config.model_copy(update={"max_position_embeddings": positions})
        monkeypatch.setattr(model, "config", room)
        evaluate(model, tokenizer, asked, EvalConfig())
        assert given == [min(1024, positions - length) for length in longest]
        evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=5))
        assert given == [5, 5]
    with pytest.raises(DataError, match=r"beside max_new_tokens .* leave"):
        evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=6))


def test_what_cannot_be_scored_stays_in_the_denominator(model, tokenizer, monkeypatch):
    """Of 4 completions each: 2 right and 2 not scored; 1 right, 1 wrong and 2 not scored."""
    right, wrong = Score.correct(), Score.wrong("")
    lost = Score.timeout("")
    scores = [right, right, lost, lost, right, wrong, lost, lost]
    monkeypatch.setattr(module, "score_sharded", lambda *_, **__: scores)
    texts = ["</think>\n<response>2</response>"] * 4 + ["</think>\n<response>3</response>"] * 4
    let_it_say(monkeypatch, texts)
    config = EvalConfig(max_new_tokens=1, samples=4, temperature=1.0, k=(2,))
    task = evaluate(model, tokenizer, [problem(ASKED)] * 2, config).tasks[0]
    assert task.accuracy == pytest.approx(3 / 4), "of those that were scored"
    assert task.excluded == {"timeout": 4}
    assert task.estimates["pass@2"].value == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert task.estimates["maj@4"].value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert task.pass_at_k == 1.0


@pytest.mark.parametrize(
    ("answers", "baseline"),
    [
        (["2", "2", "3", None], 0.5),
        ([None] * 4, None),
        (["2"] * 4, 1.0),
        ([None] * 3 + ["2"], 0.25),
    ],
)
def test_the_baseline_gives_an_answer_that_rows_have(
    model, tokenizer, monkeypatch, answers, baseline
):
    let_it_say(monkeypatch, ["2"] * len(answers))
    asked = [problem(ASKED) for _ in answers]
    for record, answer in zip(asked, answers, strict=True):
        record.fields["answer"] = answer
        if answer is None:
            del record.fields["answer"]
    found = evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=1))
    assert found.tasks[0].baseline == baseline
    assert found.to_dict()["domains"]["math"]["baseline"] == baseline


def test_a_domains_baseline_is_the_mean_over_tasks_that_have_one():
    tasks = [TaskResult("d", "a", 1, 0.5, 0.5, base, 0.0, {}) for base in (0.25, None, 0.75)]
    assert Evaluation(tasks, []).domains() == {"d": (0.5, 0.5)}


def test_programs_have_no_majority(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "score_sharded", lambda items, *_, **__: [Score.wrong("")] * 2)
    asked = problem(ASKED)
    asked.fields["reward"] = "code"
    config = EvalConfig(max_new_tokens=1, samples=2, temperature=1.0)
    assert list(evaluate(model, tokenizer, [asked], config).tasks[0].estimates) == [
        "pass@1", "pass@2",
    ]  # fmt: skip


def test_a_stop_while_scoring_gives_no_result(model, tokenizer, monkeypatch):
    stopped = []
    original = module.score_batch

    def score_and_stop(*arguments, **keywords):
        stopped.append(True)
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, "score_batch", score_and_stop)
    arguments = (model, tokenizer, [problem(ASKED)], EvalConfig(max_new_tokens=2))
    assert not evaluate(*arguments).tasks[0].excluded
    stopped.clear()
    with pytest.raises(Interrupted, match="while scoring"):
        evaluate(*arguments, stop_requested=lambda: bool(stopped))


@pytest.mark.parametrize("value", [7, 1.5, True, ["sum"], {"a": 1}, "", "x" * 10**5])
@pytest.mark.parametrize("key", ["task", "domain", "reward"])
def test_names_that_are_no_text_are_told_when_problems_are_read(tmp_path, key, value):
    made = rows(15, 0)
    for row in made[1:]:
        row[key] = value
    write_rows(tmp_path / "test.jsonl", made)
    with pytest.raises(DataError, match="must be a text") as failed:
        load_problems(tmp_path / "test.jsonl")
    message = str(failed.value)
    assert "test.jsonl:2, " in message and f"test.jsonl:4 and 11 more: '{key}'" in message
    assert len(message) < 3000


def test_a_problem_is_named_by_its_file_and_needs_a_verifier(tmp_path):
    made = [{k: v for k, v in row.items() if k not in ("task", "domain")} for row in rows(2, 0)]
    made[1]["task"] = "sums"
    write_rows(tmp_path / "held_out.jsonl", made)
    found = load_problems(tmp_path / "held_out.jsonl")
    named = [(record.fields["task"], record.fields["domain"]) for record in found]
    assert named == [("held_out", "held_out"), ("sums", "sums")]
    del made[0]["reward"], made[1]["reward"]
    write_rows(tmp_path / "held_out.jsonl", made)
    with pytest.raises(
        DataError, match=r"jsonl:1, .*jsonl:2: a problem needs the field 'reward'\nBe"
    ):
        load_problems(tmp_path)
    assert len(load_problems(tmp_path, needs_reward=False)) == 2
