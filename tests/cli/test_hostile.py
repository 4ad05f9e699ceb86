"""Hostile input to every verb ends within seconds, with status 0 or 2, one message, and no control
character on the terminal: values of options, kinds of files, and text that is a terminal's command.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.data import load_tokenizer
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights import save_pretrained
from tests.core.test_terminal import HOSTILE, controls
from tests.workspace import make_workspace, rows, write_rows

LIMIT_S = 60  # a hang has none; a loaded machine takes a while
LONG = "x" * 100_000
COMMANDS = HOSTILE.replace("\ud800", "")  # all of them text that can be encoded


class TooLong(BaseException):
    """No `Exception`, so that nothing in between catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace with an untrained model, completions, and a run directory of one step's files."""
    root = tmp_path_factory.mktemp("hostile")
    make_workspace(root)
    tokenizer = load_tokenizer(root / "tokenizer")
    config = Ernie4_5_MoeConfig.preset(
        "tiny", vocab_size=384, hidden_size=32, num_hidden_layers=2, head_dim=8,
        intermediate_size=32, moe_intermediate_size=16, moe_num_experts=2, moe_k=1,
        max_position_embeddings=256,
    )  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(config)
    save_pretrained(model, root / "model", tokenizer, max_shard_size="20KB")
    write_rows(root / "completions.jsonl", [{"completion": "2"}] * 20)
    stage = root / "run/01-sft"
    stage.mkdir(parents=True)
    shutil.copy(root / "recipe.yaml", root / "run")
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "time": {}}\n')
    return root


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command without input; returns status, output and errors, which are checked."""

    def too_long(*_):
        raise TooLong(f"it takes more than {LIMIT_S} s")

    monkeypatch.setattr("sys.stdin", io.StringIO())

    def call(*arguments: object) -> tuple[int, str, str]:
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT_S)
        try:
            with pytest.raises(SystemExit) as stopped:
                main([str(a) for a in arguments])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        status, (out, err) = int(stopped.value.code or 0), capsys.readouterr()
        assert status in (0, 2), err[-2000:]
        assert "Traceback" not in err
        assert err.count("error:") == (1 if status == 2 else 0), err[-2000:]
        assert controls(out) + controls(err) == []
        assert len(err) < 20_000
        return status, out, err

    return call


# ---- options -------------------------------------------------------------------------------------

NUMBERS = ["nan", "inf", "-1", "1e400", "9" * 30, "x", "", LONG, HOSTILE.replace("\x00", "")]
# Files and lists, for which a word may be right.
TEXTS = [
    "--out",
    "--few-shot",
    "--tasks",
    "--max-shard-size",
    "--data",
    "--completions",
    "--reward",
    "--transcript",
]
OPTIONS = {
    "generate": ["--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--nosuch",
                 "--prompts", "--batch-size", "--out"],
    "chat": ["--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--tools",
             "--max-turns", "--transcript"],
    "eval": ["--n", "--max-examples", "--max-new-tokens", "--batch-size", "--temperature",
             "--seed", "--tasks", "--data", "--out", "--k", "--shots", "--few-shot"],
    "plan": ["--gpus", "--gpu-memory-gb", "--expert", "--document-tokens",
             "--tflops", "--interconnect-gbps", "--between-gbps", "--memory-gb-per-s",
             "--layer-us"],
    "run": ["--nproc", "--max-restarts", "--hang-timeout-s", "--nnodes", "--from",
            "--until", "--referee"],
    "export": ["--dtype", "--max-shard-size", "--referee"],
    "score": ["--reward", "--data", "--completions", "--out"],
}  # fmt: skip


def arguments_of(verb, place):
    return {
        "generate": [place / "model", "--prompt", "x"],
        "chat": [place / "model"],
        "eval": [place / "model", "--data", place / "test.jsonl"],
        "plan": [place / "recipe.yaml"],
        "check": [place / "recipe.yaml"],
        "run": [place / "recipe.yaml", "--run-dir", place / "none" / "run"],
        "export": [place / "model", place / "out"],
        "status": [place / "run"],
        "score": ["--reward", "exact", "--data", place / "test.jsonl",
                  "--completions", place / "completions.jsonl"],
    }[verb]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, options in OPTIONS.items() for option in options]
)
def test_values_of_options(place, cli, verb, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in NUMBERS[-2:] if option in TEXTS else NUMBERS:
        arguments = [*map(str, arguments_of(verb, place))]
        if option in arguments:
            del arguments[arguments.index(option) : arguments.index(option) + 2]
        status, _, err = cli(verb, *arguments, f"{option}={value}")
        assert status == 2 or value in ("-1", "9" * 30), (value[:50], err)


def test_top_p_of_zero_and_a_referee_that_is_no_python(place, cli):
    assert "(0, 1]" in cli("generate", *arguments_of("generate", place), "--top-p", 0)[2]
    for python, message in (("/bin/true", "no Python"), ("/bin/false", "no Python"),
                            ("/etc/passwd", "cannot be started"), ("/dev/null", "cannot be"),
                            ("/nowhere", "no interpreter")):  # fmt: skip
        _, _, err = cli("export", *arguments_of("export", place), "--referee", python)
        assert message in err


# ---- sizes in a recipe ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1000000000", "9" * 30, "1e308", ".nan", LONG, "[[]]"])
@pytest.mark.parametrize("verb", ["check", "plan"])
def test_absurd_settings(place, cli, verb, value):
    for key in ("model.num_hidden_layers", "model.moe_num_experts", "model.hidden_size",
                "stages.sft.data.0.weight", "parallel.expert", "parallel.data", "name",
                "stages.sft.seq_len", "seed"):  # fmt: skip
        status, _, err = cli(verb, place / "recipe.yaml", f"{key}={value}")
        assert status == 2 or value == "1000000000" or verb == "plan", (key, err)


# ---- kinds of files ------------------------------------------------------------------------------

DEEP = '{"a":' * 5_000
CONTENTS = {
    "empty": b"", "binary": bytes(range(256)) * 9, "deep": DEEP.encode(), "list": b"[1]",
    "null": b"null", "digits": b'{"id": ' + b"9" * 5000 + b"}", "latin": b"{\"a\": \"\xe6\"}",
    "hostile": json.dumps({HOSTILE: HOSTILE, "completion": 1}).encode(),
    "nested": json.dumps({"a": {"b": [{"c": {}}]}, "weight_map": {"x": ["y"]}}).encode(),
}  # fmt: skip
PLACES = ["pipe", "device", "directory", "absent", "x" * 300, *CONTENTS]


def make(path, kind):
    """Puts something of this kind at `path`; returns the path to give to the command."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    return path.with_name(kind) if len(kind) > 200 else path


@pytest.mark.parametrize("kind", PLACES, ids=[name[:10] for name in PLACES])
def test_files_that_are_arguments(place, cli, tmp_path, kind):
    recipe = make(tmp_path / "recipe.yaml", kind)
    data = make(tmp_path / "rows.jsonl", kind)
    own, model = place / "recipe.yaml", place / "model"
    for arguments in (
        ("check", recipe), ("plan", recipe), ("run", recipe), ("status", data),
        ("check", own, f"stages.sft.data.0.path={data}"), ("check", own, f"model={{path: {data}}}"),
        ("check", own, f"evaluation.path={data}"), ("check", own, f"tokenizer.path={data}"),
        ("eval", model, "--data", data), ("eval", data, "--data", place / "test.jsonl"),
        ("generate", data, "--prompt", "x"), ("export", data, tmp_path / "out"),
        ("score", "--reward", "exact", "--data", data, "--completions", data),
        ("score", "--reward", recipe, "--data", place / "test.jsonl", "--completions", data),
        ("score", "--reward", f"{data}.py:f", "--data", own, "--completions", data),
    ):  # fmt: skip
        assert cli(*arguments)[0] == 2, arguments


FILES_OF_MODELS = ["config.json", "model.safetensors.index.json", "tokenizer.model",
                   "tokenizer_config.json", "MANIFEST.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES_OF_MODELS)
def test_files_of_a_model(place, cli, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    shard = next(model.glob("model-*"))
    # Without a tokenizer.model PaddleNLP is asked, which takes seconds to import.
    for kind in CONTENTS if name == "tokenizer.model" else PLACES:
        make(model / name, kind)
        cli("generate", model, "--prompt", "x", "--max-new-tokens", 1)
    make(model / name, "absent")
    shutil.copy(place / "model" / name, model)
    for kind in PLACES:
        make(shard, kind)
        assert cli("generate", model, "--prompt", "x")[0] == 2


@pytest.mark.parametrize(
    "name", ["01-sft/metrics.jsonl", "01-sft/DONE", "recipe.yaml", "evaluation.json",
             "environment.json", "export"]
)  # fmt: skip
def test_files_of_a_run(place, cli, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    for kind in PLACES:
        make(run / name, kind)
        cli("status", run)
        cli("export", run, tmp_path / "out")
    metrics = run / "01-sft/metrics.jsonl"
    for line in ('{"step": 1, "loss": [1]}', '{"step": 1, "loss": "x", "time": 3}', '{"step": {}}'):
        metrics.write_text(f"{line}\n")
        cli("status", run)


# ---- text ----------------------------------------------------------------------------------------


def hostile_rows(count):
    made = rows(count, 0)
    for row in made:
        row |= {"task": COMMANDS, "domain": COMMANDS, "id": COMMANDS}
        row["messages"][0]["content"] = COMMANDS
    return made


def test_text_of_rows_in_tables_and_previews(place, cli, tmp_path):
    data, completions = tmp_path / "rows.jsonl", tmp_path / "completions.jsonl"
    write_rows(data, hostile_rows(4))
    write_rows(completions, [{"completion": COMMANDS}] * 4)
    recipe = place / "recipe.yaml"
    assert "\\x1b" in cli("check", recipe, f"stages.sft.data.0.path={data}")[1]
    cli("score", "--reward", "exact", "--data", data, "--completions", completions)
    arguments = ("--max-examples", 2, "--max-new-tokens", 1)
    assert "\\x1b" in cli("eval", place / "model", "--data", data, *arguments)[1]
    assert "\\x1b" in cli("eval", place / "model", "--data", data, "--tasks", "x")[2]
    write_rows(data, [{COMMANDS: COMMANDS}, {"messages": [{COMMANDS: 1}]}] * 9)
    assert cli("check", recipe, f"stages.sft.data.0.path={data}")[0] == 2


def test_results_as_json_are_json_and_harmless(place, cli, tmp_path):
    """DEL, C1, directions and tags too: `cli` looks for controls in what is printed."""
    write_rows(tmp_path / "rows.jsonl", hostile_rows(1))
    options = ("--max-examples", 1, "--max-new-tokens", 1, "--json")
    status, printed, _ = cli("eval", place / "model", "--data", tmp_path / "rows.jsonl", *options)
    assert status == 0
    (task,) = json.loads(printed)["trained"]["tasks"]
    assert task["task"] == task["domain"] == COMMANDS


def test_text_of_recipes_and_arguments(place, cli, tmp_path):
    text = (place / "recipe.yaml").read_text()
    changes = [
        {COMMANDS: 1},
        {"name": COMMANDS},
        {"device": COMMANDS},
        {"model": {"preset": COMMANDS}},
    ]
    for change in [*changes, {"tokenizer": {"path": COMMANDS}}]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({**yaml.safe_load(text), **change}))
        for verb in ("check", "plan", "run"):
            if verb == "plan" and "tokenizer" in change:
                continue
            assert "\\x1b" in cli(verb, recipe)[2]
    plain = COMMANDS.replace("\x00", "")
    for verb in ("check", "plan", "run", "status", "generate", "export", plain):
        cli(verb, plain, *([] if verb != "generate" else ["--prompt", "x"]))
    cli("check", place / "recipe.yaml", f"{plain}={plain}")
    cli("check", place / "recipe.yaml", f"stages.{plain}.seq_len=1")


def test_a_completion_that_is_a_command_of_terminals(place, cli, monkeypatch):
    monkeypatch.setattr("ernie_train.cli.generate.TokenText.add", lambda *_: f"a\tb\n{COMMANDS}")
    _, out, _ = cli("generate", place / "model", "--prompt", "x", "--max-new-tokens", 1)
    assert out.startswith("a\tb\n\\x1b]52")


def test_aliases_that_multiply(cli, tmp_path):
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    assert "multiply" in cli("check", tmp_path / "recipe.yaml")[2]
    assert time.monotonic() - started < 2


def test_lengths_beyond_the_models_positions(place, cli):
    for length in (257, 10**9):
        _, _, err = cli("generate", *arguments_of("generate", place), "--max-new-tokens", length)
        assert "max_position_embeddings=256: --max-new-tokens must be at most" in err
        _, _, err = cli("eval", *arguments_of("eval", place), "--max-new-tokens", length)
        assert "test.jsonl:1: the prompt has" in err
        assert "and 10 more" in err
        _, _, err = cli("check", place / "recipe.yaml", f"evaluation.max_new_tokens={length}")
        assert "test.jsonl:1: the prompt has" in err
    assert "empty" in cli("generate", place / "model", "--prompt", "", "--raw")[2]
