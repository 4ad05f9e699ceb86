"""Make rows for SFT of what a verifier accepts: a model's own completions, or demonstrations.

    python -m tools.evidence.rejection_sampling sample RECIPE rows.jsonl --model DIR
        [--stage rl] [--iterations 20] [--per-prompt 4] [key.path=value ...]
    python -m tools.evidence.rejection_sampling filter DATA rows.jsonl --tokenizer DIR

`sample` completes the prompts of a stage of `kind: upo` as that stage would, its order of prompts,
rollout settings, reward and random numbers, but with the weights of `--model` throughout: the first
iteration has the completions that the stage's first one has. Of each prompt it keeps at most
`--per-prompt` different completions that are finished and correct. A row trains the sampled text,
stop token included, and nothing else; a completion that the chat template cannot show so is left out.
Refills, a curriculum and what skips solved prompts have no part in it. Sampled iterations stay in
`rows.jsonl.rollouts`, so that a start that was stopped goes on from there.

`filter` keeps the rows of DATA whose own answers their verifiers accept, as they are.

Both write `rows.jsonl.summary.json` beside the rows: what was kept, and why the rest was not.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_train.core import devices
from ernie_train.core.errors import ConfigError, DataError, ErnieTrainError, Interrupted
from ernie_train.core.signals import StopFlag
from ernie_train.data import Record, Tokenizer, load_tokenizer
from ernie_train.data.completion_format import parse_completion
from ernie_train.environments import open_toolbox
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import problem_row
from ernie_train.generate.engines import build_engine
from ernie_train.io.files import fingerprint, write_jsonl
from ernie_train.model.dtypes import dtype_name
from ernie_train.rewards import score_batch
from ernie_train.rewards.scoring import build_reward
from ernie_train.rl import data as rl_data
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts, rollout_file
from ernie_train.rl.preference_data import encode_completion
from ernie_train.rl.reward import load_scorers
from ernie_train.rl.rollout import (
    RolloutSampler,
    ScoredCompletion,
    largest_mismatch,
    read_rollout,
    write_rollout,
)
from ernie_train.rl.rollout.records import PromptGroup
from ernie_train.run.recipe import Recipe, load_recipe, recorded_recipe
from ernie_train.train.stage import StageData, StageRun
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.model_directory import find_model
from tools.evidence.runs import write_json

PER_PROMPT = 4
ROLLOUTS, SUMMARY = ".rollouts", ".summary.json"
SETTINGS = "settings.json"  # among the rollouts: what sampled them

Row = dict[str, Any]


# ---- which completions become which rows ---------------------------------------------------------


@dataclass
class Kept:
    """Rows to train on, and what became of every completion: `rows`, or why it gave none."""

    rows: list[Row]
    counts: Counter[str]

    def summary(self) -> dict[str, Any]:
        """Return the counts, and rows by task."""
        tasks = Counter(str(row["task"]) for row in self.rows)
        return {**self.counts, "rows": len(self.rows), "tasks": dict(sorted(tasks.items()))}


def keep_accepted(
    groups: Iterable[PromptGroup],
    records: Sequence[Record],
    tokenizer: Tokenizer,
    per_prompt: int = PER_PROMPT,
) -> Kept:
    """Return rows of the accepted completions, `per_prompt` different ones of a prompt at most.

    records: those of the stage's prompts, by number. A prompt that was drawn again goes on counting.
    """  # noqa: E501
    kept = Kept([], Counter())
    seen: dict[int, set[str]] = {}
    for completion in (completion for group in groups for completion in group):
        kept.counts["completions"] += 1
        kept.counts["sampled_tokens"] += completion.num_sampled
        written = seen.setdefault(completion.prompt, set())
        reason = _refusal(completion, written, per_prompt)
        row = None
        if reason is None:
            row = row_of(completion, records[completion.prompt], tokenizer)
            reason = "not_shown_by_the_template" if row is None else None
        if row is None:
            kept.counts[str(reason)] += 1
            continue
        written.add(_sampled_text(completion))
        kept.rows.append(row)
    return kept


def _refusal(completion: ScoredCompletion, written: set[str], per_prompt: int) -> str | None:
    """Return why a completion is not kept; None if it may be."""
    if completion.score.status != "correct":
        return completion.score.status
    if not completion.finished:
        return "unfinished"
    if _sampled_text(completion) in written:
        return "duplicates"
    return "beyond_the_most_per_prompt" if len(written) >= per_prompt else None


def _sampled_text(completion: ScoredCompletion) -> str:
    """Return all that was sampled, with the results of tools between turns."""
    turns = completion.turns or [{"content": completion.text}]
    return "\0".join(str(turn["content"]) for turn in turns)


def row_of(completion: ScoredCompletion, record: Record, tokenizer: Tokenizer) -> Row | None:
    """Return a row that trains the tokens of a completion's text; None if the template cannot."""
    turns = completion.turns or [{"role": "assistant", "content": completion.text}]
    for as_message in (_as_text, _as_stripped, _as_parts):
        messages = [as_message(turn) for turn in turns]
        if _is_shown(completion, record, messages, tokenizer):
            return {**record.fields, "messages": [*record.prompt_messages, *messages]}
    return None


def _as_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with its text as it was sampled, which many templates show unchanged."""
    return {key: value for key, value in turn.items() if key != "failed"}


def _as_stripped(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose text has no outer white space, which some templates write themselves."""
    return _as_text({**turn, "content": str(turn["content"]).strip()})


def _as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn in the parts from which the Thinking template writes it."""
    if turn["role"] != "assistant":
        return _as_text(turn)
    parsed = parse_completion(str(turn["content"]))
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in parsed.tool_calls
    ]
    parts: dict[str, Any] = {"role": "assistant", "content": parsed.response or ""}
    if parsed.thinking:
        parts["reasoning_content"] = parsed.thinking
    return parts | ({"tool_calls": calls} if calls else {})


def _is_shown(
    completion: ScoredCompletion,
    record: Record,
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
) -> bool:
    """Return whether training on `messages` trains the text that was sampled, behind its prompt.

    The text decides, not the ids: a model may sample a text in other tokens than its tokenizer
    encodes it in.
    """
    try:
        shown = encode_completion(tokenizer, record.prompt_messages, messages, record.tools)
    except DataError:
        return False
    if shown.prompt_ids != completion.prompt_ids:
        return False
    return _spans(shown, tokenizer) == _spans(completion, tokenizer)


def _spans(completion: TokenizedCompletion, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Return the texts that were sampled, and those that were not, in their order."""
    ids = completion.completion_ids
    mask = completion.sampled_mask or [True] * len(ids)
    spans: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(ids, mask, strict=True):
        if not spans or spans[-1][0] != sampled:
            spans.append((sampled, []))
        spans[-1][1].append(token)
    return [(sampled, tokenizer.decode(part)) for sampled, part in spans]


# ---- sampling ------------------------------------------------------------------------------------


def sampled_groups(
    config: UpoConfig, stage: StageRun, prepared: PreparedPrompts, iterations: int
) -> Iterator[PromptGroup]:
    """Yield the groups of each iteration, sampled by the weights that `stage` has, or read again.

    Iterations that are in the stage's directory are read. Raises `Interrupted` when a stop is
    requested.
    """
    rollout = config.rollout
    toolbox = open_toolbox(config.environment, stage.data.tokenizer, stage.data.base_dir)
    engine = build_engine(
        rollout.engine,
        stage.data.tokenizer,
        temperature=rollout.temperature,
        batch_size=rollout.batch_size,
        directory=stage.directory / "engine",
        base_dir=stage.data.base_dir,
        largest_gap=largest_mismatch(config),
        stop_requested=lambda: stage.stop.requested,
    )
    reward = build_reward(config.reward, stage.data.base_dir)
    with closing(reward), closing(engine), toolbox as tools:
        dtype = dtype_name(stage.model.model.norm.weight)
        scorers = load_scorers(config.reward.parts, stage.data.base_dir, dtype)
        sampler = RolloutSampler(config, stage, prepared, reward, engine, scorers, toolbox=tools)
        for iteration in range(1, iterations + 1):
            prompts = sampler.order.take(rollout.prompts_per_iteration or 0, lambda prompt: True)
            path = rollout_file(stage.directory, iteration)
            if not path.exists():
                groups = sampler.sample(prompts, iteration, 0)
                write_rollout(path, [[_without_experts(c) for c in group] for group in groups])
                print(f"iteration {iteration} of {iterations} is sampled", flush=True)
            yield from read_rollout(path)


def _without_experts(completion: ScoredCompletion) -> ScoredCompletion:
    return replace(completion, expert_ids=None, prompt_expert_ids=None)


def read_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a file, with overrides, or the one that a run directory has recorded."""
    recorded = recorded_recipe(path) if path.is_dir() else None
    if recorded is None:
        return load_recipe(path, list(overrides))
    if overrides:
        raise ConfigError(f"{path} is a run, whose recipe stays as it is: leave the overrides out")
    return recorded


def find_stage(recipe: Recipe, name: str | None) -> int:
    """Return the index of the stage to sample for; `ConfigError` unless there is one such."""
    found = [
        at
        for at, stage in enumerate(recipe.stages)
        if isinstance(stage, UpoConfig) and name in (None, stage.name)
    ]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in recipe.stages if isinstance(stage, UpoConfig))
        raise ConfigError(f"--stage must name a stage of kind upo; there are: {names or 'none'}")
    return found[0]


def sample(options: argparse.Namespace) -> Kept:
    """Sample for a stage of a recipe and keep what its reward accepts."""
    recipe = read_recipe(options.recipe, options.overrides)
    index = find_stage(recipe, options.stage)
    config = recipe.stages[index]
    assert isinstance(config, UpoConfig)
    if config.rollout.replay is not None or not config.samples_each_iteration:
        raise ConfigError(f"stage {config.name} samples nothing in its iterations")
    base_dir = Path.cwd()
    tokenizer = recipe.load_tokenizer(base_dir)
    data = StageData(base_dir, tokenizer, recipe.stage_seed(index))
    prepared = rl_data.prepare(config, data)
    place = find_model(options.model)
    directory = Path(f"{options.out}{ROLLOUTS}")
    _claim(directory, config, data, place.weights)
    device = devices.select_device(recipe.device)
    model = load_pretrained(place.weights, "bfloat16" if device == "gpu" else "float32")
    model.eval()
    with StopFlag("stopping; the same command goes on from the last whole iteration") as stop:
        stage = StageRun(data, directory, model, stop, terminal=False)
        iterations = options.iterations or config.iterations
        groups = list(sampled_groups(config, stage, prepared, iterations))
    records = [prompt.record for prompt in prepared.prompts]
    return keep_accepted(groups, records, tokenizer, options.per_prompt)


def _claim(directory: Path, config: UpoConfig, data: StageData, weights: Path) -> None:
    """Note what samples; raise `ConfigError` where the directory has rollouts of something else."""
    stage = config.model_dump(mode="json")
    keys = ("data", "reward", "rollout", "environment")
    settings = {key: stage[key] for key in keys}
    settings |= {"weights": str(weights.resolve()), "seed": data.seed}
    now, file = {"settings": settings, "fingerprint": fingerprint(settings)}, directory / SETTINGS
    if file.exists():
        if json.loads(file.read_text("utf-8"))["fingerprint"] != now["fingerprint"]:
            raise ConfigError(f"{directory} has rollouts of other settings: give another OUT")
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_json(file, now)


# ---- demonstrations ------------------------------------------------------------------------------


def filter_demonstrations(records: Sequence[Record], tokenizer: Tokenizer) -> Kept:
    """Return the rows whose own last turn their verifier accepts, read as a completion."""
    graded = [
        (
            str(record.fields["reward"]),
            problem_row(record, tokenizer),
            _last_turn(record, tokenizer),
        )
        for record in records
    ]
    kept = Kept([], Counter())
    for record, score in zip(records, score_batch(graded), strict=True):
        kept.counts["demonstrations"] += 1
        if score.status == "correct":
            kept.rows.append({**record.fields, "messages": record.messages})
        else:
            kept.counts[score.status] += 1
    return kept


def _last_turn(record: Record, tokenizer: Tokenizer) -> str:
    """Return the text that a model would have to sample as the last turn of a row."""
    turns = record.messages
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{record.source}: a demonstration ends with a turn of the assistant")
    ids = encode_completion(tokenizer, turns[:-1], turns[-1:], record.tools).completion_ids
    return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_token_ids else ids)


def filtered(options: argparse.Namespace) -> Kept:
    """Filter the rows of a path."""
    return filter_demonstrations(
        load_problems(options.data, tasks=options.tasks), load_tokenizer(options.tokenizer)
    )


# ---- command line --------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a verb; overrides may follow them."""
    text = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="rejection_sampling", description=text)
    parser.add_argument("verb", choices=["sample", "filter"], help="each has its own --help")
    verb = parser.parse_args(arguments[:1]).verb
    parser = argparse.ArgumentParser(prog=f"rejection_sampling {verb}", description=text)
    if verb == "sample":
        parser.add_argument("recipe", type=Path, help="with a stage of kind upo, or a run of one")
        parser.add_argument("out", type=Path, help="the rows, .jsonl")
        parser.add_argument("overrides", nargs="*", help="of the recipe: key.path=value")
        parser.add_argument("--model", type=Path, required=True, help="which weights sample")
        parser.add_argument("--stage", help="its name, where there are several")
        parser.add_argument("--iterations", type=int, help="as many as the stage has unless given")
        parser.add_argument("--per-prompt", type=int, default=PER_PROMPT, help="rows of a prompt")
    else:
        parser.add_argument("data", type=Path, help="rows with an answer and what grades it")
        parser.add_argument("out", type=Path, help="the rows, .jsonl")
        parser.add_argument("--tokenizer", type=Path, required=True, help="of the model to train")
        parser.add_argument("--tasks", type=lambda names: names.split(","), default=[], help="a,b")
    options = parser.parse_intermixed_args(arguments[1:])
    options.run = sample if verb == "sample" else filtered
    return options


def main(arguments: list[str] | None = None) -> None:
    """Write the rows and what became of everything else."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        kept = options.run(options)
    except Interrupted as ended:
        sys.exit(f"{ended}; the same command goes on from there")
    except ErnieTrainError as error:
        sys.exit(f"error: {error}")
    if not kept.rows:
        sys.exit(f"nothing was accepted: {dict(kept.counts)}")
    write_jsonl(options.out, kept.rows)
    write_json(Path(f"{options.out}{SUMMARY}"), kept.summary())
    print(json.dumps(kept.summary(), indent=1))


if __name__ == "__main__":
    main()
