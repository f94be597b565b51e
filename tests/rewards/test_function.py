"""Reward functions of one's own: what they may give, and what happens when they fail."""

import threading
from pathlib import Path

import pytest

from tests.rewards.rollouts import answered, question, rollout
from thyme.rewards import Reward, RewardConfig
from thyme.rewards.opening import open_scorer
from thyme.rewards.scorer import ScorerError
from thyme.rollout.types import Rollout


def group(*answers: str, id: str = "q") -> list[Rollout]:
    asked = question(id)
    return [rollout(asked, answered(answer), index=index) for index, answer in enumerate(answers)]


def written(folder: Path, text: str, name: str = "reward") -> RewardConfig:
    (folder / "mine.py").write_text(text)
    return RewardConfig(function=f"{folder}/mine.py:{name}")


@pytest.mark.parametrize(
    ("body", "rewards"),
    [
        ("[1, 0.5]", [Reward(total=1.0), Reward(total=0.5)]),
        ("(True, -2)", [Reward(total=1.0), Reward(total=-2.0)]),
        ("numpy.array([1.0, 0.5], dtype='float32')", [Reward(total=1.0), Reward(total=0.5)]),
        ("torch.tensor([1.0, 0.5])", [Reward(total=1.0), Reward(total=0.5)]),
        ("[numpy.float32(1), torch.tensor(0.5)]", [Reward(total=1.0), Reward(total=0.5)]),
        ("[Reward(total=2.0, result=1.0), 0]", [Reward(total=2.0, result=1.0), Reward(total=0.0)]),
        (
            "[{'result': 1, 'brevity': -0.25}, {'total': 3, 'formatting': 1, 'x': 9}]",
            [
                Reward(total=0.75, result=1.0, parts={"brevity": -0.25}),
                Reward(total=3.0, formatting=1.0, parts={"x": 9.0}),
            ],
        ),
    ],
)
@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_function_gives_numbers_rewards_or_parts(
    tmp_path: Path, body: str, rewards: list[Reward], keyword: str
) -> None:
    text = f"import numpy, torch\nfrom thyme.rewards import Reward\n{keyword} reward(rollouts):\n    return {body}\n"
    with open_scorer(written(tmp_path, text)) as scorer:
        assert scorer.submit(group("blue", "red")).result(30) == rewards
        assert scorer.metrics() == {}


def test_it_sees_the_whole_group_and_what_stands_beside_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_reward.py").write_text("PRICE = 0.1\n")
    text = """
from __future__ import annotations
from dataclasses import dataclass
from beside_the_reward import PRICE

@dataclass
class Longest:
    tokens: int

def reward(rollouts):
    longest = Longest(max(rollout.num_sampled for rollout in rollouts))
    return [PRICE * (longest.tokens - rollout.num_sampled) for rollout in rollouts]
"""
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    asked = question()
    rollouts = [rollout(asked, "", index=index, tokens=tokens) for index, tokens in enumerate([10, 30, 20])]
    with open_scorer(RewardConfig(function="mine.py:reward")) as scorer:
        totals = [reward.total for reward in scorer.submit(rollouts).result(30)]
    assert totals == pytest.approx([2.0, 0.0, 1.0])


def test_the_example_is_a_reward_function() -> None:
    example = Path(__file__).parents[2] / "examples" / "write_a_reward.py"
    asked = question()
    rollouts = [rollout(asked, answered(answer), tokens=100) for answer in ("blue", "red")]
    with open_scorer(RewardConfig(function=f"{example}:reward")) as scorer:
        totals = [reward.total for reward in scorer.submit(rollouts).result(30)]
    assert totals == pytest.approx([1.5 - 0.2, 0.5 - 0.2])


def test_an_object_can_be_called_and_keeps_what_it_knows(tmp_path: Path) -> None:
    text = """
class Counting:
    calls = 0
    async def __call__(self, rollouts):
        self.calls += 1
        return [self.calls] * len(rollouts)
reward = Counting()
"""
    with open_scorer(written(tmp_path, text)) as scorer:
        assert [scorer.submit(group("blue")).result(30)[0].total for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(rollouts): ...", "'reward' is not there in mine.py"),
        ("reward = 3", "'reward' is no function in mine.py"),
        ("def reward(): ...", "takes (), but it is called with one list of rollouts"),
        ("def reward(rollouts, weights): ...", "takes (rollouts, weights), but it is called with one list of rollouts"),
        ("\nimport no_such_module", "raised ModuleNotFoundError: No module named 'no_such_module' (mine.py, line 2)"),
        ("def reward(rollouts)", "importing it raised SyntaxError"),
        ("raise SystemExit(3)", "importing it raised SystemExit: 3 (mine.py, line 1)"),
        ("async def reward(rollouts, judge): ...", "takes a judge: set judge.url and judge.model"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error, open_scorer(written(tmp_path, text)):
        pass
    assert message in str(error.value) and "mine.py" in str(error.value) and "\n" not in str(error.value).strip()


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error, open_scorer(RewardConfig(function="rewards/mine.py:reward")):
        pass
    assert str(error.value) == f"reward.function 'rewards/mine.py:reward': no file 'rewards/mine.py' in {tmp_path}"


FAULTS = {
    "[1.0]": "gave 1 rewards for 2 rollouts",
    "None": "gave a NoneType, not a list of rewards",
    "'12'": "gave a str, not a list of rewards",
    "[1.0, None]": "gave None for a reward: neither a number nor a Reward nor a dict of numbers",
    "[1.0, float('nan')]": "gave nan for a reward: not finite",
    "[1.0, Reward(total=float('inf'))]": "gave inf for total: not finite",
    "[1.0, {'brevity': 'short'}]": "gave 'short' for 'brevity': neither a number",
    "[1.0, {}]": "gave an empty dict: name at least a 'total'",
    "[1 / 0, 1.0]": "raised ZeroDivisionError: division by zero (mine.py, line 3)",
    "(_ for _ in ()).throw(ValueError('two\\nlines'))": "raised ValueError: two lines (mine.py, line 3)",
}


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize("body", FAULTS)
def test_a_fault_on_the_first_group_ends_the_run(tmp_path: Path, keyword: str, body: str) -> None:
    text = f"from thyme.rewards import Reward\n{keyword} reward(rollouts):\n    return {body}\n"
    with open_scorer(written(tmp_path, text)) as scorer:
        with pytest.raises(ScorerError) as error:
            scorer.submit(group("blue", "red")).result(30)
        assert FAULTS[body] in str(error.value) and "failed on its first group (question 'q'" in str(error.value)
        with pytest.raises(ScorerError):
            scorer.submit(group("blue", "red"))


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize("body", FAULTS)
def test_a_later_fault_costs_what_it_touches_and_is_named(
    tmp_path: Path, keyword: str, body: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"""from thyme.rewards import Reward
{keyword} reward(rollouts):
    return [7, 7] if rollouts[0].question.id != "bad" else {body}
"""
    whole_group = body in ("[1.0]", "None", "'12'", "[1 / 0, 1.0]") or "two" in body
    with open_scorer(written(tmp_path, text)) as scorer:
        assert scorer.submit(group("blue", "red")).result(30) == [Reward(total=7.0)] * 2
        first, second = scorer.submit(group("blue", "red", id="bad")).result(30)
        assert scorer.submit(group("blue", "red")).result(30) == [Reward(total=7.0)] * 2
    assert second.total == 0.0 and second.error is not None and FAULTS[body] in second.error
    assert first == (second if whole_group else Reward(total=1.0))
    (line,) = [record.message for record in caplog.records]
    assert "question 'bad'" in line and FAULTS[body] in line and "\n" not in line
    assert ("rollout 1" in line) is not whole_group


def test_a_coroutine_from_a_plain_function_is_explained(tmp_path: Path) -> None:
    text = "async def later(): return [1, 1]\nreward = lambda rollouts: later()\n"
    with open_scorer(written(tmp_path, text)) as scorer, pytest.raises(ScorerError, match="declare it with async def"):
        scorer.submit(group("blue", "red")).result(30)


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_decoding_goes_on_while_a_function_works(tmp_path: Path, keyword: str) -> None:
    """`submit` returns while the function still waits for the caller's thread."""
    wait = "go.wait()" if keyword == "def" else "await asyncio.to_thread(go.wait)"
    text = (
        f"import asyncio, threading\ngo = threading.Event()\n{keyword} reward(rollouts):\n    {wait}\n    return [1]\n"
    )
    with open_scorer(written(tmp_path, text)) as scorer:
        import thyme_reward_mine  # type: ignore[import-not-found]

        futures = [scorer.submit(group("blue")) for _ in range(3)]
        assert not any(future.done() for future in futures)
        thyme_reward_mine.go.set()
        assert [future.result(30) for future in futures] == [[Reward(total=1.0)]] * 3


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_function_that_does_not_come_back_is_not_waited_for(
    tmp_path: Path, keyword: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An async one costs its group, the other one the run: its thread cannot be ended."""
    wait = "go.wait(60)" if keyword == "def" else "await asyncio.Event().wait()"
    text = f"""
import asyncio, threading
go = threading.Event()
{keyword} reward(rollouts):
    if rollouts[0].question.id == "bad":
        {wait}
    return [1]
"""
    written(tmp_path, text)
    config = RewardConfig(function=f"{tmp_path}/mine.py:reward", function_timeout_s=0.2)
    with open_scorer(config) as scorer:
        import thyme_reward_mine  # type: ignore[import-not-found]

        assert scorer.submit(group("blue")).result(30) == [Reward(total=1.0)]
        bad, good = scorer.submit(group("blue", id="bad")), scorer.submit(group("blue"))
        what = "has not come back in reward.function_timeout_s = 0.2"
        if keyword == "def":
            for future in (bad, good):
                with pytest.raises(ScorerError, match=rf"{what} \(question 'bad'\)"):
                    future.result(30)
            with pytest.raises(ScorerError):
                scorer.submit(group("blue"))
        else:
            assert bad.result(30) == [Reward(total=0.0, error=f"function: {what}")]
            assert good.result(30) == [Reward(total=1.0)]
            assert what in caplog.text
        thyme_reward_mine.go.set()


def test_at_the_end_what_runs_is_cancelled_and_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    text = "import asyncio\nasync def reward(rollouts):\n    await asyncio.Event().wait()\n"
    with open_scorer(written(tmp_path, text)) as scorer:
        future = scorer.submit(group("blue"))
    assert future.cancelled()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(group("blue"))
