"""From rollouts to figures: is the answer right, and how sure is the share of right ones."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from thyme import rewards
from thyme.rewards import JudgeUnavailable, Scorer
from thyme.rollout.types import Question, Rollout

_log = logging.getLogger(__name__)

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a set of rollouts amounts to."""

    n: int
    """Questions."""
    accuracy: float
    """Share of right answers: the mean over questions of the share among a question's samples."""
    low: float
    """Lower end of the 95 % Wilson interval of `accuracy` over `n` questions."""
    high: float
    """Upper end of it."""
    code_share: float
    """Share of rollouts that ran code."""
    code_ok: float | None
    """Share, among those, whose code blocks all ended OK; None if no rollout ran code."""
    mean_rounds: float
    """Decoded rounds per rollout: 1 without code."""
    statuses: dict[str, int]
    """Rollouts by why they ended."""
    errors: int = 0
    """Answers that could not be judged and that count as wrong: a formula took too long, or the judge was away."""
    by_judge: int = 0
    """Answers that the rules do not accept and a judge does; all of them count as right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is held of an answer."""

    value: float
    """1 if it is right."""
    error: str | None = None
    """Why it could not be judged."""
    by_judge: bool = False
    """Whether it is right on a judge's word alone."""


def is_correct(rollout: Rollout) -> bool:
    """Whether the rules of the result reward accept the answer; no judge is asked, and what raises is wrong."""
    return by_rules(rollout).value == 1.0


def by_rules(rollout: Rollout) -> Verdict:
    """The verdict of the rules, which no judge is asked about."""
    question = rollout.question
    value, error = rewards.judged(rollout.answer, question.solution, question.question)
    if error is not None:
        _log.warning("question %r: %s", question.id, error)
    return Verdict(value=value, error=error)


def by_scorer(scorer: Scorer, groups: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
    """The verdicts of a scorer, which are its rewards' results.

    Of a group that its judge gave no verdict on, the rules accept what they can, and the rest are errors.

    Raises:
        thyme.rewards.ScorerError: the scorer cannot work as things are.
    """
    futures = [scorer.submit(group) for group in groups]
    verdicts = []
    for group, future in zip(groups, futures, strict=True):
        ruled = [by_rules(rollout) for rollout in group]
        try:
            given = future.result()
        except JudgeUnavailable as error:
            _log.warning("%s", error)
            verdicts.append([one if one.value or one.error else Verdict(value=0.0, error=str(error)) for one in ruled])
            continue
        verdicts.append(
            [
                Verdict(value=reward.result, error=reward.error, by_judge=reward.result == 1.0 and not one.value)
                for reward, one in zip(given, ruled, strict=True)
            ]
        )
    return verdicts


def summarize(groups: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Verdict]] | None = None) -> Summary:
    """Summary of the rollouts, one group per question.

    Args:
        groups: the rollouts of each question.
        verdicts: on their answers, one for each; None: those of the rules.

    With several samples per question the interval is still that of `n` questions: samples of one question are not
    independent, so it errs on the wide side.

    Raises:
        ValueError: no question, or a question without rollouts.
    """
    if not groups or not all(groups):
        raise ValueError("summarize: needs at least one question, and at least one rollout of each")
    if verdicts is None:
        verdicts = [[by_rules(rollout) for rollout in group] for group in groups]
    accuracy = sum(sum(one.value for one in group) / len(group) for group in verdicts) / len(groups)
    low, high = wilson(accuracy, len(groups))
    rollouts = [rollout for group in groups for rollout in group]
    with_code = [rollout for rollout in rollouts if rollout.num_code]
    return Summary(
        n=len(groups),
        accuracy=accuracy,
        low=low,
        high=high,
        code_share=len(with_code) / len(rollouts),
        code_ok=sum(rollout.code_ok for rollout in with_code) / len(with_code) if with_code else None,
        mean_rounds=sum(len(rollout.turns) for rollout in rollouts) / len(rollouts),
        statuses=dict(Counter(rollout.status.value for rollout in rollouts).most_common()),
        errors=sum(one.error is not None for group in verdicts for one in group),
        by_judge=sum(one.by_judge for group in verdicts for one in group),
    )


def wilson(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share seen in n trials (Wilson 1927); never leaves [0, 1], fits small n.

    Raises:
        ValueError: n < 1 or a share outside [0, 1].
    """
    if n < 1 or not 0.0 <= share <= 1.0:
        raise ValueError(f"wilson: share {share} of {n} trials: needs a share in [0, 1] and at least one trial")
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def chance(questions: Sequence[Question]) -> float:
    """What guessing blindly is worth here: how often the solution of another question, drawn at random, is right.

    The unbiased estimate of the sum of squared solution frequencies. 0 with fewer than two questions.
    """
    n = len(questions)
    if n < 2:
        return 0.0
    counts = Counter(question.solution.strip() for question in questions)
    return sum(c * (c - 1) for c in counts.values()) / (n * (n - 1))
