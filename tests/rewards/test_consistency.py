"""Consistency by the rule judge, and the reward of whole rollouts."""

from typing import Any

import numpy as np
import pytest

from thyme.rewards import Reward, RuleJudge, consistency, score, scored
from thyme.rollout.prompts import extract_answer
from thyme.rollout.types import Question, Rollout, RolloutStatus
from thyme.toy.scenarios import SCENARIOS, demonstration, questions

JUDGE = RuleJudge()


@pytest.mark.parametrize(
    ("thinking", "answer", "expected"),
    [
        ("The digit is 7.", "7", 1.0),
        ("The digit is 6. No, the digit is 7.", "7", 1.0),
        ("The digit is 7. No, the digit is 6.", "7", 0.0),
        ("The value is 3.5.", "3.5", 1.0),
        ("The value is 3.5.", "3", 0.0),
        ("The product is 201,954", "201954", 1.0),
        ("The red sign is small: column 7, row 7.", "7", 0.0),
        ("I see 7.", "7", 0.0),
        ("The digit is 6.<code>\nx = 'the digit is 7.'\n</code>", "7", 0.0),
        ("The digit is 6.<code>print('is 7')", "7", 0.0),
        ("", "7", 0.0),
        ("The digit is 7.", "", 0.0),
    ],
)
def test_rule_judge(thinking: str, answer: str, expected: float) -> None:
    assert consistency(f"<think>{thinking}</think>\n<answer>{answer}</answer>", JUDGE) == expected


def test_only_the_end_of_the_thinking_counts() -> None:
    late = "The digit is 7." + " so" * 300
    assert consistency(f"<think>{late}</think>\n<answer>7</answer>", JUDGE) == 0.0
    cut = "<code>" + "# the digit is 7.\n" * 40 + "</code> no"
    assert consistency(f"<think>{cut}</think>\n<answer>7</answer>", JUDGE) == 0.0


def test_the_judge_sees_no_sandbox_markup() -> None:
    class Recorder(RuleJudge):
        seen = ""

        def consistent(self, thinking: str, answer: str) -> bool:
            self.seen = thinking
            return True

    recorder = Recorder()
    text = "<think>a<sandbox_output><image>12</sandbox_output>b</think>\n<answer>7</answer>"
    assert consistency(text, recorder) == 1.0 and recorder.seen == "a12b"
    assert consistency("<think>a\n<answer>7</answer>", recorder) == 0.0


def _rollout(question: Question, text: str, status: RolloutStatus = RolloutStatus.ANSWERED) -> Rollout:
    empty: Any = np.zeros(0)
    return Rollout(
        question=question,
        group=0,
        index=0,
        seed=0,
        token_ids=empty,
        kinds=empty,
        rounds=empty,
        sampled=empty,
        temperatures=empty,
        logprobs=empty,
        logprobs_raw=empty,
        entropies=empty,
        weight_versions=empty,
        images=[],
        turns=[],
        text=text,
        answer=extract_answer(text),
        status=status,
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("with_code", [True, False])
def test_every_demonstration_earns_the_full_reward(scenario: str, with_code: bool) -> None:
    for question in questions(0, 3, {scenario: 1.0}):
        text = demonstration(question, with_code=with_code).response
        full = Reward(total=2.0, result=1.0, consistency=1.0, formatting=1.0)
        assert score(_rollout(question, text), JUDGE) == full


def test_partial_rewards() -> None:
    question = questions(0, 1, {"direct": 1.0})[0]
    right, wrong = question.solution, str((int(question.solution) + 1) % 10)

    def total(thought: str, answer: str, status: RolloutStatus = RolloutStatus.ANSWERED, end: str = "") -> float:
        text = f"<think>The digit is {thought}.</think>\n<answer>{answer}</answer>{end}"
        return score(_rollout(question, text, status), JUDGE).total

    assert total(right, right) == 2.0
    assert total(wrong, right) == 1.5
    assert total(wrong, wrong) == 0.5
    assert total(right, right, end="\n") == 1.5
    assert total(right, right, RolloutStatus.FORGED) == 1.5
    assert score(_rollout(question, "<think>", RolloutStatus.LENGTH), JUDGE).total == 0.0


def test_a_part_that_raises_costs_itself_and_not_the_step() -> None:
    class Failing(RuleJudge):
        def correct(self, question: str, answer: str, solution: str) -> bool:
            raise OSError("the judge is away")

        def consistent(self, thinking: str, answer: str) -> bool:
            raise OSError("the judge is away")

    question = questions(0, 1, {"direct": 1.0})[0]
    right = f"<think>The digit is {question.solution}.</think>\n<answer>{question.solution}</answer>"
    reward = score(_rollout(question, right), Failing())
    assert (reward.total, reward.result, reward.consistency, reward.formatting) == (1.5, 1.0, 0.0, 1.0)
    assert reward.error == "consistency: OSError: the judge is away"

    wrong = "<think>The digit is unclear.</think>\n<answer>something else</answer>"
    reward = score(_rollout(question, wrong), Failing())
    assert (reward.total, reward.result, reward.consistency, reward.formatting) == (0.5, 0.0, 0.0, 1.0)
    assert reward.error == "result: OSError: the judge is away"
    assert score(_rollout(question, right), JUDGE).error is None


def test_a_reward_function_that_raises_costs_its_rollout_and_not_the_step(caplog: pytest.LogCaptureFixture) -> None:
    rollout = _rollout(questions(0, 1, {"direct": 1.0})[0], "")
    reward = scored(rollout, lambda _: Reward(**{"total": 1 / 0}))
    assert reward == Reward(
        total=0.0, result=0.0, consistency=0.0, formatting=0.0, error="score: ZeroDivisionError: division by zero"
    )
    assert "rollout 0: score: ZeroDivisionError" in caplog.text
    given = Reward(total=1.0, result=1.0, consistency=0.0, formatting=0.0)
    assert scored(rollout, lambda _: given) is given
