"""Figures from rollouts: what is counted, and how sure it is."""

from collections.abc import Sequence
from concurrent.futures import Future
from math import comb
from typing import Any

import numpy as np
import pytest

from thyme.evals import Verdict, by_scorer, chance, evaluate, is_correct, no_code_control, summarize, wilson
from thyme.rewards import JudgeUnavailable, Reward, ScorerError
from thyme.rollout.config import RolloutConfig
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import SandboxResult, Status


def question(scenario: str, solution: str, number: int = 0) -> Question:
    return Question(
        id=f"{scenario}{number}", image=None, image_path="", question="what?", solution=solution, scenario=scenario
    )


def rollout(asked: Question, answer: str | None, codes: Sequence[Status] = (), index: int = 0) -> Rollout:
    none = np.zeros(0)
    turns = [
        Turn(text="<code></code>", code="", result=SandboxResult(status=s), output_text="", num_images=0) for s in codes
    ]
    status = RolloutStatus.EOS_WITHOUT_ANSWER if answer is None else RolloutStatus.ANSWERED
    return Rollout(
        question=asked,
        group=0,
        index=index,
        seed=0,
        token_ids=none,
        kinds=none,
        rounds=none,
        sampled=none,
        temperatures=none,
        logprobs=none,
        logprobs_raw=none,
        entropies=none,
        weight_versions=none,
        images=[],
        turns=[*turns, Turn(text="", code=None, result=None, output_text="", num_images=0)],
        text="",
        answer=answer,
        status=status,
    )


class Loop:
    """Answers by rule; remembers how it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.config = RolloutConfig(top_k=9)
        self.asked = Sampling()

    def run(self, questions: Sequence[Question], sampling: Sampling, on_end: object = None) -> list[list[Rollout]]:
        self.asked = sampling
        return [[self.answer(q, i) for i in range(sampling.n)] for q in questions]


def test_the_wilson_interval_is_that_of_the_score_test() -> None:
    """Its ends are the shares p0 at which |p - p0| is exactly z standard errors of p0 (Wilson 1927)."""
    for share, n in [(0.5, 200), (0.0, 10), (1.0, 7), (0.83, 30), (1 / 3, 1)]:
        low, high = wilson(share, n)
        assert 0.0 <= low <= share <= high <= 1.0
        for end in {low, high} - {0.0, 1.0}:
            assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, abs=1e-6)


def test_the_wilson_interval_covers_as_often_as_it_says() -> None:
    """Exact coverage over all outcomes, averaged over true shares: 95 % within a point."""
    n = 40
    intervals = [wilson(k / n, n) for k in range(n + 1)]
    truths = np.linspace(0.02, 0.98, 97)
    covered = [
        sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        for p in truths
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("share", "n"), [(0.5, 0), (1.1, 5), (-0.1, 5), (float("nan"), 5)])
def test_wilson_refuses_what_is_no_share(share: float, n: int) -> None:
    with pytest.raises(ValueError, match="wilson"):
        wilson(share, n)


@pytest.mark.parametrize(
    ("answer", "solution", "correct"),
    [("7", "7", True), (" 7 ", "7", True), ("8", "7", False), (None, "7", False), ("", "7", False), ("72", "7", False)],
)
def test_the_answer_is_judged_by_the_rules_of_the_result_reward(
    answer: str | None, solution: str, correct: bool
) -> None:
    assert is_correct(rollout(question("crop", solution), answer)) is correct


def test_a_summary_counts_what_it_says() -> None:
    asked = [question("crop", "7", i) for i in range(4)]
    groups = [
        [rollout(asked[0], "7", [Status.OK, Status.OK]), rollout(asked[0], "8", [Status.OK])],
        [rollout(asked[1], "7", [Status.OK, Status.ERROR]), rollout(asked[1], "7")],
        [rollout(asked[2], None, [Status.TIMEOUT]), rollout(asked[2], None)],
        [rollout(asked[3], "7"), rollout(asked[3], "7")],
    ]
    summary = summarize(groups)
    assert (summary.n, summary.accuracy) == (4, 2.5 / 4)
    assert (summary.low, summary.high) == wilson(2.5 / 4, 4)
    assert (summary.code_share, summary.code_ok) == (4 / 8, 2 / 4)
    assert summary.mean_rounds == (3 + 2 + 3 + 1 + 2 + 1 + 1 + 1) / 8
    assert summary.statuses == {"answered": 6, "eos_without_answer": 2}
    assert summarize(groups[3:]).code_ok is None


def test_an_answer_that_cannot_be_judged_is_wrong_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def matches(answer: str, solution: str, question: str) -> bool:
        if answer == "hang":
            raise TimeoutError("too long")
        return answer == solution

    monkeypatch.setattr("thyme.rewards.rules.matches", matches)
    asked = question("crop", "7")
    summary = summarize([[rollout(asked, "7"), rollout(asked, "hang")]])
    assert (summary.accuracy, summary.errors) == (0.5, 1)
    assert "question 'crop0': result: TimeoutError: too long" in caplog.text
    assert summarize([[rollout(asked, "7"), rollout(asked, None)]]).errors == 0


def test_evaluation_is_greedy_by_default_and_split_by_scenario() -> None:
    questions = [question("crop", "1", 0), question("direct", "2"), question("crop", "3", 1)]
    loop = Loop(lambda q, i: rollout(q, "1" if q.scenario == "crop" else "2"))
    result = evaluate(loop, questions)  # type: ignore[arg-type]
    assert loop.asked == Sampling(n=1, temperature=0.0, code_temperature=0.0, top_k=9, seed=0, allow_code=True)
    assert result.overall.accuracy == pytest.approx(2 / 3)
    assert {name: s.accuracy for name, s in result.scenarios.items()} == {"crop": 0.5, "direct": 1.0}
    assert [group[0].question for group in result.rollouts] == questions
    written = result.to_json()
    assert written["scenarios"]["crop"]["n"] == 2 and "rollouts" not in written
    with pytest.raises(ValueError, match="no questions"):
        evaluate(loop, [])  # type: ignore[arg-type]


def test_the_control_asks_only_what_needs_code_and_forbids_it() -> None:
    questions = [question("direct", "2"), *(question("crop", str(i % 2), i) for i in range(4)), question("zoom", "5")]
    loop = Loop(lambda q, i: rollout(q, "0"))
    control = no_code_control(loop, questions)  # type: ignore[arg-type]
    assert loop.asked == Sampling(n=1, temperature=0.0, code_temperature=0.0, top_k=9, seed=0, allow_code=False)
    assert control.overall.n == 5 and set(control.scenarios) == {"crop", "zoom"}
    assert control.scenarios["crop"].accuracy == 0.5
    assert control.chance == {"crop": pytest.approx(1 / 3), "zoom": 0.0}
    assert control.to_json()["scenarios"]["crop"]["chance"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="direct"):
        no_code_control(loop, questions[:1])  # type: ignore[arg-type]


def test_chance_is_unbiased() -> None:
    """Over many small sets of uniform digits its mean is one tenth, which a majority guess would overstate."""
    rng = np.random.default_rng(0)
    sets = [[question("crop", str(d)) for d in rng.integers(0, 10, 12)] for _ in range(400)]
    assert np.mean([chance(s) for s in sets]) == pytest.approx(0.1, abs=0.01)


class Judge:
    """A scorer that accepts what is in `right`, and has no verdict on groups with an answer in `away`."""

    def __init__(self, right: Sequence[str], away: Sequence[str] = ()) -> None:
        self.right, self.away = right, away

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        future: Future[list[Reward]] = Future()
        if any(one.answer in self.away for one in group):
            future.set_exception(JudgeUnavailable("HTTP 500"))
        else:
            results = [float(is_correct(one) or one.answer in self.right) for one in group]
            future.set_result([Reward(total=value + 0.5, result=value, formatting=1.0) for value in results])
        return future

    def metrics(self) -> dict[str, float]:
        return {}


def test_a_judge_decides_what_rules_do_not_and_is_counted() -> None:
    questions = [question("crop", "blue", i) for i in range(2)] + [question("zoom", "blue")]
    answers = {"crop0": "azure", "crop1": "red", "zoom0": "blue"}
    loop = Loop(lambda q, _: rollout(q, answers[q.id]))
    result = evaluate(loop, questions, scorer=Judge(["azure"]))  # type: ignore[arg-type]
    assert result.overall.accuracy == pytest.approx(2 / 3)
    assert (result.overall.by_judge, result.overall.errors) == (1, 0)
    assert (result.scenarios["crop"].accuracy, result.scenarios["crop"].by_judge) == (0.5, 1)
    assert (result.scenarios["zoom"].accuracy, result.scenarios["zoom"].by_judge) == (1.0, 0)
    alone = evaluate(loop, questions)  # type: ignore[arg-type]
    assert (alone.overall.accuracy, alone.overall.by_judge) == (pytest.approx(1 / 3), 0)
    control = no_code_control(loop, questions, scorer=Judge(["azure"]))  # type: ignore[arg-type]
    assert control.overall.accuracy == pytest.approx(2 / 3)


def test_answers_without_a_verdict_are_errors_where_the_rules_do_not_accept_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = [question("crop", "blue", i) for i in range(2)]
    groups = [[rollout(asked[0], "blue"), rollout(asked[0], "sky")], [rollout(asked[1], "azure")] * 2]
    verdicts = by_scorer(Judge(["azure"], away=["sky"]), groups)
    assert verdicts == [
        [Verdict(value=1.0), Verdict(value=0.0, error="HTTP 500")],
        [Verdict(value=1.0, by_judge=True)] * 2,
    ]
    summary = summarize(groups, verdicts)
    assert (summary.accuracy, summary.errors, summary.by_judge) == (0.75, 1, 2)
    assert caplog.messages == ["HTTP 500"]


def test_a_refused_judge_ends_the_evaluation() -> None:
    class Refused(Judge):
        def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
            raise ScorerError("the key is refused")

    with pytest.raises(ScorerError):
        evaluate(Loop(lambda q, _: rollout(q, "7")), [question("crop", "7")], scorer=Refused([]))  # type: ignore[arg-type]
