"""A stop between sampling and scoring must not pass for an evaluation."""

from __future__ import annotations

import pytest

from ernie_train.core.errors import Interrupted
from ernie_train.data import Record, load_tokenizer
from ernie_train.eval import evaluation as module
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from tests.workspace import make_workspace


def test_a_stop_while_scoring_gives_no_result(tmp_path, monkeypatch):
    make_workspace(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = Ernie4_5_MoeConfig.preset(
        "tiny", vocab_size=384, hidden_size=32, num_hidden_layers=1, head_dim=8
    )
    problem = Record(
        kind="prompt",
        messages=[{"role": "user", "content": "What is 1 + 1?"}],
        fields={"reward": "exact", "answer": "2", "task": "sum", "domain": "math"},
    )
    stopped = []
    original = module.score_batch

    def score_and_stop(*arguments, **keywords):
        stopped.append(True)
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, "score_batch", score_and_stop)
    model = Ernie4_5_MoeForCausalLM(config)
    arguments = (model, tokenizer, [problem], EvalConfig(max_new_tokens=2))
    assert not evaluate(*arguments).tasks[0].excluded
    stopped.clear()
    with pytest.raises(Interrupted, match="while scoring"):
        evaluate(*arguments, stop_requested=lambda: bool(stopped))
