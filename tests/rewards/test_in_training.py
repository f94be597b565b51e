"""A reward of one's own in a training run, on the toy with random weights."""

import json
from pathlib import Path

import pytest

from tests.train.rl_material import make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import RewardConfig, ScorerError, open_scorer
from thyme.sandbox import Sandbox
from thyme.toy.scenarios import questions
from thyme.train.config import RlConfig
from thyme.train.rl import train_rl

TOGETHER = """
import asyncio

arrived, all_here = [], asyncio.Event()

async def reward(rollouts):
    arrived.append(rollouts[0].question.id)
    if len(arrived) == 2:
        all_here.set()
    await all_here.wait()
    return [{"order": float(rollout.index), "base": 0.25} for rollout in rollouts]
"""


def test_groups_are_rewarded_together_and_parts_are_recorded(
    model: Model, processor: Processor, sandbox: Sandbox, tmp_path: Path
) -> None:
    """The first group's reward waits for the second's: one after the other, the step would not end."""
    (tmp_path / "mine.py").write_text(TOGETHER)
    asked = questions(0, 2, {"arithmetic": 1.0})
    config = RlConfig(steps=1, batch_size=2, kl_coef=0.0, record_steps=1)
    with open_scorer(RewardConfig(function=f"{tmp_path}/mine.py:reward")) as scorer:
        (metrics,) = train_rl(
            model, processor, make_loop(model, sandbox), endless(asked), config, scorer=scorer, run_dir=tmp_path
        )
    assert metrics["reward/mean"] == 0.75 and metrics["reward/errors"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step_0.jsonl").read_text().splitlines()]
    assert [row["rewards"]["parts"] for row in rows] == [{"order": float(i % 2), "base": 0.25} for i in range(4)]
    assert [row["rewards"]["total"] for row in rows] == [0.25, 1.25] * 2


def test_a_function_that_never_works_ends_the_run(
    model: Model, processor: Processor, sandbox: Sandbox, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def reward(rollouts):\n    return [rollout.score for rollout in rollouts]\n")
    asked = questions(0, 1, {"arithmetic": 1.0})
    config = RlConfig(steps=9, batch_size=1, kl_coef=0.0, record_steps=0)
    seen: list[object] = []
    with (
        open_scorer(RewardConfig(function=f"{tmp_path}/mine.py:reward")) as scorer,
        pytest.raises(ScorerError, match=r"AttributeError: .* no attribute 'score' \(mine.py, line 2\)"),
    ):
        train_rl(
            model, processor, make_loop(model, sandbox), endless(asked), config, scorer=scorer, on_step=seen.append
        )
    assert len(seen) <= 1
