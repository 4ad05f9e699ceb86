"""Progressive RL with UPO: sample, score, compare, update; iteration after iteration.

An iteration begins with nothing but what the last one left, so a checkpoint stands at its end, and
an iteration that was cut off is done again with the same random numbers, to the same bits.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import Interrupted
from ernie_train.eval.prompts import problem_row
from ernie_train.io.metrics_log import StageMetrics, cut_after
from ernie_train.rewards.scoring import ComposedReward, build_reward, check_canaries
from ernie_train.rl.batch import Pairing
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts
from ernie_train.rl.groups import GroupSource
from ernie_train.rl.learner import Learner
from ernie_train.rl.pairs import OfflineSource, best_against_worst, offline_source
from ernie_train.rl.report import (
    Watch,
    evaluate_held_out,
    pair_metrics,
    rollout_metrics,
    sample_lines,
)
from ernie_train.rl.rollout import Group
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.stage import StageRun
from ernie_train.weights.checkpoint import CheckpointStore

SAMPLES = "samples.jsonl"


def run(config: UpoConfig, stage: StageRun, prepared: PreparedPrompts) -> dict[str, Any]:
    """Trains the stage from its latest checkpoint, or from the start.

    Raises `Interrupted` after saving, and `UserError` where the reward fails on its canaries.
    """
    if config.reward is None:
        return _Upo(config, stage, prepared, None).run()
    with consensus.fail_together():
        built = build_reward(config.reward, stage.data.base_dir)
    with closing(built) as reward:
        if config.canaries:
            with consensus.fail_together():
                if process_group.is_main():
                    _try_reward(config, stage, prepared, reward)
        return _Upo(config, stage, prepared, reward).run()


def _try_reward(
    config: UpoConfig, stage: StageRun, prepared: PreparedPrompts, reward: ComposedReward
) -> None:
    check_canaries(
        [problem_row(p.record, thinking=True) for p in prepared.problems],
        reward,
        sample=config.canaries,
        seed=stage.data.seed,
        stop_requested=lambda: stage.stop.requested,
    )


class _Upo:
    """One RL stage; `iteration` counts those that are finished."""

    def __init__(
        self,
        config: UpoConfig,
        stage: StageRun,
        prepared: PreparedPrompts,
        reward: ComposedReward | None,
    ) -> None:
        self.config, self.stage, self.prepared = config, stage, prepared
        self.learner = Learner(config, stage)
        self.source = GroupSource(config, stage, prepared, reward)
        self.store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
        self.iteration = self.saved_iteration = 0
        saved = self.store.load_latest()
        if saved is not None:
            with consensus.fail_together():
                self.learner.restore(saved)
            self.source.load_state_dict(saved.state["source"])
            self.iteration = self.saved_iteration = saved.step
        resume_step = None if saved is None else saved.step
        # Where the prompts stood at the end of the last iteration; within one they run ahead.
        self.boundary = self.source.state_dict()
        self.changing = False  # an iteration has begun to change the weights
        self.measured: dict[str, float] = {}  # on the held-out problems, after this iteration
        self.offline: OfflineSource | None = None
        with consensus.fail_together():
            if process_group.is_main():
                cut_after(stage.directory / SAMPLES, resume_step)
        self.writer = StageMetrics(
            stage.directory,
            resume_step=resume_step,
            terminal=stage.terminal,
            total_steps=config.iterations,
            label=config.name,
        )
        self.watch = Watch(self.writer.note)
        self.health = MoeHealth(
            stage.model,
            config.moe_health,
            first_batch=self._probe_batch,
            state=None if saved is None else saved.state["moe_health"],
            warn=self.writer.note,
        )

    def run(self) -> dict[str, Any]:
        """All iterations that are left; returns what `DONE` records."""
        with self.writer:
            try:
                self.offline = offline_source(
                    self.config, self.stage, self.prepared, self.source, new=self.iteration == 0
                )
                while self.iteration < self.config.iterations:
                    self._iterate(self.iteration + 1)
                    if process_group.any_rank(self.stage.stop.requested):
                        raise Interrupted(f"stopped on a signal after iteration {self.iteration}")
            except Interrupted:
                self._save()
                raise
        return {"steps": self.iteration, "checkpoint": self.store.path_of(self.iteration).name}

    def _iterate(self, number: int) -> None:
        started = time.perf_counter()
        seconds = self.source.collector.seconds
        seconds.update(dict.fromkeys(seconds, 0.0))
        groups = self.source.groups(number)
        metrics = self._learn(number, groups)
        learnt = time.perf_counter()
        if self.source.level is not None:
            metrics["curriculum/level"] = self.source.level
            self.source.raise_level(groups)
        self._measure(number, metrics)
        self.watch.look(metrics)
        rows, count = self.prepared.problems, self.config.samples_per_iteration
        with consensus.fail_together():
            if process_group.is_main():
                sample_lines(self.stage.directory / SAMPLES, number, groups, rows, count)
        sampling = sum(seconds.values())
        timings = {**seconds, "training_seconds": learnt - started - sampling}
        self.writer.log(number, metrics, {**timings, "seconds": time.perf_counter() - started})
        self.iteration, self.boundary, self.changing = number, self.source.state_dict(), False
        if number % self.config.checkpoint.every_steps == 0 or number == self.config.iterations:
            self._save()

    def _learn(self, number: int, groups: list[Group]) -> dict[str, float]:
        """From the groups to updated weights; what was seen on the way."""
        kept = self.source.informative(groups)
        metrics = rollout_metrics(groups, kept)
        pairs: list[Pairing] = []
        if self.config.uses_online_pairs:
            pairs, counts = best_against_worst(kept, self.config.pair_margin)
            metrics |= pair_metrics(counts)
        if self.offline is not None:
            pairs += self.offline.pairs(number)
        if not kept and not pairs:
            self.writer.note(f"iteration {number}: no group differs in reward: nothing was learnt")
            return metrics
        metrics |= self.learner.evaluate_tokens(kept, pairs)
        self.changing = True
        return metrics | self.learner.update(kept, pairs, number, self.health)

    def _measure(self, number: int, metrics: dict[str, float]) -> None:
        settings, self.measured = self.config.evaluation, {}
        if settings is None:
            return
        if number % settings.every_iterations == 0 or number == self.config.iterations:
            self.measured = evaluate_held_out(self.config, self.stage, self.prepared.held_out)
            metrics |= self.measured

    def _probe_batch(self) -> Any:
        """The first prompts in one row, each a document: what routing is compared on."""
        prompts: list[list[int]] = []
        known = [problem.prompt_ids for problem in self.prepared.problems]
        for prompt in known or [pair[0].prompt_ids for pair in self.prepared.offline]:
            prompts.append(prompt)
            if sum(map(len, prompts)) >= self.config.moe_health.probe_tokens:
                break
        lengths = [len(prompt) for prompt in prompts]
        documents = np.repeat(np.arange(1, len(prompts) + 1), lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        return _Probe(np.concatenate(prompts)[None], documents[None], positions[None])

    def _save(self) -> None:
        """Writes the state at the end of the last finished iteration, if it is still there.

        At the start there is nothing to write; an iteration that was cut off while it changed the
        weights is done again from the last checkpoint.
        """
        if self.iteration in (0, self.saved_iteration) or self.changing:
            return
        self.writer.sync()
        self.store.save(
            self.iteration,
            model=self.stage.model,
            optimizer=self.learner.optimizer_arrays(),
            state={
                "learner": self.learner.state_dict(),
                "source": self.boundary,
                "moe_health": self.health.state_dict(),
            },
            metrics=self.measured or None,
            parts=self.learner.parts(),
        )
        self.saved_iteration = self.iteration


class _Probe(NamedTuple):
    """A row of prompts, each [1,T]."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    position_ids: np.ndarray
