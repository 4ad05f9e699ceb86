"""Rejection sampling: what is kept of a model's completions, and what its rows train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main as ernie_train
from ernie_train.data import Record, load_tokenizer
from ernie_train.data.encoding import encode_conversation
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import encode_prompt
from ernie_train.rewards.score import Score
from ernie_train.rl.rollout import ScoredCompletion, read_rollout
from tests.rl.records import make_scored
from tests.small_writer import save_writer
from tests.workspace import make_workspace, rows, write_rows
from tools.evidence import rejection_sampling
from tools.evidence.rejection_sampling import filter_demonstrations, keep_accepted

RIGHT = "1 + 1\n</think>\n\n<response>\n2\n</response>\n"
CALL = '1 + 1\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rejection")
    make_workspace(root)
    (root / "reward.py").write_text("def score(row, text):\n    return float(len(text) % 4 > 0)\n")
    return root


@pytest.fixture(scope="module")
def records(workspace: Path) -> list[Record]:
    return load_problems(workspace / "train.jsonl")


class Sampler:
    """Makes completions of a text as they would have been sampled."""

    def __init__(self, workspace: Path, records: list[Record]) -> None:
        self.tokenizer = load_tokenizer(workspace / "tokenizer")
        self.records = records

    def __call__(self, text: str, prompt: int = 0, **values: Any) -> ScoredCompletion:
        ids = self.tokenizer.encode(text)
        stop = self.tokenizer.encode_marked("<|im_end|>")[0]
        prompt_ids = encode_prompt(self.tokenizer, self.records[prompt])
        made = {"prompt_ids": prompt_ids, "completion_ids": [*ids, *stop], "text": text}
        return make_scored(**{**made, "prompt": prompt, **values})


@pytest.fixture(scope="module")
def sampled(workspace: Path, records: list[Record]) -> Sampler:
    return Sampler(workspace, records)


def kept(sampled: Sampler, *completions: ScoredCompletion, most: int = 2) -> Any:
    return keep_accepted([completions], sampled.records, sampled.tokenizer, most)


@pytest.mark.parametrize("text", [RIGHT, CALL, "1\n</think>\n\n<response>\na < b\n</response>\n"])
def test_a_row_trains_the_sampled_tokens_and_nothing_else(sampled: Sampler, text: str) -> None:
    completion = sampled(text)
    (row,) = kept(sampled, completion).rows
    (sample,) = encode_conversation(sampled.tokenizer, row["messages"]).samples
    trained = [i for i, on in zip(sample.ids, sample.trainable, strict=True) if on]
    assert sampled.tokenizer.decode(trained) == text + "<|im_end|>"
    assert sample.ids == completion.prompt_ids + completion.completion_ids
    assert row["task"] == "sum" and row["answer"] == sampled.records[0].fields["answer"]


@pytest.mark.parametrize(
    "text",
    [
        "1 + 1",  # no end of the thinking part: the template would write one
        "1\n</think>\n\n<response>\n2\n</response>",  # the template ends it by a line break
        "\n1\n</think>\n\n<response>\n2\n</response>\n",
        "1\n</think>\n\nno tags",
    ],
)
def test_what_the_template_shows_otherwise_is_left_out(sampled: Sampler, text: str) -> None:
    found = kept(sampled, sampled(text))
    assert not found.rows and found.counts["not_shown_by_the_template"] == 1


def test_wrong_cut_and_equal_completions_are_left_out_and_each_prompt_gives_its_most(
    sampled: Sampler,
) -> None:
    texts = [RIGHT.replace("1 + 1", thought) for thought in ("a", "b", "c", "d")]
    found = kept(
        sampled,
        sampled(texts[0], score=Score.wrong("no")),
        sampled(texts[0], score=Score.timeout("slow")),
        sampled(texts[0], finished=False),
        sampled(texts[1]),
        sampled(texts[1]),
        sampled(texts[2]),
        sampled(texts[3]),
        sampled(texts[3], prompt=1),
    )
    told = [row["messages"][-1] for row in found.rows]
    assert [message["content"][0] for message in told] == ["b", "c", "d"]
    assert found.rows[-1]["messages"][0] == sampled.records[1].messages[0]
    assert found.summary() == {
        "completions": 8,
        "sampled_tokens": found.counts["sampled_tokens"],
        "wrong": 1,
        "timeout": 1,
        "unfinished": 1,
        "duplicates": 1,
        "beyond_the_most_per_prompt": 1,
        "rows": 3,
        "tasks": {"sum": 3},
    }


def test_an_episode_trains_its_turns_and_no_results(sampled: Sampler) -> None:
    """The ids between two turns are those that the environment gave the model."""
    tokenizer = sampled.tokenizer
    turn = sampled(CALL)
    result = "\n\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n\n"
    between = tokenizer.encode_marked(f"{result}<|im_start|>assistant\n<think>\n")[0]
    last = sampled(RIGHT).completion_ids
    messages = [
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "2", "failed": False},
        {"role": "assistant", "content": RIGHT},
    ]
    mask = [True] * len(turn.completion_ids) + [False] * len(between) + [True] * len(last)
    ids = turn.completion_ids + between + last
    episode = replace(turn, completion_ids=ids, sampled_mask=mask, turns=messages)
    (row,) = kept(sampled, episode).rows
    (sample,) = encode_conversation(tokenizer, row["messages"]).samples
    trained = [i for i, on in zip(sample.ids, sample.trainable, strict=True) if on]
    assert trained == turn.completion_ids + last
    assert not kept(sampled, replace(episode, sampled_mask=None)).rows, "a result as sampled"


def test_demonstrations_are_kept_where_their_verifier_accepts_them(
    workspace: Path, tmp_path: Path
) -> None:
    made = rows(6, 5)
    made[1]["messages"][1]["content"] = "<think>\nno\n</think>\n\n<response>\n99\n</response>"
    made[4]["answer"] = "99"
    write_rows(tmp_path / "mixed.jsonl", made)
    tokenizer = load_tokenizer(workspace / "tokenizer")
    found = filter_demonstrations(load_problems(tmp_path / "mixed.jsonl"), tokenizer)
    assert [row["messages"] for row in found.rows] == [made[i]["messages"] for i in (0, 2, 3, 5)]
    assert found.summary() == {"demonstrations": 6, "wrong": 2, "rows": 4, "tasks": {"sum": 4}}
    out = tmp_path / "right.jsonl"
    options = ["--tokenizer", str(workspace / "tokenizer")]
    rejection_sampling.main(["filter", str(tmp_path / "mixed.jsonl"), str(out), *options])
    again = load_problems(out)
    assert [record.messages for record in again] == [row["messages"] for row in found.rows]


# ---- sampling as a stage would -------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(workspace: Path) -> Path:
    """Two iterations of RL of a model that writes words, in a format whose turns are plain text."""
    stage = {
        "name": "rl", "kind": "upo", "data": [{"path": str(workspace / "train.jsonl")}],
        "reward": {"python": f"{workspace / 'reward.py'}:score"}, "canaries": 0, "iterations": 2,
        "rollout": {"prompts_per_iteration": 6, "group_size": 8, "max_new_tokens": 40,
                    "max_prompt_tokens": 64, "dump": True},
        "micro_batch_size": 8, "optim": {"lr": 1e-2, "schedule": "constant"},
        "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    values = yaml.safe_load((workspace / "recipe.yaml").read_text())
    values |= {"evaluation": None, "export": None, "stages": [stage]}
    texts = [message["content"] for row in rows(40, 1) for message in row["messages"]]
    model = str(save_writer(workspace, [text.replace("\n", " ") for text in texts], 300))
    values |= {"model": {"path": model}, "tokenizer": {"path": model}}
    path = workspace / "rl.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        ernie_train(["run", *map(str, arguments)])
    assert ended.value.code == 0


def test_the_first_iteration_is_that_of_the_stage_and_the_weights_stay(
    workspace: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    train(recipe, "--run-dir", str(tmp_path / "run"))
    model = yaml.safe_load(recipe.read_text())["model"]["path"]
    out = tmp_path / "rows.jsonl"
    command = ["sample", str(recipe), str(out), "--model", model, "--per-prompt", "3"]
    rejection_sampling.main(command)

    def texts(directory: Path, iteration: int) -> list[list[str]]:
        groups = read_rollout(directory / f"{iteration:06d}.jsonl")
        return [[c.text for c in group] for group in groups]

    theirs, ours = tmp_path / "run/01-rl/rollouts", Path(f"{out}.rollouts")
    assert texts(ours, 1) == texts(theirs, 1)
    assert texts(ours, 2) != texts(theirs, 2), "the stage has learnt, the sampler has not"
    made = [json.loads(line) for line in out.read_text().splitlines()]
    summary = json.loads(Path(f"{out}.summary.json").read_text())
    assert summary["completions"] == 2 * 6 * 8 and summary["rows"] == len(made) > 0
    assert all(len(row["messages"][-1]["content"]) % 4 > 0 for row in made)
    sft = {
        "name": "sft", "kind": "sft", "data": [{"path": str(out)}], "seq_len": 256,
        "micro_batch_size": 1, "steps": 1, "optim": {"lr": 1e-3},
    }  # fmt: skip
    train(recipe, f"stages={json.dumps([sft])}", "--run-dir", str(tmp_path / "sft"))


def test_a_stopped_start_goes_on_and_other_settings_are_refused(
    workspace: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    model = yaml.safe_load(recipe.read_text())["model"]["path"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ["--model", model]
    rejection_sampling.main(["sample", str(recipe), str(whole), *options])
    rejection_sampling.main(["sample", str(recipe), str(cut), *options, "--iterations", "1"])
    first = Path(f"{cut}.rollouts/000001.jsonl")
    written = first.stat().st_mtime_ns
    rejection_sampling.main(["sample", str(recipe), str(cut), *options])
    assert cut.read_bytes() == whole.read_bytes() and first.stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="other settings: give another OUT"):
        rejection_sampling.main(["sample", str(recipe), str(cut), *options, "seed=6"])
    with pytest.raises(SystemExit, match="must name a stage of kind upo; there are: rl"):
        rejection_sampling.main(["sample", str(recipe), str(cut), *options, "--stage", "x"])
