"""Which groups of rollouts make a batch: asked again where they teach nothing, or the best of more than are needed.

Dynamic sampling (DAPO, arXiv 2503.14476): groups without spread are dropped, and the next questions of the stream are
asked in their place. Oversample, filter, rank (PyVision-RL, arXiv 2602.20739): more questions are asked than a batch
holds, and the groups that differ most within themselves are kept.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thyme.data.streams import Stream
from thyme.rollout.types import Question
from thyme.train.config import RlConfig
from thyme.train.group_scores import ScoredGroup
from thyme.train.metrics import Metrics

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
    ask: Callable[[Sequence[Question], int], list[ScoredGroup]],
    questions: Stream[Question],
    config: RlConfig,
    *,
    start: int,
    seed: int,
) -> Drawn:
    """Samples and scores groups until `batch_size` of them teach something, within `config.select.max_refills` rounds.

    A round asks `oversample` times as many questions as are missing, rounded up. Without refills the first is the only
    one. A round of which no group could be scored is the last: the judge is away.

    Args:
        ask: samples and scores the groups of these questions under this seed.
        questions: the stream.
        config: batch size and `select`.
        start: the first question to ask; the next batch starts at `start + len(groups)`.
        seed: of the sampling.
    """
    groups: list[ScoredGroup] = []
    missing, rounds = config.batch_size, 0
    while missing > 0 and rounds <= config.select.max_refills:
        asked = questions(start + len(groups), math.ceil(config.select.oversample * missing))
        found = ask(asked, seed + rounds * _REFILL_SEEDS)
        for place, group in enumerate(found, start=len(groups)):
            for rollout in group.rollouts:
                rollout.group = place
        groups += found
        rounds += 1
        missing = config.batch_size - sum(spread(group, config) > 0 for group in groups)
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
    ranked = sorted(scored, key=lambda place: -spread(groups[place], config))  # stable: earlier first
    if config.select.max_refills:
        ranked = [place for place in ranked if spread(groups[place], config) > 0]
    return [groups[place] for place in sorted(ranked[: config.batch_size])]


def spread(group: ScoredGroup, config: RlConfig) -> float:
    """The standard deviation of a group's rewards, exactly 0 where they are equal or not known."""
    return statistics.pstdev(group.totals(config.truncated) or [0.0])
