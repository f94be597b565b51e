"""Alarms: planted faults are seen within two steps, steady runs are left alone, and an alarm says where to look."""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.rl_material import by_index, group_of, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import Reward, RuleScorer
from thyme.rollout import read_rollouts
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox, SandboxResult, Status
from thyme.train.alarm_log import AlarmLog, samples
from thyme.train.alarms import NAMES, Alarm, Alarms
from thyme.train.config import AlarmConfig, RlConfig
from thyme.train.metrics import Metrics
from thyme.train.rl import train_rl

Row = dict[str, float]
GROUPS, GROUP_SIZE = 16, 8
N = GROUPS * GROUP_SIZE


def steady(seed: int, steps: int = 100) -> Iterator[Row]:
    """Such metrics as the demo's: 16 questions of 8 rollouts, some hard and some easy, getting better and more certain
    from step to step; gradients and divergences with long tails."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        done = step / steps
        p_right = rng.beta(1.0 + 2 * done, 1.0, GROUPS)
        right = rng.binomial(GROUP_SIZE, p_right)
        p_code = rng.beta(2.0 + 6 * done, 2.0, GROUPS)
        code = rng.binomial(GROUP_SIZE, p_code).sum()
        yield {
            "rollout/code_share": code / N,
            "rollout/tool_calls": 1.3 * code / N,
            "actor/entropy": 0.3 * (1 - 0.6 * done) * rng.lognormal(0, 0.12),
            "reward/result/mean": right.sum() / N,
            "reward/formatting/mean": rng.binomial(N, 0.95) / N,
            "reward/frac_zero_std": float(np.mean((right == 0) | (right == GROUP_SIZE))),
            "optim/grad_norm": 0.5 * rng.lognormal(0, 0.35),
            "mismatch/kl": 1e-3 * rng.lognormal(0, 0.5),
            "sandbox/success_rate": rng.binomial(code, 0.93) / code,
        }


def raised(rows: Iterator[Row], config: AlarmConfig | None = None) -> list[tuple[int, str]]:
    """Step and name of every alarm that begins."""
    alarms = Alarms(config or AlarmConfig(), {})
    return [(step, alarm.name) for step, row in enumerate(rows) for alarm in alarms.check(row, num_rollouts=N)[0]]


def planted(seed: int, at: int, change: Callable[[Row], Row]) -> Iterator[Row]:
    """A steady run in which something breaks at a step and stays broken."""
    for step, row in enumerate(steady(seed, steps=at + 10)):
        yield row | change(row) if step >= at else row


def test_steady_runs_are_left_alone() -> None:
    """One alarm in 10,000 steps at most."""
    false = [alarm for seed in range(100) for alarm in raised(steady(seed))]
    assert len(false) <= 1, false


FAULTS: dict[str, Callable[[Row], Row]] = {
    "tool_use": lambda row: {"rollout/code_share": 0.1 * row["rollout/code_share"], "rollout/tool_calls": 0.1},
    "entropy": lambda row: {"actor/entropy": 0.15 * row["actor/entropy"]},
    "reward_hacking": lambda row: {
        "reward/result/mean": 0.3 * row["reward/result/mean"],
        "reward/formatting/mean": 1.0,
    },
    "grad_norm": lambda row: {"optim/grad_norm": 20 * row["optim/grad_norm"]},
    "mismatch": lambda row: {"mismatch/kl": 5.0},
    "no_spread": lambda row: {"reward/frac_zero_std": 1.0},
    "sandbox": lambda row: {"sandbox/success_rate": 0.2},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [6, 20, 90])
def test_a_planted_fault_is_seen_within_two_steps(name: str, at: int) -> None:
    """All of them; of reward hacking 9 in 10, since how many answers are right varies most, with the questions."""
    missed = 0
    for seed in range(20):
        begun = raised(planted(seed, at, FAULTS[name]))
        missed += not any(kind == name and at <= step <= at + 1 for step, kind in begun)
        assert {kind for _, kind in begun} <= {name}, (seed, begun)
    assert missed <= (2 if name == "reward_hacking" else 0)


@pytest.mark.soak
def test_the_rate_of_false_alarms_and_of_faults_missed() -> None:
    """On fresh seeds: at most one false alarm in 5,000 steps, at most 1 fault in 100 missed."""
    assert sum(len(raised(steady(seed))) for seed in range(1000, 1600)) <= 12
    missed = [
        (name, at, seed)
        for name in NAMES
        for at in (6, 10, 20, 50, 90)
        for seed in range(5000, 5060)
        if not any(kind == name and at <= step <= at + 1 for step, kind in raised(planted(seed, at, FAULTS[name])))
    ]
    assert len(missed) <= 21, missed


def test_a_collapse_over_some_steps_is_seen_too() -> None:
    """Code falls by a third each step, as where a policy unlearns it; 60 % to 8 % takes five."""
    for seed in range(20):
        rows = list(steady(seed, 40))
        for step in range(20, 40):
            rows[step]["rollout/code_share"] *= (2 / 3) ** (step - 19)
        steps = [step for step, name in raised(iter(rows)) if name == "tool_use"]
        assert steps and steps[0] <= 24


def test_what_is_no_number_is_a_jump_and_no_level() -> None:
    alarms = Alarms(AlarmConfig(warmup=2), {})
    begun, held = alarms.check({"optim/grad_norm": math.inf}, num_rollouts=1)
    assert [alarm.name for alarm in begun] == ["grad_norm"] and held["alarm/grad_norm"] == 1.0
    for value in (1.0, math.nan, 1.0, 1.0):
        alarms.check({"optim/grad_norm": value}, num_rollouts=1)
    assert alarms.level("optim/grad_norm") == 1.0
    begun, held = alarms.check({"optim/grad_norm": 1.1}, num_rollouts=1)
    assert begun == [] and set(held.values()) == {0.0}


def test_a_small_batch_needs_a_larger_fall() -> None:
    """Of 4 rollouts none with code is chance where half had some; of 128 it is not."""
    for count, expected in ((4, []), (128, ["tool_use"])):
        alarms = Alarms(AlarmConfig(), {})
        for _ in range(6):
            alarms.check({"rollout/code_share": 0.5}, num_rollouts=count)
        begun, _ = alarms.check({"rollout/code_share": 0.0}, num_rollouts=count)
        assert [alarm.name for alarm in begun] == expected


def test_form_that_falls_with_the_answers_is_no_hacking() -> None:
    def fault(row: Row) -> Row:
        return {"reward/result/mean": 0.0, "reward/formatting/mean": 0.2}

    assert raised(planted(0, 20, fault)) == []


def test_an_alarm_begins_once_and_may_begin_again() -> None:
    alarms = Alarms(AlarmConfig(), {})
    begins, holds = [], []
    for share in [0.6] * 6 + [0.0] * 3 + [0.6] + [0.0]:
        begun, held = alarms.check({"rollout/code_share": share}, num_rollouts=N)
        begins += [alarm.level for alarm in begun]
        holds.append(held["alarm/tool_use"])
    assert begins == [0.6, 0.6]
    assert holds == [0.0] * 6 + [1.0] * 3 + [0.0] + [1.0]


def test_the_level_goes_on_in_a_resumed_run() -> None:
    """The memory is what a checkpoint holds: after JSON, at the latest, it is no longer the same object."""
    memory: dict[str, object] = {}
    alarms = Alarms(AlarmConfig(window=8), memory)
    for row in steady(3, 12):
        alarms.check(row, num_rollouts=N)
    assert {len(values) for values in memory["history"].values()} == {8}  # type: ignore[attr-defined]
    resumed = Alarms(AlarmConfig(window=8), json.loads(json.dumps(memory)))
    row = {"rollout/code_share": 0.0, "mismatch/kl": 3.0}
    found = resumed.check(row, num_rollouts=N)
    assert found == alarms.check(row, num_rollouts=N) and {a.name for a in found[0]} == {"tool_use", "mismatch"}


def test_metrics_name_every_alarm_and_nothing_where_they_are_off() -> None:
    row = {"optim/grad_norm": math.nan}
    assert set(Alarms(AlarmConfig(), {}).check(row, num_rollouts=1)[1]) == {f"alarm/{name}" for name in NAMES}
    assert Alarms(AlarmConfig(enabled=False), {}).check(row, num_rollouts=1) == ([], {})


def test_the_samples_show_the_alarm() -> None:
    def reward(result: float, formatting: float) -> Reward:
        return Reward(total=result, result=result, formatting=formatting)

    ok, bad = (SandboxResult(status=status, wall_s=0.0) for status in (Status.OK, Status.ERROR))
    rollouts = [
        hand_rollout((1.0,) * 2, ok, entropies=np.asarray([0, 0, 3, 3], dtype=np.float32)),
        hand_rollout((1.0,) * 9, entropies=np.full(11, 0.01, dtype=np.float32)),
        hand_rollout((1.0,) * 3, bad, entropies=np.full(5, 1.0, dtype=np.float32)),
        hand_rollout((1.0,) * 4, entropies=np.full(6, 2.0, dtype=np.float32)),
    ]
    groups = [
        replace(group_of(*rollouts[:2], totals=(0.0, 0.0)), rewards=[reward(1, 1), reward(0, 1)]),
        replace(group_of(*rollouts[2:], totals=(0.0, 0.0)), rewards=[reward(0, 0), reward(1, 0)]),
    ]
    assert samples("tool_use", groups) == [1, 2, 4]  # two without code, then the first of the rest
    assert samples("sandbox", groups)[0] == 1 and 3 in samples("sandbox", groups)
    assert samples("entropy", groups) == [2, 3, 4]
    assert samples("reward_hacking", groups) == [1, 2, 3]
    assert samples("grad_norm", groups) == [2, 3, 4]
    unscored = [replace(group, rewards=None) for group in groups]
    assert len(samples("reward_hacking", unscored)) == 3


def test_entries_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    alarm = Alarm(name="sandbox", metric="m", value=math.nan, level=0.5, text="t")
    groups = [group_of(hand_rollout(), totals=(0.0,))]
    for step in (1, 2, 3):
        AlarmLog(tmp_path, step).write(step, [alarm], groups, tmp_path / "rollouts" / f"step_{step}.jsonl")
    with (tmp_path / "alarms.jsonl").open("a") as file:
        file.write('{"step": 1, "al')  # killed while writing
    AlarmLog(tmp_path, 3)
    entries = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0] == {
        "step": 1,
        "alarm": "sandbox",
        "metric": "m",
        "value": None,
        "level": 0.5,
        "text": "t",
        "rollouts": "rollouts/step_1.jsonl",
        "lines": [1],
    }


def test_thresholds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup: 9 must be at most window \(8\)"):
        AlarmConfig(window=8, warmup=9)
    with pytest.raises(ValueError, match=r"spike: 1.0 must be above 1"):
        AlarmConfig(spike=1.0)
    with pytest.raises(ValueError, match=r"fall: 1.0 must be in \[0, 1\)"):
        AlarmConfig(fall=1.0)


def test_a_run_whose_tools_collapse(
    taught: Model,
    processor: Processor,
    sandbox: Sandbox,
    asked: list[Question],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every rollout runs code until, from the third step on, none can draw it."""
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    loop.config = replace(loop.config, group_size=8)
    run, calls = loop.run, []

    def forgetful(asked: Sequence[Question], sampling: Sampling, **options: Any) -> list[list[Rollout]]:
        calls.append(sampling)
        return run(asked, replace(sampling, allow_code=len(calls) <= 2), **options)

    loop.run = forgetful  # type: ignore[method-assign]
    config = RlConfig(
        steps=3, batch_size=2, kl_coef=0.0, learning_rate=1e-6, record_steps=0, alarms=AlarmConfig(warmup=2)
    )
    collapsed: list[Metrics] = []

    with caplog.at_level(logging.WARNING):
        train_rl(
            model,
            processor,
            loop,
            endless(asked[:1]),
            config,
            scorer=RuleScorer(by_index),
            run_dir=tmp_path,
            on_step=collapsed.append,
        )
    assert [metrics["alarm/tool_use"] for metrics in collapsed] == [0.0, 0.0, 1.0]
    entries = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    (entry,) = [entry for entry in entries if entry["alarm"] == "tool_use"]
    assert (entry["step"], entry["level"], entry["value"]) == (2, 1.0, 0.0)
    assert entry["rollouts"] == "rollouts/step_2.jsonl" and len(entry["lines"]) == 3
    recorded: list[Rollout] = [rollout for rollout, _ in read_rollouts(tmp_path / entry["rollouts"])]
    assert all(recorded[line - 1].num_code == 0 for line in entry["lines"])
    assert "alarm tool_use: rl step 3: rollout/code_share is" in caplog.text
    assert not (tmp_path / "rollouts" / "step_0.jsonl").exists()
