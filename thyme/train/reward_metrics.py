"""What is measured of a step's rewards, in all and by where the questions come from."""

import re
from collections.abc import Sequence

import numpy as np

from thyme.rewards import Reward
from thyme.train.group_scores import ScoredGroup
from thyme.train.metrics import Metrics

MOST_SOURCES = 16
"""Sources that get metrics of their own in one run."""


def reward_metrics(groups: Sequence[ScoredGroup]) -> Metrics:
    """Means of the reward and its parts, the spread within groups, how many groups have none, and errors' share.

    As they were scored, of all groups that were; `reward/groups_failed` is the number of the others, and alone where
    all failed. A part of one's own that only some rollouts have is a mean over those.
    """
    rewards = [group.rewards for group in groups if group.rewards is not None]
    out = {"reward/groups_failed": float(len(groups) - len(rewards))}
    if not rewards:
        return out
    totals = np.array([[reward.total for reward in group] for group in rewards])
    out["reward/mean"] = float(totals.mean())
    own = {f"reward/{metric_name(part)}/mean": values for part, values in _own_parts(rewards).items()}
    out |= {name: float(np.mean(values)) for name, values in own.items()}
    for part in ("result", "consistency", "formatting"):
        out[f"reward/{part}/mean"] = float(np.mean([[getattr(reward, part) for reward in group] for group in rewards]))
    out["reward/group_std"] = float(totals.std(axis=1, ddof=1).mean())
    out["reward/frac_zero_std"] = float((totals.min(axis=1) == totals.max(axis=1)).mean())
    out["reward/errors"] = float(np.mean([[reward.error is not None for reward in group] for group in rewards]))
    return out


def _own_parts(rewards: Sequence[Sequence[Reward]]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for group in rewards:
        for reward in group:
            for part, value in reward.parts.items():
                parts.setdefault(part, []).append(value)
    return parts


def name_sources(groups: Sequence[ScoredGroup], named: Sequence[str]) -> list[str]:
    """The sources that have metrics of their own: those named before and then new ones, as they come, while there are
    at most MOST_SOURCES. A source is a question's `scenario`."""
    sources = dict.fromkeys([*named, *(group.rollouts[0].question.scenario for group in groups)])
    return list(sources)[:MOST_SOURCES]


def source_metrics(groups: Sequence[ScoredGroup], named: Sequence[str]) -> Metrics:
    """Reward, result, code share, dead groups and the number of groups by source; nothing where all have one source.

    Args:
        groups: of one step; those that were not scored count in no mean.
        named: see `name_sources`; the others come together as "other".
    """
    by_source: dict[str, list[ScoredGroup]] = {}
    for group in groups:
        source = group.rollouts[0].question.scenario
        name = metric_name(source or "unnamed") if source in named else "other"
        if group.rewards is not None:
            by_source.setdefault(name, []).append(group)
    if len(named) < 2:
        return {}
    out: Metrics = {}
    for name, scored in by_source.items():
        rewards = [reward for group in scored for reward in group.rewards or ()]
        totals = [group.totals("train") for group in scored]
        out |= {
            f"reward/source/{name}/mean": float(np.mean([reward.total for reward in rewards])),
            f"reward/source/{name}/result": float(np.mean([reward.result for reward in rewards])),
            f"reward/source/{name}/frac_zero_std": float(np.mean([min(group) == max(group) for group in totals])),
            f"reward/source/{name}/code_share": float(np.mean([r.num_code > 0 for g in scored for r in g.rollouts])),
            f"reward/source/{name}/groups": float(len(scored)),
        }
    return out


def metric_name(text: str) -> str:
    """What somebody else chose, as one plain word of a metric's name."""
    return re.sub(r"[^\w.-]", "_", text)[:40]
