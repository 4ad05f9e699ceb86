"""Progressive RL with UPO: sample, score, compare, update; iteration after iteration.

Iterations are self-contained: all random state derives from (seed, iteration), so one that was cut
off before its update is done again to the same bits. A stop between sampling and the update keeps
the rollout, which the next start takes up. One after the update saves the weights with the metrics
that are not logged yet; a resumed run evaluates and logs first.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import (
    EngineError,
    FailedElsewhere,
    Interrupted,
    NonFiniteError,
    StorageError,
    ToolFailure,
)
from ernie_train.environments import Toolbox, open_toolbox
from ernie_train.eval.prompts import problem_row
from ernie_train.generate.engines import Engine, build_engine
from ernie_train.io.metrics_log import PendingLine, StageMetrics, cut_after
from ernie_train.model.dtypes import dtype_name
from ernie_train.rewards.scoring import (
    ComposedReward,
    build_reward,
    check_reward_on_reference_answers,
)
from ernie_train.rl.batch import RolloutBatch
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts
from ernie_train.rl.learner import Learner
from ernie_train.rl.pairs import PairSources, make_offline_pairs
from ernie_train.rl.preference_data import OfflinePairSource
from ernie_train.rl.report import (
    HealthWarnings,
    append_samples,
    evaluate_held_out,
    mean_advantages,
    reward_model_metrics,
    rollout_metrics,
)
from ernie_train.rl.reward import load_scorers
from ernie_train.rl.rollout import (
    Rollout,
    RolloutSampler,
    keep_rollout,
    largest_mismatch,
    second_rewards,
    take_kept,
)
from ernie_train.train.moe_health import MoeHealth, PromptProbe
from ernie_train.train.stage import StageRun
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore

SAMPLES = "samples.jsonl"
ENGINE = "engine"  # a server's weights and log


def run(config: UpoConfig, stage: StageRun, prepared: PreparedPrompts) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Raises `Interrupted`, `EngineError`, `NonFiniteError` and `ToolFailure` after saving, and
    `UserError` where the reward fails on its canaries.
    """
    with consensus.fail_together():
        built = build_reward(config.reward, stage.data.base_dir)
        tools = open_toolbox(config.environment, stage.data.tokenizer, stage.data.base_dir)
    rollout = config.rollout
    engine = build_engine(
        rollout.engine,
        stage.data.tokenizer,
        temperature=rollout.temperature,
        batch_size=rollout.batch_size,
        record_experts=config.policy.router_replay,
        directory=stage.directory / ENGINE,
        base_dir=stage.data.base_dir,
        largest_gap=largest_mismatch(config),
        stop_requested=stage.stop_requested,
    )
    with closing(built) as reward, closing(engine), tools as toolbox:
        if config.canaries:
            consensus.run_on_main(lambda: _try_reward(config, stage, prepared, reward))
        return _UpoLoop(config, stage, prepared, reward, engine, toolbox).run()


def _try_reward(
    config: UpoConfig, stage: StageRun, prepared: PreparedPrompts, reward: ComposedReward
) -> None:
    check_reward_on_reference_answers(
        [problem_row(p.record, stage.data.tokenizer) for p in prepared.prompts],
        reward,
        sample=config.canaries,
        seed=stage.data.seed,
        stop_requested=stage.stop_requested,
    )


@dataclass
class IterationState:
    """Progress of the stage: the iteration that the weights hold, and what it still lacks."""

    finished: int = 0  # iterations whose update is in the weights
    prompts: dict[str, Any] = field(default_factory=dict)  # the sampler's, after `finished`
    pending: PendingLine | None = None  # of `finished`, until it is evaluated and logged
    evaluation: dict[str, float] = field(default_factory=dict)  # after `finished`, if measured
    saved: tuple[int, bool] = (0, True)  # the last checkpoint: iteration, and if it was logged
    steps: tuple[int, int] = (0, 0)  # the learner's then: after more it is between two iterations


class _UpoLoop:
    """The iterations of one RL stage."""

    def __init__(
        self,
        config: UpoConfig,
        stage: StageRun,
        prepared: PreparedPrompts,
        reward: ComposedReward,
        engine: Engine,
        toolbox: Toolbox | None,
    ) -> None:
        self.config, self.stage, self.prepared = config, stage, prepared
        self.engine, self.toolbox = engine, toolbox
        self.learner = Learner(config, stage)
        dtype = dtype_name(stage.model.model.norm.weight)
        with consensus.fail_together():
            scorers = load_scorers(config.reward.parts, stage.data.base_dir, dtype)
            self.audit, self.pair_reward = second_rewards(config, prepared.prompts, stage, dtype)
        self.sampler = RolloutSampler(
            config, stage, prepared, reward, engine, scorers, toolbox=toolbox
        )
        self.sampler.audit = self.audit.audited if self.audit is not None else None
        self.store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
        self.state, self.update_seconds = IterationState(), 0.0
        # Of the next iteration, until its update is made: the rollout, and the sampler's state.
        self.unlearnt: tuple[Rollout, dict[str, Any]] | None = None
        saved = self.store.load_latest()
        if saved is not None:
            self._restore(saved)
        self.state.prompts = self.sampler.state_dict()
        last = None if saved is None else saved.step
        consensus.run_on_main(lambda: cut_after(stage.directory / SAMPLES, last))
        self.writer = StageMetrics(
            stage.directory,
            resume_step=None if saved is None else saved.step - (self.state.pending is not None),
            terminal=stage.terminal,
            total_steps=config.iterations,
            label=config.name,
            loggers=stage.loggers,
        )
        self.warnings = HealthWarnings(config.rollout, self.writer.note)
        self.health = MoeHealth(
            stage.model,
            config.moe_health,
            first_batch=lambda: PromptProbe.of(
                [p.prompt_ids for p in prepared.prompts], config.moe_health.probe_tokens
            ),
            state=None if saved is None else saved.state["moe_health"],
            warn=self.writer.note,
        )

    def run(self) -> dict[str, Any]:
        """Run all iterations that are left; return what `DONE` records."""
        with self.writer, ExitStack() as processes:
            for second in (self.audit, self.pair_reward):
                if second is not None:
                    processes.callback(second.reward.close)
            try:
                if self.state.pending is not None:
                    self._finish(self.state.pending)
                pairs = self._pair_sources()
                self._take_up_kept()
                while self.state.finished < self.config.iterations and not self._is_over():
                    self._iterate(self.state.finished + 1, pairs)
                    self._leave_if_asked(f"after iteration {self.state.finished}")
            except (Interrupted, EngineError, ToolFailure):
                self._save()
                self._keep_unlearnt()
                raise
            except NonFiniteError:
                if self.learner.trainer.has_finite_weights():
                    self._save()
                raise
        last = self.state.finished
        return {"steps": last, "checkpoint": self.store.finish(last, self.stage.model).name}

    def _is_over(self) -> bool:
        """Return whether the stage ends before its last iteration."""
        finished = self.state.finished
        is_over = finished > 0 and self.store.ends_with(finished)
        if is_over:
            self.writer.note(self.store.says_out_of_patience(finished, self.config.iterations))
        return is_over

    def _take_up_kept(self) -> None:
        """Read the rollout that an earlier start sampled and could not learn from, if it did."""
        iteration, directory = self.state.finished + 1, self.stage.directory
        kept = consensus.run_on_main(lambda: take_kept(directory, iteration))
        if kept is not None:
            groups, sampler = kept
            self.sampler.load_state_dict(sampler)
            self.unlearnt = (Rollout.of(groups, self.config.rollout), sampler)
            self.writer.note(f"iteration {iteration}: takes up the rollout kept at the last stop")

    def _keep_unlearnt(self) -> None:
        """Write the rollout that was sampled and not learnt from; a replay's is on the disk."""
        if self.unlearnt is None or self.config.rollout.replay is not None:
            return
        rollout, sampler = self.unlearnt
        iteration = self.state.finished + 1
        if rollout.groups:
            try:
                keep_rollout(self.stage.directory, iteration, rollout.groups, sampler)
            except (StorageError, FailedElsewhere) as error:  # of less weight than what ended it
                self.writer.note(f"the rollout of iteration {iteration} is not kept: {error}")

    def _leave_if_asked(self, moment: str) -> None:
        if process_group.any_rank(self.stage.stop_requested()):
            raise Interrupted(f"stopped on a signal {moment}")

    def _pair_sources(self) -> PairSources | None:
        preference = self.config.preference
        if preference is None:
            return None
        offline = None
        if preference.offline is not None:
            given, prompts = self.prepared.offline_pairs, preference.offline.prompts
            if prompts is not None:
                is_new = self.state.finished == 0
                given = make_offline_pairs(self.sampler, prompts, preference.margin, is_new=is_new)
            seed = self.stage.data.seed
            offline = OfflinePairSource(given, preference.offline.per_iteration, seed)
        return PairSources(preference, self.sampler, offline, self.pair_reward)

    def _iterate(self, iteration: int, pairs: PairSources | None) -> None:
        started = time.perf_counter()
        self.sampler.clear_seconds()
        if self.unlearnt is None:
            rollout = self.sampler.rollout(iteration)
            self.unlearnt = (rollout, self.sampler.state_dict())
        rollout, _ = self.unlearnt
        batch, metrics = self._learn(iteration, rollout, pairs)
        metrics |= self.sampler.solved_metrics(iteration)
        if self.sampler.level is not None:
            metrics["curriculum/level"] = self.sampler.level
            self.sampler.raise_level(rollout)
        self._append_samples(iteration, rollout, batch)
        seconds, total = self.sampler.seconds, time.perf_counter() - started
        learning = {
            "training_seconds": total - sum(seconds.values()),
            "update_seconds": self.update_seconds,
        }
        timings = {**seconds, **learning, "seconds": total}
        state = self.state
        state.finished, state.steps, state.evaluation = iteration, self.learner.steps, {}
        self.unlearnt = None
        state.prompts = self.sampler.state_dict()
        state.pending = PendingLine(iteration, metrics, timings)
        self._finish(state.pending)

    def _finish(self, line: PendingLine) -> None:
        """Evaluate the iteration whose update is in the weights, log it, and save if that is due.

        Everything before the update counts as undone after a stop, everything since as outstanding.
        """
        started, state, iteration = time.perf_counter(), self.state, line.step
        state.evaluation = self._evaluate(iteration)
        metrics = line.metrics | state.evaluation
        self.warnings.check(metrics)
        seconds = line.timings["seconds"] + time.perf_counter() - started
        self.writer.log(iteration, metrics, {**line.timings, "seconds": seconds})
        state.pending = None
        every, last = self.config.checkpoint.every_steps, self.config.iterations
        if iteration % every == 0 or iteration == last:
            self._save()

    def _append_samples(self, iteration: int, rollout: Rollout, batch: RolloutBatch) -> None:
        path, advantages = self.stage.directory / SAMPLES, mean_advantages(batch)
        prompts, count = self.prepared.prompts, self.config.samples_per_iteration
        consensus.run_on_main(
            lambda: append_samples(path, iteration, rollout, advantages, prompts, count)
        )

    def _learn(
        self, iteration: int, rollout: Rollout, pairs: PairSources | None
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Update the weights on a rollout, if it teaches anything; return the batch and metrics."""
        self.update_seconds = 0.0
        metrics = rollout_metrics(rollout, every_group=self.config.learns_from_every_group)
        metrics |= reward_model_metrics(rollout, self.config.reward.parts)
        found, counts = pairs.find(iteration, rollout) if pairs is not None else ([], {})
        self.engine.sleep()
        batch, estimated = self.learner.prepare(rollout, found)
        metrics |= counts | estimated
        by_policy = self.config.policy.coef > 0
        trains_groups = by_policy and any(map(batch.is_trained, range(batch.num_in_groups)))
        if not (batch.pairs or trains_groups):
            why = "no group differs in its verdicts" if by_policy else "no pair was found"
            self.writer.note(f"iteration {iteration}: {why}: nothing was learnt")
            return batch, metrics
        self._leave_if_asked(f"before the update of iteration {iteration}")
        started = time.perf_counter()
        metrics |= self.learner.update(batch, iteration, self.health)
        self.update_seconds = time.perf_counter() - started
        return batch, metrics

    def _evaluate(self, iteration: int) -> dict[str, float]:
        settings, last = self.config.evaluation, self.config.iterations
        if settings is None or (iteration % settings.every_iterations and iteration != last):
            return {}
        served = None
        if self.config.rollout.engine.kind != "own":
            # The next rollout asks for the same version, which then is there.
            self.engine.load_weights(self.stage.model, version=iteration + 1)
            served = self.engine
        problems = self.prepared.held_out
        return evaluate_held_out(self.config, self.stage, problems, self.toolbox, served)

    def _save(self) -> None:
        """Write the state at the end of the last finished iteration, if the weights still hold it.

        At the start there is nothing to write, and nothing once an update has changed the weights.
        """
        state = self.state
        holds = (state.finished, state.pending is None)
        if holds in ((0, True), state.saved) or state.steps != self.learner.steps:
            return
        self.writer.sync()
        self.store.save(
            state.finished,
            model=self.stage.model,
            optimizer=self.learner.optimizer_arrays(),
            state={
                "learner": self.learner.state_dict(),
                "source": state.prompts,
                "pending": state.pending.to_state() if state.pending else None,
                "moe_health": self.health.state_dict(),
            },
            metrics=state.evaluation or None,
            parts=self.learner.parts(),
        )
        state.saved = holds

    def _restore(self, saved: Checkpoint) -> None:
        with consensus.fail_together():
            self.learner.restore(saved)
        self.sampler.load_state_dict(saved.state["source"])
        self.state.finished, self.state.steps = saved.step, self.learner.steps
        self.state.pending = PendingLine.from_state(saved.step, saved.state.get("pending"))
        self.state.saved = (saved.step, self.state.pending is None)
