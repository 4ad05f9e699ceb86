"""The tool behind docs/own_model.md: the rows that it takes, its tables, and one small run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ernie_train
from ernie_train.data import encode_conversation, load_tokenizer, read_records
from ernie_train.eval import evaluation
from ernie_train.eval import problems as eval_problems
from ernie_train.eval.evaluation import Evaluation, TaskResult
from ernie_train.rewards.verifiers import tool_call
from ernie_train.run.import_model import import_model
from tests.small_llama import TOKENIZER, write_gguf
from tests.workspace import write_rows as write_file
from tools.bench.finetune import FineTune
from tools.evidence import own_model
from tools.evidence.own_rows import read_objects, write_rows
from tools.evidence.own_tables import MARKERS, largest_difference, render

ROOT = Path(__file__).resolve().parents[3]
BFCL = {
    "id": "a",
    "question": [[{"role": "user", "content": "Low tide at Brest, in feet?"}]],
    "function": [
        {
            "name": "tide",
            "description": "Tides.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "place": {"type": "string"},
                    "box": {"type": "dict"},
                    "unit": {"type": "string"},
                },
            },
        }
    ],
}
TRUTH = {
    "id": "a",
    "ground_truth": [
        {
            "tide": {
                "place": ["Brest"],
                "unit": ["feet", "ft"],
                "box": [{"size": [2, 3]}],
                "when": ["", "now"],
            }
        }
    ],
}
CALL = '<tool_call>\n{"name": "tide", "arguments": {"place": "Brest", "unit": "%s", "box": {"size": 3}}}\n</tool_call>'  # noqa: E501


def test_rows_of_bfcl_train_its_first_answer_and_are_graded_by_all(tmp_path: Path) -> None:
    write_file(tmp_path / "simple.jsonl", [{**BFCL, "id": str(n)} for n in range(5)])
    write_file(tmp_path / "simple.answers.jsonl", [{**TRUTH, "id": str(n)} for n in range(5)])
    source = write_rows("tool_calls", tmp_path / "simple.jsonl", tmp_path / "out", 2, 100)
    assert source.endswith("/simple.jsonl")
    train, held_out = (
        list(read_objects(tmp_path / "out" / f"tool_calls.{part}.jsonl"))
        for part in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (3, 2)
    (call,) = held_out[0]["messages"][-1]["tool_calls"]
    assert call["function"] == {"name": "tide", "arguments": {
        "place": "Brest", "unit": "feet", "box": {"size": 2}}}  # fmt: skip
    assert held_out[0]["tools"][0]["function"]["parameters"]["type"] == "object"
    row = {**held_out[0], "completion_format": {"thinking": False}}
    scores = [tool_call.score(row, CALL % unit).status for unit in ("ft", "metres")]
    assert scores == ["correct", "wrong"]


@pytest.mark.parametrize("kind", list(own_model.SEQ_LEN))
def test_without_a_file_rows_are_made_of_the_embedded_data(kind: str, tmp_path: Path) -> None:
    assert write_rows(kind, None, tmp_path, 10, 50).startswith("data/train/")
    rows = list(read_objects(tmp_path / f"{kind}.train.jsonl"))
    keys = {"tool_calls": {"messages", "tools"}, "questions": {"question", "answer"},
            "instructions": {"instruction", "input", "output"}}  # fmt: skip
    assert len(rows) == 40
    assert all(keys[kind] <= set(row) for row in rows)
    with pytest.raises(ValueError, match="rows; it takes more than 60"):
        write_rows(kind, None, tmp_path, 30, 50)


def test_the_template_with_tools_trains_the_call_alone(tmp_path: Path) -> None:
    metadata = {**TOKENIZER, "tokenizer.chat_template": "{{ messages[0].content }}"}
    write_gguf(tmp_path / "m.gguf", metadata=metadata, vocab_size=256)
    import_model(tmp_path / "m.gguf", tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model", template=str(ROOT / own_model.TEMPLATE))
    tool = {
        "type": "function",
        "function": {"name": "tide", "description": None, "parameters": {"type": "object"}},
    }
    call = {"type": "function", "function": {"name": "tide", "arguments": {"place": "Brest"}}}
    messages = [
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "6 ft"},
        {"role": "assistant", "content": "Six feet."},
    ]
    write_file(tmp_path / "rows.jsonl", [{"messages": messages, "tools": [tool]}])
    ((record,), _) = read_records(tmp_path / "rows.jsonl")
    (sample,) = encode_conversation(tokenizer, record.messages, record.tools).samples
    pairs = zip(sample.ids, sample.trainable, strict=True)
    trained = tokenizer.decode([token for token, is_trained in pairs if is_trained])
    assert trained == (
        '<tool_call>\n{"name": "tide", "arguments": {"place": "Brest"}}\n</tool_call><|im_end|>'
        "Six feet.<|im_end|>"
    )
    assert '<tools>\n{"name": "tide", "parameters": {"type": "object"}}\n</tools>' in (
        tokenizer.decode(list(sample.ids))
    )


def test_starts_with_some_methods_add_up_to_one_set_of_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts, as a page's command lines give them; the second keeps what the first measured."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "ernie4_5"}')
    started: list[str] = []

    def measured(self: own_model.FineTunes) -> dict[str, object]:
        started.append(f"{self.kind}/{self.method}")
        return {"losses of": started[-1]}

    monkeypatch.setattr(own_model.FineTunes, "run", measured)
    monkeypatch.setattr(own_model, "stumbles", lambda *_: [{"mistake": "x"}])
    monkeypatch.setattr(own_model, "render", lambda results, out: json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text("\n".join(MARKERS))
    arguments = [str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--referee-python",
                 str(Path("/bin/sh")), "--page", str(page), "--held-out", "4"]  # fmt: skip
    own_model.main([*arguments, "--methods", "full", "--kinds", "questions"])
    own_model.main([*arguments, "--methods", "LoRA", "--kinds", "questions", "tool_calls"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert started == ["questions/full", "questions/LoRA", "tool_calls/LoRA"]
    assert sorted(results["runs"]) == sorted(started)
    assert set(results["rows"]) == {"questions", "tool_calls"}
    assert results["runs"]["questions/full"] == {"losses of": "questions/full"}
    assert results["code"]["version"] == ernie_train.__version__ and "commit" in results["code"]
    with pytest.raises(SystemExit):  # settings of another start do not belong beside these
        own_model.main([*arguments, "--methods", "full", "--steps", "7"])
    assert json.loads((tmp_path / "out/results.json").read_text()) == results


def test_tables_of_one_method_alone_say_which_code_made_them() -> None:
    side = {"losses": [1.0], "tokens_per_second": 2.0, "cores": 1.0, "peak_gb": 1.0}
    run = {"set_up": ["one thread"], "versions": {"torch": "2"}, "ours": side, "peer": side,
           "before": {}, "after": {"loss": 0.5}}  # fmt: skip
    results = {
        "code": {"version": "9.9", "commit": "c" * 40, "dirty": True}, "processor": "p",
        "threads": 1, "turn": 5, "rows": {"questions": "file"}, "runs": {"questions/full": run},
        "stumbles": [],
    }  # fmt: skip
    text = render(results, Path())
    assert "ours: ernie_train 9.9, commit cccccccccccc, with changes; one thread; peer" in text
    assert "| questions | full |  | 0.5000 |  |  |" in text


def test_only_completions_that_are_right_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, one cannot be scored: the accuracy of the others is 1/2, one of three is solved."""
    samples = [{"status": status} for status in ("correct", "wrong", "timeout")]
    found = Evaluation([TaskResult("d", "t", 3, 0.5, 1 / 3, None, 0.0, {"timeout": 1})], samples)
    monkeypatch.setattr(eval_problems, "load_problems", lambda path: [None] * 3)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: found)
    side = object.__new__(FineTune)
    side.model, side.tokenizer = SimpleNamespace(eval=bool, train=bool), None
    side.request = {"held_out": "rows"}
    assert side.solve() == {"solved": 1, "problems": 3}


@pytest.mark.slow
def test_both_sides_train_alike(tmp_path: Path, referee: object) -> None:
    """`referee` only makes sure that the environment is there."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    metadata = {**TOKENIZER, "tokenizer.chat_template": template}
    sizes = {"vocab_size": 256, "max_position_embeddings": 1024}
    write_gguf(tmp_path / "m.gguf", metadata=metadata, **sizes)
    page = tmp_path / "page.md"
    page.write_text("\n".join(MARKERS))
    own_model.main([str(tmp_path / "out"), "--model", str(tmp_path / "m.gguf"), "--steps", "4",
                    "--turn", "2", "--held-out", "4", "--page", str(page)])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == 6
    assert all(largest_difference(run) < 1e-4 for run in results["runs"].values())
    found = results["runs"]["questions/LoRA"]["adapter"]
    assert found["difference"] < 1e-4 * found["largest"]
    assert render(results, tmp_path / "out") in page.read_text()


def test_a_loss_that_is_no_number_is_a_difference():
    run = {"ours": {"losses": [2.0, float("nan"), 1.0]}, "peer": {"losses": [2.0, 1.5, 1.0]}}
    assert np.isnan(largest_difference(run))
