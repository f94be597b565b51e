"""Alarms on paper: a warning in the log, and a line of runs/<name>/alarms.jsonl with figures and sample rollouts."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from thyme.rewards import Reward
from thyme.rollout.types import Rollout
from thyme.train.alarms import Alarm
from thyme.train.durable import write_text
from thyme.train.group_scores import ScoredGroup

MOST_SAMPLES = 3
"""Rollouts that an entry names."""
_log = logging.getLogger(__name__)


class AlarmLog:
    """Writes alarms.jsonl, one line per alarm that begins.

    Args:
        run_dir: the run's folder; None writes nothing.
        first_step: entries of this step and later ones are dropped: those steps are about to be run again.
    """

    def __init__(self, run_dir: Path | None, first_step: int) -> None:
        self._path = None if run_dir is None else run_dir / "alarms.jsonl"
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) < first_step]
            if len(kept) < len(lines):
                write_text(self._path, "".join(kept))

    def write(self, step: int, begun: Sequence[Alarm], groups: Sequence[ScoredGroup], rollouts: Path | None) -> None:
        """Logs the alarms that begin in a step and appends their lines.

        Args:
            step: from 0.
            begun: none or several.
            groups: of the step.
            rollouts: the file that they were recorded in, by group and index.
        """
        for alarm in begun:
            self._write_one(step, alarm, groups, rollouts)

    def _write_one(self, step: int, alarm: Alarm, groups: Sequence[ScoredGroup], rollouts: Path | None) -> None:
        lines = samples(alarm.name, groups)
        figures = f"{alarm.metric} is {alarm.value:.3g}"
        if math.isfinite(alarm.level):
            figures += f", its level {alarm.level:.3g}"
        where = "" if rollouts is None else f" ({rollouts}, lines {', '.join(map(str, lines))})"
        _log.warning("alarm %s: rl step %d: %s: %s%s", alarm.name, step + 1, figures, alarm.text, where)
        if self._path is None:
            return
        entry = {
            "step": step,
            "alarm": alarm.name,
            "metric": alarm.metric,
            "value": _finite(alarm.value),
            "level": _finite(alarm.level),
            "text": alarm.text,
            "rollouts": None if rollouts is None else rollouts.relative_to(self._path.parent).as_posix(),
            "lines": lines,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def samples(alarm: str, groups: Sequence[ScoredGroup]) -> list[int]:
    """The rollouts that show an alarm best: their lines, from 1, in the step's file. Of equals the earlier ones."""
    show = _SHOWS.get(alarm, _long)
    scored: list[float] = []
    for group in groups:
        rewards: Sequence[Reward | None] = group.rewards or [None] * len(group.rollouts)
        scored += (show(rollout, reward) for rollout, reward in zip(group.rollouts, rewards, strict=True))
    best = sorted(range(len(scored)), key=lambda index: -scored[index])[:MOST_SAMPLES]
    return sorted(index + 1 for index in best)


def _long(rollout: Rollout, reward: Reward | None) -> float:
    return float(rollout.num_sampled)


def _without_code(rollout: Rollout, reward: Reward | None) -> float:
    return -float(rollout.num_code)


def _without_entropy(rollout: Rollout, reward: Reward | None) -> float:
    return -float(rollout.entropies[rollout.sampled].mean()) if rollout.num_sampled else -math.inf


def _well_formed_and_wrong(rollout: Rollout, reward: Reward | None) -> float:
    return -math.inf if reward is None else reward.formatting - reward.result


def _with_failing_code(rollout: Rollout, reward: Reward | None) -> float:
    return float(sum(turn.result is not None and turn.result.status.name != "OK" for turn in rollout.turns))


_SHOWS: dict[str, Callable[[Rollout, Reward | None], float]] = {
    "tool_use": _without_code,
    "entropy": _without_entropy,
    "reward_hacking": _well_formed_and_wrong,
    "sandbox": _with_failing_code,
}
"""How well a rollout shows an alarm; the others show the longest."""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return math.inf
