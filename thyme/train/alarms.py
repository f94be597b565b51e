"""What goes wrong in RL without an error: tools no longer used, entropy gone, rewards gamed, gradients that jump.

Each alarm compares a step's number with its running level, the median of the last steps, and with how much it usually
varies, so that a small batch, whose shares are rough, needs a larger fall. An alarm is 1 in `alarm/<name>` on every
step on which it holds; on the first of them it is also a warning in the log and a line of alarms.jsonl that names
figures and sample rollouts.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thyme.train.config import AlarmConfig
from thyme.train.metrics import Metrics

NOISE = 4.0
"""Standard deviations that a number must be away from its level."""
NOISE_TWICE = 2.0
"""The same for each of two steps in a row."""
_MAD_TO_SD = 1.4826  # of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm in one step."""

    name: str
    metric: str
    value: float
    """Of the metric, in this step."""
    level: float
    """Its running level before."""
    text: str
    """What it means and what to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    name: str
    metric: str
    holds: "Callable[[Alarms, _Watch, Metrics], bool]"
    text: str


class Alarms:
    """Watches the metrics of a run, step by step.

    Args:
        config: thresholds.
        memory: what the steps before left, in a checkpoint's plain values; this object's own from here on.
    """

    def __init__(self, config: AlarmConfig, memory: dict[str, Any]) -> None:
        self.config = config
        self._history: dict[str, list[float]] = memory.setdefault("history", {})
        self._held: list[str] = memory.setdefault("held", [])
        self._num_rollouts, self._num_code = 0, 0.0

    def check(self, metrics: Metrics, *, num_rollouts: int) -> tuple[list[Alarm], Metrics]:
        """Looks at a step; it is part of the level from the next one on.

        Args:
            metrics: of the step; one that is missing is not judged.
            num_rollouts: that the step sampled.

        Returns:
            The alarms that begin in this step, and alarm/<name> of all, 1 where one holds; nothing where they are off.
        """
        if not self.config.enabled:
            return [], {}
        self._num_rollouts, self._num_code = num_rollouts, num_rollouts * metrics.get("rollout/tool_calls", 0.0)
        held = [w for w in _WATCHES if w.metric in metrics and w.holds(self, w, metrics)]
        begun = [
            Alarm(
                name=watch.name,
                metric=watch.metric,
                value=metrics[watch.metric],
                level=self.level(watch.metric),
                text=watch.text,
            )
            for watch in held
            if watch.name not in self._held
        ]
        self._held[:] = [watch.name for watch in held]
        for name in _WATCHED:
            if name in metrics:
                history = self._history.setdefault(name, [])
                history.append(metrics[name])
                del history[: -self.config.window]
        return begun, {f"alarm/{watch.name}": float(watch in held) for watch in _WATCHES}

    def level(self, metric: str) -> float:
        """The median of the last steps; not a number where there were none."""
        return self._level_and_noise(self._history.get(metric, []))[0]

    def fell(self, metric: str, metrics: Metrics, share: float, count: float | None = None) -> bool:
        """Whether a number is under `share` of its level, by more than it varies: by far, or for the second time.

        Args:
            metric: which.
            metrics: of this step.
            share: of the level.
            count: of how many the number is a share: even one that never varied before could be so far off by chance.
        """
        history = self._history.get(metric, [])
        is_far = self._is_under(history, metrics[metric], share, count, NOISE)
        return is_far or self.fell_twice(metric, metrics, share, count)

    def fell_twice(self, metric: str, metrics: Metrics, share: float, count: float | None = None) -> bool:
        """Whether this step and the one before are, each by half as much, under the level before both."""
        *history, last = self._history.get(metric) or [math.nan]
        last_two = (last, metrics[metric])
        return all(self._is_under(history, value, share, count, NOISE_TWICE) for value in last_two)

    def jumped(self, metric: str, metrics: Metrics, least: float = 0.0) -> bool:
        """Whether a number is so many times its level as config.spike says, by more than it varies, and over `least`;
        or is no number."""
        value, history = metrics[metric], self._history.get(metric, [])
        if not math.isfinite(value):
            return True
        if len(history) < self.config.warmup:
            return False
        level, noise = self._level_and_noise(history)
        return value > max(self.config.spike * level, least) and value - level > NOISE * noise

    def _is_under(self, history: list[float], value: float, share: float, count: float | None, times: float) -> bool:
        if len(history) < self.config.warmup:
            return False
        level, noise = self._level_and_noise(history)
        if count:
            noise = max(noise, math.sqrt(max(level * (1 - level), 0.0) / count))
        return value < share * level and level - value > times * noise

    def _level_and_noise(self, history: list[float]) -> tuple[float, float]:
        """The median, and how far steps usually are from it, as a standard deviation."""
        finite = [value for value in history if math.isfinite(value)]
        if not finite:
            return math.nan, math.nan
        level = statistics.median(finite)
        return level, _MAD_TO_SD * statistics.median(abs(value - level) for value in finite)


def _code_share_fell(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    return alarms.fell(watch.metric, metrics, alarms.config.fall, alarms._num_rollouts)


def _success_fell(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    return alarms.fell(watch.metric, metrics, alarms.config.fall, alarms._num_code)


def _entropy_fell(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    return alarms.fell(watch.metric, metrics, alarms.config.fall)


def _result_fell_and_form_did_not(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    """Twice in a row: how hard the questions of a step are varies more than anything else does."""
    form = "reward/formatting/mean"
    fell = alarms.fell_twice(watch.metric, metrics, alarms.config.result_fall, alarms._num_rollouts)
    return fell and metrics.get(form, -math.inf) >= alarms.level(form)


def _gradient_jumped(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    return alarms.jumped(watch.metric, metrics)


def _mismatch_jumped(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    return alarms.jumped(watch.metric, metrics, least=alarms.config.mismatch_kl)


def _nothing_to_learn(alarms: Alarms, watch: _Watch, metrics: Metrics) -> bool:
    """Twice in a row: in a small batch once is nothing."""
    return metrics[watch.metric] == 1.0 and alarms._history.get(watch.metric, [0.0])[-1] == 1.0


_WATCHES = (
    _Watch(
        name="tool_use",
        metric="rollout/code_share",
        holds=_code_share_fell,
        text="fewer rollouts run code than before: the policy unlearns its tools",
    ),
    _Watch(
        name="entropy",
        metric="actor/entropy",
        holds=_entropy_fell,
        text="the policy draws nearly the same in every rollout: nothing new is tried",
    ),
    _Watch(
        name="reward_hacking",
        metric="reward/result/mean",
        holds=_result_fell_and_form_did_not,
        text="fewer answers are right while their form is as good as before or better: form may be what is learned",
    ),
    _Watch(
        name="grad_norm",
        metric="optim/grad_norm",
        holds=_gradient_jumped,
        text="the gradient is many times what it was: look at this step's rollouts and rewards",
    ),
    _Watch(
        name="mismatch",
        metric="mismatch/kl",
        holds=_mismatch_jumped,
        text="trainer and engine disagree about what was sampled: they may not hold the same weights or inputs",
    ),
    _Watch(
        name="no_spread",
        metric="reward/frac_zero_std",
        holds=_nothing_to_learn,
        text="in no group of two steps did rewards differ: nothing is learned from",
    ),
    _Watch(
        name="sandbox",
        metric="sandbox/success_rate",
        holds=_success_fell,
        text="fewer snippets run without an error than before: the sandbox or the code went wrong",
    ),
)
_WATCHED = (*(watch.metric for watch in _WATCHES), "reward/formatting/mean")
NAMES = tuple(watch.name for watch in _WATCHES)
"""Of the alarms."""
