"""Episodes of several turns, all that still run sampled together, turn after turn.

The ids of an episode are never encoded again: the next prompt is the ids so far, as they were
sampled, and behind them the ids of the tools' results. Random numbers come from the episode and
the turn alone; all ranks make the same calls and have the same episodes.

Shapes: T sampled tokens of an episode, C tokens behind its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import EngineError, Interrupted, ToolFailure
from ernie_train.data import Record, Tokenizer
from ernie_train.environments.environment import Message, StepResult, Toolbox, ToolEnvironment

_POLL_S = 0.1


class SampledTurn(Protocol):
    """A turn as samplers return it: `ernie_train.generate.Completion`."""

    ids: list[int]
    logprobs: list[float]
    finished: bool
    expert_ids: np.ndarray | None
    prompt_expert_ids: np.ndarray | None


class SampleTurn(Protocol):
    """Samples one turn of several episodes, each of at most `limits[i]` tokens."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        turn: int,
        episodes: Sequence[int],
        limits: Sequence[int],
    ) -> Sequence[SampledTurn]: ...


@dataclass(frozen=True)
class EpisodeStart:
    """Hold the ids of a problem as it is asked; `record` is None for one that has but one turn.

    max_new_tokens: bounds what follows the prompt; None leaves that to the caller of all episodes.
    """

    prompt_ids: list[int]
    record: Record | None = None
    max_new_tokens: int | None = None


@dataclass
class Episode:
    """Collect the tokens and messages of one episode.

    completion_ids: what follows the prompt; sampled_mask: which of them were sampled, None for all.
    logprobs: of the sampled tokens, [T]. expert_ids: of the positions before each token of the
        completion, [C, MoE layers, K]; those at results are what the next turn chose for its
        prompt, or -1 where it does not tell. prompt_expert_ids: of the problem's positions but the
        last. Both kinds of experts are None unless every turn has the first.
    text: the last turn, without its stop token; finished: it ended, and called no tool.
    messages: turns and results, as a person reads them.
    """

    completion_ids: list[int] = field(default_factory=list)
    sampled_mask: list[bool] | None = None
    logprobs: list[float] = field(default_factory=list)
    expert_ids: np.ndarray | None = None
    prompt_expert_ids: np.ndarray | None = None
    text: str = ""
    finished: bool = False
    messages: list[Message] = field(default_factory=list)
    turns: int = 0

    def add_turn(self, sampled: SampledTurn, tokenizer: Tokenizer) -> None:
        """Append a turn of the assistant.

        Raises `EngineError` unless each token has a log-probability, and experts if any has.
        """
        experts = sampled.expert_ids
        for what, values in (("log-probabilities", sampled.logprobs), ("experts", experts)):
            if values is not None and len(values) != len(sampled.ids):
                raise EngineError(
                    f"the engine gave {what} of {len(values)} tokens for {len(sampled.ids)}"
                )
        if self.sampled_mask is not None:
            self.sampled_mask += [True] * len(sampled.ids)
        self.logprobs = self.logprobs + list(sampled.logprobs)
        if self.turns == 0:
            self.expert_ids, self.prompt_expert_ids = experts, sampled.prompt_expert_ids
        elif self.expert_ids is None or experts is None:
            self.expert_ids = self.prompt_expert_ids = None
        else:
            results = self._result_experts(sampled, experts.shape[1:])
            self.expert_ids = np.concatenate([self.expert_ids, results, experts])
        self.completion_ids = self.completion_ids + sampled.ids
        self.text = tokenizer.decode(sampled.ids[:-1] if sampled.finished else sampled.ids)
        self.finished = sampled.finished
        self.messages.append({"role": "assistant", "content": self.text})
        self.turns += 1

    def _result_experts(self, sampled: SampledTurn, shape: tuple[int, ...]) -> np.ndarray:
        """Return the experts before each token of the results that the turn `sampled` follows."""
        known = 0 if self.expert_ids is None else len(self.expert_ids)
        count = len(self.completion_ids) - known
        before = sampled.prompt_expert_ids  # of all before the turn but the last token
        if before is None:
            return np.full((count, *shape), -1, np.int16)
        return before[len(before) - count :]

    def add_results(self, result: StepResult, ids: Sequence[int], *, most: int) -> bool:
        """Append the results of the turn's calls, unless they leave no token of `most` to a turn.

        Returns whether they were appended. The episode is cut off unless a further turn follows.
        """
        self.finished = False
        for message, failed in zip(result.messages, result.failed, strict=True):
            self.messages.append({**message, "failed": failed})
        if len(self.completion_ids) + len(ids) >= most:
            return False
        mask = self.sampled_mask or [True] * len(self.completion_ids)
        self.sampled_mask = mask + [False] * len(ids)
        self.completion_ids = self.completion_ids + list(ids)
        return True


def play_episodes(
    starts: Sequence[EpisodeStart],
    sample: SampleTurn,
    tokenizer: Tokenizer,
    toolbox: Toolbox | None,
    *,
    max_new_tokens: int,
    stop_requested: Callable[[], bool],
) -> list[Episode]:
    """Play all episodes to their end; `max_new_tokens` bounds what follows each prompt.

    Every rank must call it; each executes the calls of a share of the episodes. Raises on all
    ranks `Interrupted` when a stop is requested on one, and `ToolFailure` where a tool cannot run
    on one: what a tool never answered must not be trained on.
    """
    episodes = [Episode() for _ in starts]
    most = [start.max_new_tokens or max_new_tokens for start in starts]
    environments = _environments(starts, toolbox, stop_requested)
    max_turns = toolbox.config.max_turns if toolbox else 1
    live = list(range(len(starts)))
    for turn in range(max_turns):
        sampled = sample(
            [starts[at].prompt_ids + episodes[at].completion_ids for at in live],
            turn=turn,
            episodes=live,
            limits=[most[at] - len(episodes[at].completion_ids) for at in live],
        )
        for at, one in zip(live, sampled, strict=True):
            episodes[at].add_turn(one, tokenizer)
        asked = [at for at in live if starts[at].record is not None and episodes[at].finished]
        if toolbox is None or not asked:
            break
        results = _step_all(environments, asked, episodes, stop_requested)
        live = []
        for at in (at for at in asked if not results[at].done):
            ids = toolbox.result_ids(results[at].messages)
            room = most[at] if turn + 1 < max_turns else 0
            if episodes[at].add_results(results[at], ids, most=room):
                live.append(at)
        if not live:
            break
    return episodes


def _environments(
    starts: Sequence[EpisodeStart], toolbox: Toolbox | None, stop_requested: Callable[[], bool]
) -> dict[int, ToolEnvironment]:
    """Return the environments of this rank's episodes: a rank keeps an episode to its end."""
    found: dict[int, ToolEnvironment] = {}
    for at, start in enumerate(starts):
        mine = at % process_group.world_size() == process_group.rank()
        if toolbox is not None and start.record is not None and mine:
            found[at] = ToolEnvironment(toolbox, stop_requested)
            found[at].reset(start.record)
    return found


def _step_all(
    environments: dict[int, ToolEnvironment],
    asked: Sequence[int],
    episodes: Sequence[Episode],
    stop_requested: Callable[[], bool],
) -> dict[int, StepResult]:
    """Let the environments answer the turns of `asked`, several at a time; return all answers."""
    answers: dict[int, StepResult] = {}
    stopped, failure = False, None
    with consensus.fail_together():
        mine = [at for at in asked if at in environments]
        # New threads each time: none must stand in the middle of something when sampling forks.
        with ThreadPoolExecutor(max(1, cpu_setup().threads)) as pool:
            futures = {at: pool.submit(environments[at].step, episodes[at].text) for at in mine}
            _wait(list(futures.values()), stop_requested)
        try:
            answers = {at: f.result() for at, f in futures.items() if not f.cancelled()}
        except Interrupted:
            stopped = True
        except ToolFailure as error:
            failure = str(error)
    if process_group.any_rank(stopped or stop_requested()):
        raise Interrupted("stopped on a signal while tools were called")
    for part, failed in process_group.all_gather_objects((answers, failure)):
        if failed is not None:
            raise ToolFailure(failed)
        answers |= part
    return answers


def _wait(futures: Sequence[Future[Any]], stop_requested: Callable[[], bool]) -> None:
    """Wait for all, or for those that have begun once a stop is requested."""
    left = set(futures)
    while left:
        left = wait(left, timeout=_POLL_S).not_done
        if stop_requested():
            for future in left:
                future.cancel()
            return
