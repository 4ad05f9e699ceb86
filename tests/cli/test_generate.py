"""`generate`: one prompt as it is written, and files of prompts as JSONL."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from rich.console import Console

from ernie_train.cli import generate as generate_module
from ernie_train.cli.main import main
from ernie_train.cli.model import export_model, open_model
from ernie_train.cli.score import pair_up, read_data, read_rows
from ernie_train.core import devices
from ernie_train.core.errors import EngineError, Interrupted
from ernie_train.core.terminal import printable
from ernie_train.generate import generate
from ernie_train.weights.hf import load_pretrained
from tests.workspace import make_workspace, save_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    make_workspace(root)
    save_model(root)
    return root


@pytest.fixture
def call(place, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", str(place / "model"), "--max-new-tokens", "8", *map(str, arguments)])
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, " ".join(told.err.split())

    return run


def test_a_file_gives_the_completions_of_its_prompts_alone(place, call, tmp_path):
    rows = [{"prompt": "1 + 1?", "id": "a"}, {"prompt": "2 + 2?", "id": "b"},
            {"messages": [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "3"}],
             "id": "c"}]  # fmt: skip
    write_rows(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out.jsonl"
    assert call("--prompts", tmp_path / "p.jsonl", "--out", out)[0] == 0
    found = read_rows(out)
    assert [row["prompt"] for row in found] == ["1 + 1?", "2 + 2?", "3?"]
    assert [row["id"] for row in found] == ["a", "b", "c"] and found[0]["tokens"] == 8
    for row in found:
        status, text, _ = call("--prompt", row["prompt"])
        assert (status, text) == (0, printable(row["completion"]) + "\n"), "streamed or not"
    status, text, _ = call("--prompts", tmp_path / "p.jsonl", "--batch-size", 2)
    assert [json.loads(line) for line in text.splitlines()] == found and text.isascii()
    pairs = pair_up(read_data(tmp_path / "p.jsonl"), found, tmp_path, out)
    assert len(pairs) == 3, "`score` takes them"


def test_rows_need_no_answer_to_be_asked(call, tmp_path):
    alone, more = {"instruction": "Add 1."}, {"instruction": "Add 1.", "input": "2", "output": ""}
    history = {**alone, "output": " ", "history": [["1?", "1"]], "system": "Be brief."}
    dolly = {**alone, "context": "2", "response": ""}
    rows = [alone, more, history, dolly, {"prompt": "3?", "completion": ""},
            {"instruction": "Add 1.", "input": "3", "output": "4"}]  # fmt: skip
    write_rows(tmp_path / "p.jsonl", [{**row, "id": n} for n, row in enumerate(rows)])
    status, text, told = call("--prompts", tmp_path / "p.jsonl")
    assert status == 0, told
    found = [json.loads(line) for line in text.splitlines()]
    asked = ["Add 1.", "Add 1.\n2", "Add 1.", "Add 1.\n2", "3?", "Add 1.\n3"]
    assert [(row["id"], row["prompt"]) for row in found] == list(enumerate(asked))
    write_rows(tmp_path / "p.jsonl", [{"instruction": 3}])
    assert "p.jsonl:1: instruction must be text" in call("--prompts", tmp_path / "p.jsonl")[2]


def test_bad_rows_are_left_out_where_that_is_asked_for(place, call, tmp_path, capsys):
    made = [{"prompt": "1?", "reward": "exact", "answer": "1"}] * 3
    lines = [json.dumps(row) for row in made]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, "{\n"]))
    for verb in ("generate", "eval"):
        data = "--prompts" if verb == "generate" else "--data"
        given = [verb, place / "model", data, tmp_path / "p.jsonl", "--max-new-tokens", 1]
        found = []
        for more in ((), ("--max-bad-fraction", 0.3)):
            with pytest.raises(SystemExit) as stopped:
                main([str(part) for part in (*given, *more)])
            found.append((int(stopped.value.code or 0), "1 of 4 rows" in capsys.readouterr().err))
        assert found == [(2, True), (0, False)]
    assert "is that of --prompts" in call("--prompt", "1?", "--max-bad-fraction", 0.3)[2]


def test_sampled_completions_do_not_depend_on_the_batches(place, call, tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": "1 + 1?"}] * 5)
    texts = {
        call("--prompts", tmp_path / "p.jsonl", "--temperature", 1, "--batch-size", size)[1]
        for size in (1, 2, 5)
    }
    (text,) = texts
    assert len({json.loads(line)["completion"] for line in text.splitlines()}) > 1


def test_system_and_raw_change_what_is_asked(place, call, tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": "1 + 1?"}])
    found = [call("--prompts", tmp_path / "p.jsonl", *more)[1]
             for more in ((), ("--system", "Be brief"), ("--raw",))]  # fmt: skip
    assert len(set(found)) == 3
    assert call("--prompt", "1 + 1?", "--raw")[1].strip() == json.loads(found[2])["completion"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give either --prompt TEXT or --prompts FILE"),
        (("--prompt", "x", "--prompts", "{p}"), "give either --prompt"),
        (("--prompt", "x", "--raw", "--system", "y"), "--system has no place in --raw"),
        (("--prompt", "x", "--columns", "{{prompt: q}}"), "--columns names keys of the rows"),
        (("--prompt", "x", "--batch-size", 64), "--batch-size is that of --prompts"),
        (("--prompt", "x", "--force"), "--force replaces what lies at --out"),
        (("--prompt", "x", "--top-p", 0.5), "--top-p has no effect at --temperature 0"),
        (("--prompt", "x", "--top-k", 5), "--top-k has no effect at --temperature 0"),
        (("--prompts", "{none}"), "none.jsonl"),
        (("--prompts", "{p}", "--out", "{p}"), "is read by this command"),
        (("--prompts", "{all}", "--out", "{p}"), "is read by this command"),
        (("--prompts", "{all}", "--out", "{p}", "--force"), "is read by this command"),
        (("--prompts", "{p}", "--out", "{precious}"), "no earlier output"),
        (("--prompts", "{p}", "--max-new-tokens", 250), "p.jsonl:1: the prompt has"),
        (("--prompts", "{p}", "--raw", "--max-new-tokens", 255), "p.jsonl:1 has"),
        (("--prompts", "{text}"), "asks nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(call, tmp_path, arguments, told):
    write_rows(tmp_path / "p.jsonl", [{"prompt": "1 + 1?"}])
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "text.jsonl").write_text('{"text": "once"}\n')
    names = {
        "p": "p.jsonl",
        "all": "p*.jsonl",
        "none": "none.jsonl",
        "precious": "precious",
        "text": "text.jsonl",
    }
    paths = {key: tmp_path / name for key, name in names.items()}
    status, _, err = call(*[str(a).format(**paths) for a in arguments])
    assert status == 2 and told in err, err
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize(
    ("ending", "expected"),
    [(Interrupted("stopped"), (3, "stopped")), (EngineError("it died"), (1, "it died")),
     (MemoryError("no room"), (1, "MemoryError: no room"))],
)  # fmt: skip
def test_what_ends_sampling_keeps_the_batches_that_are_finished(
    call, tmp_path, monkeypatch, batches, ending, expected
):
    def sample(*arguments, **options):
        if len(done) == batches:
            raise ending
        done.append(1)
        return original(*arguments, **options)

    done, original, out = [], generate_module.generate, tmp_path / "out.jsonl"
    monkeypatch.setattr(generate_module, "generate", sample)
    prompts = tmp_path / "p.jsonl"
    write_rows(prompts, [{"prompt": f"{n} + 1?"} for n in range(5)])
    status, _, err = call("--prompts", prompts, "--batch-size", 2, "--out", out)
    assert (status, expected[1] in err) == (expected[0], True), err
    assert out.exists() == bool(batches)
    if batches:
        assert len(read_rows(out)) == 2 and "has the first 2 of 5 completions" in err


def test_tokens_are_given_as_they_are_sampled(place):
    model = load_pretrained(place / "model")
    prompts, seen = [[5, 6], [7], [5, 6]] * 8, {}
    found = generate(model, prompts, max_new_tokens=6, temperature=1.0, eos_token_id=[3, 9, 20],
                     on_token=lambda at, token: seen.setdefault(at, []).append(token))  # fmt: skip
    assert [seen[at] for at in range(len(prompts))] == [one.ids for one in found]


def test_on_a_gpu_weights_are_bfloat16_unless_they_are_to_be_written_again(place, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "select_device", lambda name: asked.append(name) or "gpu")
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda device: True)
    for exact, dtype in ((False, paddle.bfloat16), (True, paddle.float32)):
        model, _ = open_model(place / "model", exact=exact)
        assert model.model.norm.weight.dtype == dtype
    assert asked == ["auto", "auto"]


def test_an_export_on_a_gpu_keeps_the_bits_of_float32_weights(place, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "select_device", lambda name: "gpu")
    out = tmp_path / "out"
    export_model(place / "model", out, "float32", "5GB", None, Console(quiet=True))
    before, after = (load_pretrained(path).state_dict() for path in (place / "model", out))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].numpy(), tensor.numpy(), err_msg=name)
