"""How the parts are put together, and what shapes the reward on top."""

import itertools

import pytest

from tests.rewards.rollouts import answered, question, rollout
from thyme.rewards import Reward, RewardConfig, RuleJudge, combine, overlong, score, tool_bonus
from thyme.rewards.config import RewardMode
from thyme.sandbox import Status

PARTS = list(itertools.product((0.0, 1.0), repeat=3))  # result, consistency, formatting


@pytest.mark.parametrize(
    ("mode", "totals"),
    [
        ("gated", [0, 0.5, 0, 0.5, 1, 1.5, 1.5, 2]),
        ("additive", [0, 0.5, 0.5, 1, 1, 1.5, 1.5, 2]),
        ("result", [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_each_mode_for_every_combination_of_parts(mode: RewardMode, totals: list[float]) -> None:
    assert [combine(*parts, mode=mode) for parts in PARTS] == totals


def test_the_weights_are_those_of_the_config() -> None:
    weights = {"consistency_weight": 0.25, "formatting_weight": 0.1}
    assert combine(1, 1, 1, **weights) == pytest.approx(1.35)
    assert combine(0, 1, 1, **weights) == pytest.approx(0.1)
    assert combine(0, 1, 1, mode="additive", **weights) == pytest.approx(0.35)
    config = RewardConfig(consistency=0.25, formatting=0.1)
    assert score(rollout(question(), answered("blue")), RuleJudge(), config).total == pytest.approx(1.35)


class Recorder(RuleJudge):
    def __init__(self) -> None:
        self.asked = 0

    def consistent(self, thinking: str, answer: str) -> bool:
        self.asked += 1
        return super().consistent(thinking, answer)


@pytest.mark.parametrize(
    ("config", "answer", "asked", "expected"),
    [
        (RewardConfig(), "blue", 1, Reward(total=2.0, result=1.0, consistency=1.0, formatting=1.0)),
        (RewardConfig(), "red", 0, Reward(total=0.5, formatting=1.0)),
        (RewardConfig(mode="additive"), "red", 1, Reward(total=1.0, consistency=1.0, formatting=1.0)),
        (RewardConfig(mode="result"), "blue", 0, Reward(total=1.0, result=1.0, formatting=1.0)),
        (RewardConfig(consistency=0.0), "blue", 0, Reward(total=1.5, result=1.0, formatting=1.0)),
    ],
)
def test_consistency_is_asked_for_only_where_it_can_pay(
    config: RewardConfig, answer: str, asked: int, expected: Reward
) -> None:
    judge = Recorder()
    assert score(rollout(question(), answered(answer)), judge, config) == expected
    assert judge.asked == asked


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (100, -1.0), (101, -1.0), (10_000, -1.0)],
)
def test_the_overlong_punishment_is_dapos(tokens: int, expected: float) -> None:
    assert overlong(tokens, 100, 40) == pytest.approx(expected)
    assert overlong(tokens, 100, 40, penalty=0.5) == pytest.approx(expected / 2)


@pytest.mark.parametrize("buffer", [0, 101])
def test_an_overlong_buffer_lies_before_the_limit(buffer: int) -> None:
    with pytest.raises(ValueError, match="from 1 to the limit, 100"):
        overlong(5, 100, buffer)


def test_the_overlong_punishment_is_part_of_the_reward() -> None:
    config = RewardConfig(overlong_buffer_tokens=50, overlong_penalty=2.0)
    long = rollout(question(), answered("blue"), tokens=75)
    reward = score(long, RuleJudge(), config, max_tokens=100)
    assert reward.total == pytest.approx(1.0) and reward.parts == {"overlong": pytest.approx(-1.0)}
    with pytest.raises(ValueError, match="overlong_buffer_tokens: 50, but the response has no limit"):
        score(long, RuleJudge(), config)
    with pytest.raises(ValueError, match="must be at most the response's limit, 49 tokens"):
        score(long, RuleJudge(), config, max_tokens=49)


def test_the_tool_bonus_counts_runs_without_error_up_to_its_cap() -> None:
    codes = [Status.OK, Status.ERROR, Status.OK, Status.TIMEOUT, Status.OK]
    ran = rollout(question(), answered("blue"), codes=codes)
    assert tool_bonus(ran, 0.1, 5) == pytest.approx(0.3)
    assert tool_bonus(ran, 0.1, 2) == pytest.approx(0.2)
    assert tool_bonus(rollout(question(), answered("blue")), 0.1, 2) == 0.0
    config = RewardConfig(tool_bonus=0.1, tool_bonus_runs=2)
    assert score(ran, RuleJudge(), config) == Reward(
        total=2.2, result=1.0, consistency=1.0, formatting=1.0, parts={"tool_bonus": 0.2}
    )
    wrong = rollout(question(), answered("red"), codes=codes)
    assert score(wrong, RuleJudge(), config) == Reward(total=0.5, formatting=1.0, parts={"tool_bonus": 0.0})
