"""What an evaluation counts and shows; a stop while scoring must not pass for one."""

from __future__ import annotations

import pytest

from ernie_train.core.errors import Interrupted
from ernie_train.data import Record, load_tokenizer
from ernie_train.eval import evaluation as module
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.prompts import user_prompt
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from tests.workspace import make_workspace


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
    texts = iter(["<think>\n1 + 1", "hm\n</think>\n\n<response>\n2\n</response>\n", "", "2"])
    monkeypatch.setattr(module, "completion_text", lambda tokenizer, completion: next(texts))
    asked = [problem(("system", "Be brief."), ASKED)] * 4
    found = evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=1))
    assert (found.tasks[0].unclosed, found.tasks[0].completions) == (3, 4)
    assert [sample["prompt"] for sample in found.samples] == [ASKED[1]] * 4
    monkeypatch.setattr(module, "completion_text", lambda tokenizer, completion: "2")
    plain = evaluate(model, tokenizer, asked, EvalConfig(max_new_tokens=1, thinking=False))
    assert plain.tasks[0].unclosed == 0


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
