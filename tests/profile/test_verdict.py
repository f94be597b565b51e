"""The page of verdict, and that it names first what was made slow."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.by_heart import by_heart
from tests.trace_rules import checked
from thyme import trace
from thyme.data.rows import Demonstration
from thyme.engine import Engine, EngineConfig
from thyme.engine.step_cost import Ceilings
from thyme.engine.step_record import StepRecord
from thyme.profile.parts import Part
from thyme.profile.verdict import REST, Profile, verdict
from thyme.rewards import RuleScorer, score
from thyme.rewards.judge import RuleJudge
from thyme.rollout import RolloutConfig, RolloutLoop
from thyme.sandbox import Sandbox
from thyme.toy.scenarios import demonstrations
from thyme.trace import Span
from thyme.train.distributed import World
from thyme.train.rl import ask_round
from thyme.train.rl_metrics import Laps
from thyme.verbs.profile import ProfileKeys, Profiler

S = 1_000_000_000
SLEEP = 0.8


def part(name: str, seconds: float, floor: float = 0.0) -> Part:
    return Part(name=name, seconds=seconds, floor=floor, advice=f"mend {name}")


def record(**changes: object) -> StepRecord:
    fields: dict[str, object] = dict(
        kind="decode",
        tokens=4,
        sequences=4,
        samples=4,
        bytes=100,
        flops=200,
        idle_us=50.0,
        host_us=100.0,
        device_us=300.0,
        floor_us=100.0,
        blocks=3,
        running=4,
        waiting=0,
        parked=1,
        prefilled=30,
        unique=20,
    )
    return StepRecord(**(fields | changes))  # type: ignore[arg-type]


def profile(**changes: object) -> Profile:
    fields: dict[str, object] = dict(
        title="Rollouts of a toy",
        frame={"machine": "a CPU", "command": "`thyme profile rollout`"},
        ceilings=Ceilings(2e9, 3e9),
        spans=[
            Span("steps", "step 1", 0, 4 * S, 1, 1),
            Span("steps", "rollout", 0, 2 * S, 1, 1),
            Span("steps", "step 2", 5 * S, 11 * S, 1, 1),
            Span("sandbox", "run", 0, 3 * S, "q", 2),
            Span("loop", "wait for the sandbox", S, 2 * S, 1, 1),
        ],
        records=[record(), record(), record(kind="prefill", tokens=20, floor_us=200.0)],
        parts=[
            part("a", 4.0, 3.5),
            part("b", 2.0),
            part(REST, 1.0),
            part("c", 1.5, 2.0),
            part("d", 1.0),
            part("e", 0.7),
        ],
    )
    return Profile(**(fields | changes))  # type: ignore[arg-type]


def test_gaps_are_what_is_lost_beyond_the_least_and_the_rest_is_none_of_them() -> None:
    found = profile()
    assert [gap.name for gap in found.gaps()] == ["b", "d", "e"]
    assert found.wall_s == 10.0 and found.accounted == pytest.approx(0.9)


def test_the_page_says_times_shares_and_ratios() -> None:
    page = verdict(profile(trains=True))
    assert "1. **b**: 2.00 s, 20% of the time. Mend b.\n2. **d**" in page
    assert "| a | 4.000 | 40.0% | 3.500 | 88% |" in page
    assert "Where 10.00 s of 2 steps went" in page and "account for 90.0% of the time" in page
    assert "| ceilings | copy 2.0 GB/s, matmul 3.0 GFLOP/s," in page
    assert "| decode | 2 | 8 | 0.40 | 0.001 s | 0.000 s | 0.000 s | 0.000 s | 25.0% |" in page
    assert "| all | 3 | 28 | 0.40 |" in page and "| 33.3% |" in page
    assert "12 tokens drawn in 2.00 s of rollouts: 6 tok/s" in page and "there was to compute: 1.500" in page
    assert "Code ran for 3.00 s, summed over rollouts; decoding had nothing to do for 1.00 s of it" in page
    assert "No update was made" in page and "No update was made" not in verdict(profile())


@pytest.fixture(scope="module")
def rows() -> list[Demonstration]:
    """A crop, whose code sleeps first."""
    (row,) = demonstrations(0, 1, {"crop": 1.0})
    response = row.response.replace("<code>", f"<code>import time\ntime.sleep({SLEEP})\n", 1)
    return [replace(row, response=response)]


@pytest.fixture(scope="module")
def loop(rows: list[Demonstration], sandbox: Sandbox) -> Iterator[RolloutLoop]:
    model = by_heart(rows, steps=24, learning_rate=3e-3)
    engine = Engine(model, EngineConfig(max_sequences=4, num_blocks=64, quiet=True))
    config = RolloutConfig(
        prompt_style="short", max_tokens_per_round=110, max_tokens=200, group_size=2, temperature=0.0
    )
    assert model.processor is not None
    yield RolloutLoop(engine, sandbox, model.processor, config)


def test_code_that_sleeps_is_named_first_and_stands_in_the_trace(
    loop: RolloutLoop, rows: list[Demonstration], tmp_path: Path
) -> None:
    scorer = RuleScorer(lambda rollout: score(rollout, RuleJudge()))
    asked = [rows[0].question]
    with Profiler(ProfileKeys(steps=1, warmup=0, ops=False), loop.engine.model, tmp_path, loop.engine) as profiler:
        for step in range(profiler.num_steps):
            with trace.span("steps", f"step {step}"):
                (group,) = ask_round(loop, scorer, Laps(), World(), asked, step)
            profiler.advance()
    assert all(rollout.num_code == 1 and rollout.code_ok for rollout in group.rollouts)
    page = profiler.write("Rollouts", {"machine": "this"})
    first = re.findall(r"^1\. \*\*(.+?)\*\*: (\S+) s", page, re.MULTILINE)
    assert first[0][0] == "waiting for the sandbox" and float(first[0][1]) > 0.5 * SLEEP
    events = checked(tmp_path / "trace" / "trace.json")
    lanes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert lanes >= {"steps", "engine", "loop", "rollouts", "sandbox", "pictures", "rewards", "counters"}
    runs = [event["dur"] for event in events if event.get("cat") == "sandbox" and event["name"] == "run"]
    codes = [event for event in events if event.get("cat") == "rollouts" and event["name"] == "code 0"]
    assert len(runs) == len(codes) == 2 and min(runs) > 0.9e6 * SLEEP
    assert all(event["dur"] >= 0.9e6 * SLEEP for event in codes)
    assert "Named spans account for 99." in page or "Named spans account for 100.0%" in page
