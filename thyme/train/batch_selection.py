"""Which groups of rollouts make a batch: asked again where they teach nothing, or the best of more than are needed.

Dynamic sampling (DAPO, arXiv 2503.14476): groups without spread are dropped, and the next questions of the stream are
asked in their place. Oversample, filter, rank (PyVision-RL, arXiv 2602.20739): more questions are asked than a batch
holds, and the groups that differ most within themselves are kept.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thyme.data.streams import Stream
from thyme.rewards import Scorer
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question
from thyme.train.config import RlConfig
from thyme.train.distributed import World
from thyme.train.group_exchange import exchanged, own_questions
from thyme.train.group_scores import GroupScores, ScoredGroup
from thyme.train.metrics import Metrics
from thyme.train.rl_metrics import Laps

_REFILL_SEEDS = 1 << 40
"""Lies between the sampling seeds of one step's rounds, so that a question asked twice in it is answered anew."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The groups of one batch."""

    groups: list[ScoredGroup]
    """Every group that was sampled, as asked; `Rollout.group` is its place here."""
    kept: list[ScoredGroup]
    """Those that are trained on, as asked."""
    refills: int
    """Rounds after the first."""

    def metrics(self) -> Metrics:
        """How many groups the batch has, as a number and as a share of all, and what it took."""
        return {
            "batch/groups": float(len(self.kept)),
            "batch/kept_share": len(self.kept) / len(self.groups),
            "batch/refills": float(self.refills),
        }


def draw_batch(
    loop: RolloutLoop,
    questions: Stream[Question],
    scorer: Scorer,
    config: RlConfig,
    *,
    start: int,
    seed: int,
    laps: Laps,
    world: World | None = None,
) -> Drawn:
    """Samples and scores groups until `batch_size` of them teach something, within `config.select.max_refills` rounds.

    A round asks `oversample` times as many questions as are missing, rounded up. Without refills the first is the only
    one. A round of which no group could be scored is the last: the judge is away.

    Args:
        loop: samples.
        questions: the stream.
        scorer: is given each group when its last rollout ends.
        config: batch size and `select`.
        start: the first question to ask; the next batch starts at `start + len(groups)`.
        seed: of the sampling.
        laps: gets the seconds of both.
        world: whose ranks share out each round's questions; every rank returns the same groups.
    """
    world = world or World()
    groups: list[ScoredGroup] = []
    missing, rounds = config.batch_size, 0
    while missing > 0 and rounds <= config.select.max_refills:
        asked = questions(start + len(groups), math.ceil(config.select.oversample * missing))
        sampling = loop.config.sampling(seed=seed + rounds * _REFILL_SEEDS)
        scores = GroupScores(scorer, sampling.n)
        with world.phase("rollout"):
            own = own_questions(loop, asked, world)
            rollouts = loop.run([asked[place] for place in own], sampling, on_end=scores.ended)
        laps.end("rollout")
        with world.phase("reward"):
            found = exchanged(scores.collect(rollouts), own, world)
        laps.end("reward")
        for place, group in enumerate(found, start=len(groups)):
            for rollout in group.rollouts:
                rollout.group = place
        groups += found
        rounds += 1
        missing = config.batch_size - sum(spread(group) > 0 for group in groups)
        if all(group.rewards is None for group in found):
            break
    return Drawn(groups=groups, kept=select(groups, config), refills=rounds - 1)


def select(groups: Sequence[ScoredGroup], config: RlConfig) -> list[ScoredGroup]:
    """The groups that are trained on, as asked.

    With neither refills nor oversampling all of them. Else those of the largest spread, `batch_size` at most, the ones
    asked earlier where it is equal; under refills none without spread, even if the batch is smaller for it.
    """
    if not config.select.is_on:
        return list(groups)
    scored = [place for place, group in enumerate(groups) if group.rewards is not None]
    ranked = sorted(scored, key=lambda place: -spread(groups[place]))  # stable: earlier first
    if config.select.max_refills:
        ranked = [place for place in ranked if spread(groups[place]) > 0]
    return [groups[place] for place in sorted(ranked[: config.batch_size])]


def spread(group: ScoredGroup) -> float:
    """The standard deviation of a group's rewards, exactly 0 where they are equal or not known."""
    return 0.0 if group.rewards is None else statistics.pstdev(reward.total for reward in group.rewards)
