"""GRPO-ATS: rollouts of the current policy, rewards, group advantages, an update or several, and again.

The temperature switch happens in the engine; here it is only known per token. Engine and trainer hold one module, so
the optimizer's step is the weight update and the engine merely forgets what it cached.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from thyme import trace
from thyme.data.streams import Stream
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rewards import Scorer
from thyme.rollout.records import join_rollouts, write_rollouts
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout
from thyme.train.alarm_log import AlarmLog
from thyme.train.alarms import Alarms
from thyme.train.batch_selection import Drawn, draw_batch
from thyme.train.config import RlConfig
from thyme.train.distributed import World
from thyme.train.group_exchange import exchanged, own_questions
from thyme.train.group_scores import GroupScores, ScoredGroup
from thyme.train.journals import StepJournals
from thyme.train.metrics import Metrics
from thyme.train.mismatch import mismatch_in
from thyme.train.optim import Optimizer, rate_share
from thyme.train.packing import TrainBatch
from thyme.train.policy_samples import mini_batches
from thyme.train.policy_update import Update, packed_batches, update_metrics, update_policy
from thyme.train.reference import reference_policy
from thyme.train.reward_metrics import name_sources, reward_metrics, source_metrics
from thyme.train.rl_metrics import Laps, phase_metrics, rollout_metrics, speculation_metrics
from thyme.train.sharding import TrainedModel, trained_model
from thyme.train.stage import Stage, StageOptions
from thyme.train.trainable import fuses_head, trainable
from thyme.train.trainer_logprobs import TrainerLogprobs, trainer_columns, trainer_logprobs

_log = logging.getLogger(__name__)


def train_rl(
    model: Model,
    processor: Processor,
    loop: RolloutLoop,
    questions: Stream[Question],
    config: RlConfig,
    *,
    scorer: Scorer,
    seed: int = 0,
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    """Trains `model` in place by GRPO on the loop's rollouts.

    Args:
        model: the engine's own; as it comes in it is the KL term's reference, so a resumed run gets the first one's.
        loop: its config says group size, temperatures and limits.
        questions: the stream; `thyme.data.streams.endless` makes one of a finite data set.
        scorer: is given each group when its last rollout ends. A group it cannot score is left out of the step and
            counted as reward/groups_failed; a step without any scored group changes nothing.
        seed: of the rollouts' sampling.
        options: see `thyme.train.stage.StageOptions`; with a run_dir the rollouts are recorded too.

    Returns:
        The metrics of every step.

    Raises:
        ValueError: the loop's engine runs another module; no group could be scored in `config.max_unscored_steps`
            steps in a row.
    """
    _check(loop, model, config)
    reference = reference_policy(model, config, options.get("world"))
    trained = trained_model(model, options.get("world"))
    with trainable(trained.module, config, are_masters=trained.are_masters) as optimizer:
        stage = Stage("rl", trained, processor, optimizer, config, **options)
        run = _Run(trained, processor, loop, questions, config, scorer, seed, optimizer, reference, stage, options)
        if options.get("resume_from") is not None:
            loop.engine.weights_updated()
            loop.engine.weight_version = stage.memory["weight_version"]
        with stage:
            while stage.step < config.steps and not stage.stopped:
                with trace.span("steps", f"step {stage.step}"):
                    run.step()
        run.journals.forget(next_step=stage.step, saved_step=stage.saved_step)
    return stage.history


class _Run:
    """A run's parts, and its step: draw, update, look, log."""

    def __init__(
        self,
        trained: TrainedModel,
        processor: Processor,
        loop: RolloutLoop,
        questions: Stream[Question],
        config: RlConfig,
        scorer: Scorer,
        seed: int,
        optimizer: Optimizer,
        reference: Model | TrainedModel | None,
        stage: Stage,
        options: StageOptions,
    ) -> None:
        self.trained, self.processor, self.loop, self.questions = trained, processor, loop, questions
        self.config, self.scorer, self.seed = config, scorer, seed
        self.optimizer, self.reference, self.stage, self.world = optimizer, reference, stage, trained.world
        self.run_dir = options.get("run_dir")
        self.same_bits = loop.engine.config.deterministic and trained.full.device.type == "cpu"
        journaled = self.run_dir if config.save_steps else None
        self.journals = StepJournals(journaled, loop, self.world, same_bits=self.same_bits)
        self.alarms = Alarms(config.alarms, stage.memory.setdefault("alarms", {}))
        self.alarm_log = AlarmLog(self.run_dir if self.world.is_main else None, stage.step)

    def step(self) -> None:
        """One step of the stage, logged at its end."""
        laps, stage = Laps(), self.stage
        drawn, metrics = self._draw(laps)
        updates, updated, seen = self._update(drawn, laps)
        metrics |= scored_metrics(drawn, self.scorer, stage) | updated
        metrics |= self._look(drawn.groups, metrics, seen) | laps.metrics()
        stage.end_step(metrics, updates[-1].suspects)
        self.journals.forget(next_step=stage.step, saved_step=stage.saved_step)
        _end_if_unscored(stage, self.config)

    def _draw(self, laps: Laps) -> tuple[Drawn, Metrics]:
        """The step's groups, scored, and what is measured of their rollouts."""
        memory, step, engine = self.stage.memory, self.stage.step, self.loop.engine
        before = engine.stats()
        with self.journals.step(step) as journal:
            drawn = draw_batch(
                partial(ask_round, self.loop, self.scorer, laps, self.world),
                self.questions,
                self.config,
                start=memory.setdefault("questions", step * self.config.batch_size),
                seed=self.seed * 1_000_003 + step,
            )
        metrics = rollout_metrics(
            [group.rollouts for group in drawn.groups],
            rollout_s=laps.seconds["rollout"],
            weight_version=engine.weight_version,
        )
        if engine.speculation is not None:
            metrics |= speculation_metrics(before, engine.stats(), self.world)
        if names := self.loop.config.phase_names:
            metrics |= phase_metrics([group.rollouts for group in drawn.groups], names)
        if journal is not None:
            kept, begun = self.world.sum([len(journal.kept), len(journal.begun)])
            if kept or begun:
                metrics |= {"rollout/from_journal": kept, "rollout/reopened": begun}
        return drawn, metrics

    def _update(self, drawn: Drawn, laps: Laps) -> tuple[list[Update], Metrics, TrainerLogprobs]:
        """The optimizer's steps on the groups that are kept; the engine then has the new weights."""
        stage, engine = self.stage, self.loop.engine
        samples = mini_batches(self.processor, drawn.kept, self.config)
        rate = rate_share(self.config, stage.step, self.config.steps)
        shared: Any = {"config": self.config, "reference": self.reference, "rollout": self.loop.config}
        with self.world.phase("update"), engine.asleep():  # what it has cached, the update makes stale
            packed: list[list[TrainBatch]] = []
            batches, left_out = packed_batches(
                self.trained, self.processor, samples, same_bits=self.same_bits, on_packed=packed.append, **shared
            )
            seen = trainer_logprobs(packed)
            laps.end("logprob")
            updates = update_policy(self.trained, self.processor, self.optimizer, batches, rate=rate, **shared)
        laps.end("train")
        self.trained.publish()
        engine.weights_updated()
        laps.end("sync")
        _remember(stage, drawn.groups)
        stage.memory["weight_version"] = engine.weight_version
        metrics = left_out | update_metrics(updates)
        if (wrong := mismatch_in(metrics, self.config.mismatch)) is not None and self.world.is_main:
            _log.warning("step %d: %s", stage.step + 1, wrong)
        return updates, metrics, seen

    def _look(self, groups: Sequence[ScoredGroup], metrics: Metrics, seen: TrainerLogprobs) -> Metrics:
        """Raises alarms, and records the rollouts of a step that has one or is due; returns alarm/<name>."""
        step, path = self.stage.step, None
        num_rollouts = sum(len(group.rollouts) for group in groups)
        begun, held = self.world.from_main(self.alarms.check(metrics, num_rollouts=num_rollouts))
        if self.run_dir is not None and (begun or _is_recorded(step, self.config)):
            path = self.run_dir / "rollouts" / f"step_{step}.jsonl"
            with trace.span("steps", "record rollouts"):
                record(path, groups, self.world, seen)
        self.alarm_log.write(step, begun, groups, path)
        return dict(held)


def _check(loop: RolloutLoop, model: Model, config: RlConfig) -> None:
    """Raises where the loop cannot train the model; warns where what it samples is biased."""
    if loop.engine.model is not model:
        raise ValueError("the rollout loop's engine holds another model: train the one it runs")
    if loop.config.truncates and fuses_head(model, config):
        raise ValueError(
            f"rollout.top_k, top_p or min_p is on, and at {model.config.text.vocab_size} words the LM head is fused "
            "with the loss, which has no logits to truncate: say rl.fused_head false, or turn these off"
        )
    if loop.config.biases_logprobs:
        warnings.warn(
            "rollout.repetition_penalty is on: rollouts are not drawn from the policy whose log-probs the loss uses, "
            "so its gradient is biased; turn it off for RL",
            stacklevel=3,
        )


def ask_round(
    loop: RolloutLoop, scorer: Scorer, laps: Laps, world: World, asked: Sequence[Question], seed: int
) -> list[ScoredGroup]:
    """The groups of these questions, scored as they end; each rank samples its share and gets all."""
    sampling = loop.config.sampling(seed=seed, tree=loop.config.tree)
    scores = GroupScores(scorer, sampling.n)
    with world.phase("rollout"):
        own = own_questions(loop, asked, world)
        rollouts = loop.run([asked[place] for place in own], sampling, on_end=scores.ended)
    laps.end("rollout")
    with world.phase("reward"):
        groups = exchanged(scores.collect(rollouts), own, world)
    laps.end("reward")
    return groups


def _remember(stage: Stage, groups: Sequence[ScoredGroup]) -> None:
    """What the next step needs: the question it starts at, the steps in a row of which no group was scored, the sources
    that have metrics."""
    is_unscored = all(group.rewards is None for group in groups)
    stage.memory["unscored"] = stage.memory.get("unscored", 0) + 1 if is_unscored else 0
    stage.memory["questions"] += len(groups)
    stage.memory["sources"] = name_sources(groups, stage.memory.get("sources", []))


def _is_recorded(step: int, config: RlConfig) -> bool:
    return config.record_steps > 0 and step % config.record_steps == 0


def scored_metrics(drawn: Drawn, scorer: Scorer, stage: Stage) -> Metrics:
    """What is measured of a step's groups, their rewards and the scorer."""
    return (
        reward_metrics(drawn.groups)
        | source_metrics(drawn.groups, stage.memory["sources"])
        | drawn.metrics()
        | scorer.metrics()
    )


def _end_if_unscored(stage: Stage, config: RlConfig) -> None:
    """Raises where the judge has been away for too long; the last step is logged already."""
    if stage.memory["unscored"] >= config.max_unscored_steps:
        raise ValueError(
            f"rl step {stage.step}: none of its groups could be scored; that is {stage.memory['unscored']} steps in a "
            "row, so the judge is not there (the log says what it answered): mend it and resume"
        )


def record(
    path: Path, groups: Sequence[ScoredGroup], world: World | None = None, seen: TrainerLogprobs | None = None
) -> None:
    """Writes the rollouts of a step with their rewards; null where a group could not be scored.

    Each rank writes those it has the pictures of, and the first one puts them together.

    Args:
        seen: log-probs of the trainer, which stand beside the engine's.
    """
    world = world or World()
    part = path.with_name(f".{path.name}.{world.rank}") if world.size > 1 else path
    rollouts: list[Rollout] = []
    rewards: list[dict[str, Any] | None] = []
    for group in groups:
        if group.rank == world.rank:
            rollouts += group.rollouts
            rewards += [None] * len(group.rollouts) if group.rewards is None else map(asdict, group.rewards)
    write_rollouts(part, rollouts, rewards, columns=trainer_columns(rollouts, seen or {}))
    if world.size > 1:
        parts = world.gather(part)
        if world.is_main:
            join_rollouts(path, parts)
