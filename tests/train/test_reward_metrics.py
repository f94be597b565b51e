"""What is measured of a step's rewards, by hand."""

import copy
from dataclasses import replace
from functools import partial

import pytest

from tests.train.rl_material import by_index, group_of, hand_rollout, make_loop, scored_as
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import Reward, RuleScorer
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox, SandboxResult, Status
from thyme.train.config import RlConfig
from thyme.train.group_scores import ScoredGroup
from thyme.train.reward_metrics import MOST_SOURCES, metric_name, name_sources, reward_metrics, source_metrics
from thyme.train.rl import train_rl


def test_reward_metrics_by_hand() -> None:
    reward = partial(Reward, consistency=0.0)
    metrics = reward_metrics(
        [
            scored_as(
                reward(total=0.0, result=0.0, formatting=0.0),
                reward(total=1.5, result=1.0, formatting=1.0),
            ),
            scored_as(
                reward(total=0.5, result=0.0, formatting=1.0),
                reward(total=0.5, result=0.0, formatting=1.0),
            ),
        ]
    )
    assert metrics["reward/mean"] == 2.5 / 4
    assert metrics["reward/result/mean"] == 0.25 and metrics["reward/formatting/mean"] == 0.75
    assert metrics["reward/group_std"] == pytest.approx(1.5 / 2**0.5 / 2)
    assert metrics["reward/frac_zero_std"] == 0.5
    assert metrics["reward/errors"] == metrics["reward/groups_failed"] == 0.0


def test_reward_metrics_count_what_could_not_be_scored() -> None:
    good = Reward(total=1.0, result=1.0, consistency=0.0, formatting=0.0)
    failed = Reward(total=0.0, result=0.0, consistency=0.0, formatting=0.0, error="result: ValueError: no")
    unknown = ScoredGroup(rollouts=[hand_rollout()], rewards=None)
    metrics = reward_metrics([scored_as(good, failed), unknown, scored_as(good, good)])
    assert metrics["reward/errors"] == 0.25 and metrics["reward/mean"] == 0.75
    assert metrics["reward/groups_failed"] == 1.0
    assert reward_metrics([unknown]) == {"reward/groups_failed": 1.0}


def test_parts_of_a_reward_function_of_ones_own_are_means_where_they_are() -> None:
    rewards = [Reward(total=1.0, parts={"color/hue": 1.0, "size": 2.0}), Reward(total=0.0, parts={"size": 4.0})]
    metrics = reward_metrics([scored_as(*rewards)])
    assert metrics["reward/color_hue/mean"] == 1.0 and metrics["reward/size/mean"] == 3.0
    # A part cannot take the name of one that everybody has.
    assert reward_metrics([scored_as(*[Reward(total=0.0, parts={"result": 9.0})] * 2)])["reward/result/mean"] == 0.0


def of_source(source: str, *totals: float, with_code: bool = False) -> ScoredGroup:
    result = SandboxResult(status=Status.OK, wall_s=0.01) if with_code else None
    question = Question(id="q", image=None, image_path="", question="?", solution="", scenario=source)
    rollouts = [hand_rollout(result=result, question=question) for _ in totals]
    return group_of(*rollouts, totals=totals)


def test_sources_by_hand() -> None:
    groups = [
        of_source("charts", 0.0, 1.5),
        of_source("charts", 1.0, 1.0, with_code=True),
        of_source("a/b", 0.5, 0.5),
        replace(of_source("a/b", 9.0, 9.0), rewards=None),
    ]
    metrics = source_metrics(groups, ["charts", "a/b"])
    assert metrics == {
        "reward/source/charts/mean": 3.5 / 4,
        "reward/source/charts/result": 0.0,
        "reward/source/charts/frac_zero_std": 0.5,
        "reward/source/charts/code_share": 0.5,
        "reward/source/charts/groups": 2.0,
        "reward/source/a_b/mean": 0.5,
        "reward/source/a_b/result": 0.0,
        "reward/source/a_b/frac_zero_std": 1.0,
        "reward/source/a_b/code_share": 0.0,
        "reward/source/a_b/groups": 1.0,
    }
    assert source_metrics(groups[:2], ["charts"]) == {}  # one source has nothing to be told apart from


def test_sources_keep_their_names_and_their_number_is_bounded() -> None:
    first = [of_source(f"s{number}", 0.0, 1.0) for number in range(3)]
    named = name_sources(first, [])
    assert named == ["s0", "s1", "s2"]
    many = [of_source(f"t{number}", 0.0, 1.0) for number in range(40)]
    named = name_sources(many, named)
    assert named[:4] == ["s0", "s1", "s2", "t0"] and len(named) == MOST_SOURCES
    assert name_sources(first, named) == named
    metrics = source_metrics([*many, of_source("", 0.0, 1.0)], named)
    assert metrics["reward/source/other/groups"] == 40 - (MOST_SOURCES - 3) + 1
    assert "reward/source/unnamed/groups" in source_metrics([of_source("", 0.0, 1.0)], ["", "x"])
    assert metric_name("ü b/" + "x" * 50) == "ü_b_" + "x" * 36


def test_a_run_tells_its_sources_apart(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    model = copy.deepcopy(taught)
    config = RlConfig(steps=1, batch_size=2, kl_coef=0.0, record_steps=0)
    (metrics,) = train_rl(
        model, processor, make_loop(model, sandbox), endless(asked), config, scorer=RuleScorer(by_index)
    )
    assert {question.scenario for question in asked} == {"arithmetic", "direct"}
    assert metrics["reward/source/arithmetic/mean"] == metrics["reward/source/direct/mean"] == 0.5
    assert metrics["reward/source/arithmetic/code_share"] == 1.0
