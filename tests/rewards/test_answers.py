"""Whether two answers say the same: a table of answers with their kinds, properties, and pairs changed at random."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.mutations import mutated
from thyme.rewards import RuleJudge, formulas, judged, result
from thyme.rewards.answers import matches, refuses
from thyme.rewards.refusals import is_refusal
from thyme.rewards.spelling import normal

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
IDS = [f"{i}-{row['kind'].replace(' ', '_')}" for i, row in enumerate(ROWS)]
COLORS = "Which color?\nA. red\nB. blue\nC. green"


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_answer(row: dict[str, Any]) -> None:
    if needs := row.get("needs"):
        pytest.importorskip(needs, reason=f"{needs} (extra `eval`) decides formulas")
    assert result(row["answer"], row["solution"], row["question"]) == float(row["right"])


def test_only_formulas_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "is_available", lambda: False)
    decided = [bool(result(row["answer"], row["solution"], row["question"])) for row in ROWS]
    assert decided == [row["right"] and "needs" not in row for row in ROWS]


WRAPPED = (
    "{}",
    " {}\n",
    "{}.",
    "**{}**",
    "${}$",
    "<b>{}</b>",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "答案是{}。",
    "“{}”",
)


@pytest.mark.parametrize(
    "solution", ["B", "42", "-3.5", "1,234", "50%", "5 cm", "$5", "yes", "red", "2024-01-05", "3:45 PM"]
)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_is_wrapped_around_an_answer_means_nothing(wrapper: str, solution: str) -> None:
    for text in (solution, solution.lower(), solution.upper(), solution.replace(" ", "  ")):
        assert result(wrapper.format(text), solution, COLORS) == 1.0
        assert result(solution, wrapper.format(text), COLORS) == 1.0
        assert normal(normal(wrapper.format(text))) == normal(wrapper.format(text))


class _Eager(RuleJudge):
    """Takes anything for right, and says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def correct(self, question: str, answer: str, solution: str) -> bool:
        self.asked.append(answer)
        return True


REFUSALS = [row["answer"] for row in ROWS if row["kind"] == "refusal"] + [
    "I'm sorry, but I cannot help with that.",
    "The image was not provided, so I can't say.",
    "Unable to determine from the picture",
    "It is impossible to tell",
    "There is not enough information to answer.",
    "As an AI language model, I cannot see images",
    "图片中无法判断",
    "B, but I am not sure",
]


@pytest.mark.parametrize("answer", [a for a in REFUSALS if is_refusal(normal(a))])
@pytest.mark.parametrize("solution", ["no", "yes", "5", "B", "red", "\\sqrt{2}"])
def test_a_refusal_never_earns_and_no_judge_is_asked(answer: str, solution: str) -> None:
    judge = _Eager()
    assert result(answer, solution, COLORS, judge) == 0.0 and judge.asked == []


def test_nearly_all_refusals_are_known_as_such() -> None:
    unknown = {answer for answer in REFUSALS if not is_refusal(normal(answer))}
    assert unknown == {"no visible dog can be told"}  # a noun behind "no": never taken for a no either


def test_where_it_cannot_be_known_the_answer_may_say_so() -> None:
    question = COLORS + "\nD. It cannot be determined"
    judge = _Eager()
    assert result("It cannot be determined", "D", question) == 1.0
    assert result("Not enough information", "D", question) == 0.0
    assert result("Not enough information", "D", question, judge) == 1.0 and len(judge.asked) == 1
    assert result("It cannot be determined", "A", question, judge) == 0.0 and len(judge.asked) == 1
    assert result("unanswerable", "Unanswerable.", "") == 1.0


_HANG_S = 2.0
"""CPU seconds no pair comes near (the slowest takes hundredths of one): only a hang uses them up."""


def check_mutations(count: int, seed: int) -> None:
    """Nothing raises, nothing hangs, an answer is itself unless it is empty, and what refuses earns nothing."""
    for answer, solution, question in mutated(ROWS, count, seed):
        started = time.process_time()
        right, refused = matches(answer, solution, question), refuses(answer, solution, question)
        assert time.process_time() - started < _HANG_S, (answer, solution, question)
        assert not (right and refused) or answer.strip() == solution.strip(), (answer, solution, question)
        assert matches(solution, solution, question) == bool(solution.strip())
        assert matches(f" {answer}\n", solution, question) == right, (answer, solution, question)


def test_mutated_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "is_available", lambda: False)
    check_mutations(3_000, seed=1)


@pytest.mark.soak
def test_mutated_pairs_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "is_available", lambda: False)
    check_mutations(100_000, seed=2)


@pytest.mark.soak
def test_mutated_pairs_with_the_library() -> None:
    """No pair raises, and a pair that math-verify would not finish costs its limits and no more."""
    pytest.importorskip("math_verify", reason="math-verify (extra `eval`) decides formulas")
    errors = [error for pair in mutated(ROWS, 5_000, seed=3) if (error := judged(*pair)[1]) is not None]
    assert all(error.startswith("result: FormulaError: ") for error in errors) and len(errors) < 50, errors
