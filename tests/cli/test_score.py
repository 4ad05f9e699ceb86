"""The verb score: files in, a table and scores out, and one message for every mistake."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from ernie_train.cli.main import main
from ernie_train.data import shipped_template
from ernie_train.data.completion_format import format_completion
from tests.workspace import REPOSITORY, make_workspace


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    rows = [{"id": i, "task": "ab"[i % 2], "answer": str(i), "reward": "math"} for i in range(6)]
    given = [{"completion": format_completion("x", str(i if i < 4 else -1))} for i in range(6)]
    return lines(tmp_path / "data.jsonl", rows), lines(tmp_path / "completions.jsonl", given)


@pytest.fixture
def score(capsys):
    def call(reward, data, completions, *more):
        with pytest.raises(SystemExit) as stopped:
            main(["score", "--reward", str(reward), "--data", str(data), "--completions",
                  str(completions), *map(str, more)])  # fmt: skip
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, " ".join(captured.err.split())

    return call


def cells(output, task):
    (line,) = [line for line in output.splitlines() if line.startswith(f"│ {task} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_table_counts_statuses_by_task(score, files, tmp_path):
    status, output, _ = score("math", *files, "--out", tmp_path / "out.jsonl")
    assert status == 0
    assert cells(output, "a") == ["a", "2", "1", "0", "0", "0", "0.6667"]
    assert cells(output, "b") == ["b", "2", "1", "0", "0", "0", "0.6667"]
    assert cells(output, "all") == ["all", "4", "2", "0", "0", "0", "0.6667"]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["value"] for row in written] == [1.0] * 4 + [0.0] * 2
    assert written[0] == {
        "value": 1.0, "status": "correct", "detail": "", "parts": {"math": 1.0}}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_completions_may_be_compressed_as_data(score, files, tmp_path, suffix):
    def packed(text):
        path = tmp_path / f"packed{suffix}"
        with pa.output_stream(path, compression="gzip" if suffix.endswith("gz") else "zstd") as out:
            out.write(text)
        return path

    status, plain, _ = score("math", *files)
    assert status == 0
    found = score("math", files[0], packed(files[1].read_bytes()))[1]
    assert found.splitlines()[:-1] == plain.splitlines()[:-1], "the last has the time"
    for text, told in ((b'{"completion": "1"}\n[]\n', f"packed{suffix}:2"), (b"", "no rows")):
        status, _, err = score("math", files[0], packed(text))
        assert status == 2 and told in err, err


def test_ids_pair_completions_with_rows_in_any_order_and_number(score, files, tmp_path):
    given = [{"id": i, "text": format_completion("x", str(i))} for i in (5, 0, 0, 3)]
    given.append({"id": 3, "text": format_completion("x", "5")})
    status, output, _ = score("row", files[0], lines(tmp_path / "c.jsonl", given))
    assert status == 0
    assert cells(output, "all")[1:3] == ["4", "1"]


def test_a_function_of_ones_own_and_a_file_with_a_reward(score, files, tmp_path):
    (tmp_path / "mine.py").write_text("def score(row, completion):\n    return 0.5\n")
    status, output, _ = score(f"{tmp_path}/mine.py:score", *files)
    assert (status, cells(output, "all")[-1]) == (0, "0.5000")
    recipe = tmp_path / "reward.yaml"
    recipe.write_text(
        "reward:\n  - {name: row}\n  - {name: format, weight: 0.1}\n"
        "  - {python: 'mine.py:score', weight: 2.0}\n"
    )
    status, output, _ = score(recipe, *files)
    assert status == 0
    assert cells(output, "all")[-1] == "1.7667"  # 4/6 * 1 + 0.1 + 2 * 0.5
    for told in ("mean of row: 0.6667", "mean of format: 1.0000", "mean of score: 0.5000"):
        assert told in output


def test_missing_scores_are_counted_and_explained(score, files, tmp_path):
    rows = [{"answer": True}, {"answer": 1}]
    given = [{"completion": format_completion("x", "1")}] * 2
    status, output, _ = score(
        "math", lines(tmp_path / "d.jsonl", rows), lines(tmp_path / "c.jsonl", given)
    )
    assert status == 0
    assert cells(output, "all") == ["all", "1", "0", "1", "0", "0", "1.0000"]
    assert "bad_gold: 1 x answer must be a non-empty text, not True" in output


def test_a_signal_stops_it_at_once(files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "def score(row, completion):\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "    time.sleep(1000)\n"
    )
    command = [sys.executable, "-m", "ernie_train", "score", "--data", files[0], "--completions"]
    command += [files[1], "--reward", f"{tmp_path}/mine.py:score"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(20) == 3
    assert time.monotonic() - start < 5
    assert "stopped by a signal" in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(
    ("reward", "data", "completions", "message"),
    [
        ("mth", None, None, "did you mean 'math'"),
        ("nowhere.py:score", None, None, "cannot read"),
        ("nowhere.yaml", None, None, "nowhere.yaml"),
        ("math", "absent", None, "rows.jsonl cannot be read: No such file or directory"),
        ("math", None, "", "holds no rows"),
        ("math", None, "{}\n", "has 6 rows and"),
        ("math", None, "nonsense\n", "other.jsonl:1: it is not valid JSON"),
        ("math", None, "[]\n", "other.jsonl:1: it is a list, not an object"),
        ("math", None, b'{"completion": ""}\n{"completion": "\xff"}', "other.jsonl:2: it is not"),
        ("math", None, '{"id": 77, "completion": ""}\n', "the id 77 occurs 0 times"),
        (
            "math",
            None,
            '{"id": 1, "answer": ""}\n',
            "completion 1 needs a text under completion or text; its keys are id, answer",
        ),
        (
            "math",
            None,
            '{"completion": "a"},\n',
            "other.jsonl:1: it is not valid JSON: Extra data",
        ),
        ("math", None, '{"completion": "a"},\n', "remove the comma behind the row"),
        ("math", None, '{"completion": "a"}\n'.encode("utf-16"), "is not UTF-8 but UTF-16"),
        ("row", '{"answer": "1"}\n', '{"completion": ""}\n', "a row names no verifier"),
    ],
)
def test_mistakes_are_one_message(score, files, tmp_path, reward, data, completions, message):
    paths = list(files)
    for place, text in enumerate((data, completions)):
        if text is not None:
            paths[place] = tmp_path / ("other.jsonl" if place else "rows.jsonl")
            if text != "absent":
                paths[place].write_bytes(text if isinstance(text, bytes) else text.encode())
    status, _, errors = score(reward, *paths)
    assert status == 2
    assert message in errors.replace("\n", " ")
    assert "Traceback" not in errors


def test_a_failing_score_writes_nothing_and_replaces_nothing(score, files, tmp_path):
    assert score("nosuch", *files, "--out", tmp_path / "out.jsonl")[0] == 2
    assert not list(tmp_path.glob("out*"))
    before = files[0].read_bytes()
    status, _, errors = score("math", *files, "--out", files[0])
    assert status == 2
    assert "is read by this command" in errors
    assert files[0].read_bytes() == before


def test_halves_of_surrogate_pairs_are_scored_and_written(score, files, tmp_path):
    given = [{"id": "\ud800", "completion": "\ud800"}]
    rows = [{"id": "\ud800", "task": "\ud800", "answer": "1", "reward": "math"}]
    paths = lines(tmp_path / "d.jsonl", rows), lines(tmp_path / "c.jsonl", given)
    status, _, _ = score("math", *paths, "--out", tmp_path / "out.jsonl")
    assert status == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["id"] == "\ud800"


def test_any_file_of_rows_is_graded_through_its_columns(score, tmp_path):
    (tmp_path / "rows.csv").write_text("question,solution\n1 + 1?,so #### 2\n2 + 2?,so #### 4\n")
    given = [{"completion": format_completion("x", answer)} for answer in ("2", "5")]
    completions = lines(tmp_path / "completions.jsonl", given)
    mapped = ("--columns", '{answer: {column: solution, after: "####"}}')
    status, out, errors = score("exact", tmp_path / "rows.csv", completions, *mapped)
    assert status == 0, errors
    assert cells(out, "all")[1:3] == ["1", "1"]
    wrong = ("--columns", "{answer: gold}")
    assert "no row has this column" in score("exact", tmp_path / "rows.csv", completions, *wrong)[2]


@pytest.mark.parametrize("name", ["c.json", "c.csv", "c.parquet", "c.txt", "c", "c.jsonl.gz"])
def test_completions_may_be_any_file_of_rows(score, tmp_path, name):
    rows = lines(tmp_path / "rows.jsonl", [{"answer": "2"}, {"answer": "4"}])
    given = [{"completion": format_completion("x", answer)} for answer in ("2", "5")]
    path, text = tmp_path / name, "".join(json.dumps(row) + "\n" for row in given)
    if name == "c.json":
        path.write_text(json.dumps(given, indent=1))
    elif name == "c.jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif name == "c.parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(given), path)
    elif name == "c.csv":
        quoted = [row["completion"].replace('"', '""') for row in given]
        path.write_text("completion\n" + "".join(f'"{answer}"\n' for answer in quoted))
    else:
        path.write_text(text)
    status, out, errors = score("exact", rows, path)
    assert status == 0, errors
    assert cells(out, "all")[1:3] == ["1", "1"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["2", "3"], ["wrong: 1 x '3' is not '2'", "read as they look: none shows reasoning"]),
        (
            ["I add.</think>2", "2"],
            ["wrong: 1 x the thinking part is not finished", "1 of 2 show reasoning"],
        ),
        (
            ["<response>\n2\n</response>", "2"],
            ["wrong: 1 x no response part", "look: 1 of 2 have <response> tags"],
        ),
    ],
)
def test_without_a_model_completions_are_read_as_they_look(score, tmp_path, given, told):
    rows = lines(tmp_path / "rows.jsonl", [{"answer": 2, "thinking": "1 + 1"}] * 2)
    completions = lines(tmp_path / "c.jsonl", [{"completion": text} for text in given])
    status, output, _ = score("exact", rows, completions)
    assert (status, cells(output, "all")[1:3]) == (0, ["1", "1"])
    for line in told:
        assert line in output


def test_the_format_is_not_graded_by_how_completions_look(score, tmp_path):
    rows = lines(tmp_path / "rows.jsonl", [{"answer": "2"}])
    status, output, _ = score("format", rows, lines(tmp_path / "c.jsonl", [{"completion": "2"}]))
    assert (status, cells(output, "all")[1:3]) == (0, ["0", "1"])


@pytest.mark.parametrize(("template", "right"), [("ernie_plain", "1"), ("ernie_thinking", "0")])
def test_completions_of_a_model_have_its_format_whatever_columns_there_are(
    score, tmp_path, template, right
):
    make_workspace(tmp_path)
    source = shipped_template(template).source
    (tmp_path / "tokenizer/chat_template.jinja").write_text(source)
    (tmp_path / "tokenizer/config.json").write_text("{}")  # of a model
    row = {"answer": "2", "thinking": template == "ernie_plain", "response_tags": "x"}
    rows = lines(tmp_path / "rows.jsonl", [row, row])
    completions = lines(tmp_path / "c.jsonl", [{"completion": "2"}, {"completion": "3"}])
    output = score("exact", rows, completions, "--model", tmp_path / "tokenizer")[1]
    assert cells(output, "all")[1] == right
    assert "read as they look" not in output


def test_rows_of_verl_and_trl_are_graded_as_they_stand(score, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "Reduce 12/18."}], "data_source": "verl",
         "reward_model": {"ground_truth": "2/3"}},
        {"problem": "Reduce 12/18.", "solution": "2/3", "data_source": "trl"},
    ]  # fmt: skip
    data = lines(tmp_path / "rows.jsonl", rows * 2)
    given = [{"completion": text} for text in ("2/3", "2/3", "12/18", "12/18")]
    status, output, _ = score("math", data, lines(tmp_path / "c.jsonl", given))
    assert (status, cells(output, "trl")[1:3]) == (0, ["1", "1"])
    assert cells(output, "verl")[1:3] == ["1", "1"]
