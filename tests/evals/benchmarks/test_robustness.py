"""Robustness: which rows a disturbance may be tried on, and what its figures mean; evidence beside the loop."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.rewards.rollouts import rollout
from tests.rewards.test_evidence import ran
from thyme.evals.benchmarks.answers import Answered, Answers
from thyme.evals.benchmarks.item import item_of
from thyme.evals.benchmarks.keeping import Kept
from thyme.evals.benchmarks.robustness import DisturbedRows, keeps_its_answer, robustness, robustness_table
from thyme.evals.benchmarks.rows import HeldOut
from thyme.evals.benchmarks.run import Asking
from thyme.evals.benchmarks.tool_use import mending, tool_figures
from thyme.evals.evidence import EvidenceFile, evidence_figures, read_evidence
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Status


def answered(index: str, value: float, **more: Any) -> Answered:
    fields: dict[str, Any] = dict.fromkeys(("calls", "calls_ok", "repairs", "pictures"), 0)
    fields |= {"prediction": "", "extracted": None, "by_judge": False, "status": "answered", "rounds": 1.0}
    fields |= {"index": index, "value": value, "best": value, "majority": value, "tokens": 1.0}
    return Answered(**fields | more)


def run(values: str, **more: Any) -> dict[str, Answered]:
    """Answers to as many rows, 1 for a right one; "." for a row that was not answered."""
    return {str(i): answered(str(i), float(v), **more) for i, v in enumerate(values) if v != "."}


def test_a_loss_and_what_tools_win_back() -> None:
    found = robustness(
        "rotated",
        run("1100.0", calls=2, calls_ok=1, mended=1),
        run("10000."),
        run("111101"),
        run("110010"),
    )
    assert found is not None and found.n == 4, "rows that all four answered"
    assert (found.clean, found.accuracy, found.lost) == (100.0, 50.0, 50.0)
    assert (found.clean_tool_free, found.accuracy_tool_free, found.lost_tool_free) == (50.0, 25.0, 25.0)
    assert found.won_back == -25.0 and found.p == 0.5
    assert (found.failed, found.mended) == (4, 100.0)
    (line,) = robustness_table([found]).splitlines()[2:]
    assert line == "| rotated | 4 | 100.0 to 50.0 | +50.0 | 0.500 | 50.0 to 25.0 | +25.0 | -25.0 | 4 | 100 % |"
    assert robustness("rotated", run("1."), run(".1"), run("11"), run("11")) is None


def test_the_share_of_failed_calls_that_the_next_round_mends() -> None:
    every = [answered("a", 1.0, calls=3, calls_ok=1, mended=1), answered("b", 1.0, calls=1, calls_ok=0)]
    assert mending(every) == (3, pytest.approx(100 / 3))
    assert mending([answered("c", 1.0, calls=2, calls_ok=2)]) == (0, None)
    assert tool_figures(every, 1)["failed_mended"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("row", "flips", "rotates"),
    [
        ({"question": "What is written?", "answer": "EXIT"}, True, True),
        ({"question": "Is the cat left of the dog?", "answer": "yes"}, False, False),
        ({"question": "Where is it?", "A": "Left side", "B": "none", "answer": "B"}, False, False),
        ({"question": "Is the cat above the dog?", "answer": "yes"}, True, False),
        ({"question": "What was left? No: is the copyright shown?", "answer": "yes"}, False, False),
        ({"question": "Is there an upset brightness?", "answer": "yes"}, True, True),
        ({"question": "猫在狗的左边吗?", "answer": "yes"}, False, False),
    ],
)
def test_rows_about_sides_keep_no_answer_when_the_picture_turns(
    row: dict[str, str], flips: bool, rotates: bool
) -> None:
    item = item_of({"index": 0, **row})
    assert (keeps_its_answer(item, "flipped"), keeps_its_answer(item, "rotated")) == (flips, rotates)
    assert keeps_its_answer(item, "blurred")


def asked(number: int, text: str = "What is 6 x 7?") -> Question:
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return Question(id=f"q{number}", image=picture, image_path="a.png", question=text, solution="42")


def test_rows_are_asked_disturbed_and_those_about_sides_not_at_all() -> None:
    rows = HeldOut([asked(0), asked(1, "left or right?"), asked(2), asked(3)])
    flipped = DisturbedRows(rows, "flipped", seed=0, limit=3)
    assert [item.index for item in flipped.items] == ["q0", "q2"]
    before, after = rows.question(2).image, flipped.question(1).image
    assert np.array_equal(np.asarray(after), np.asarray(before)[:, ::-1])
    assert flipped.identity != rows.identity and flipped.left_out == Counter()


class Scripted:
    """Gives each question the rollout that was written for it."""

    def __init__(self, answers: dict[str, Callable[[Question], Rollout]]) -> None:
        self._answers = answers

    def run(self, questions: Sequence[Question], sampling: Sampling, on_end: Callable[[Rollout], object]) -> None:
        for group, question in enumerate(questions):
            on_end(replace(self._answers[question.id](question), group=group))


def said(answer: str, *turns: Any) -> Callable[[Question], Rollout]:
    return lambda question: replace(rollout(question, f"<answer>{answer}</answer>"), turns=list(turns))


def test_evidence_is_looked_for_beside_the_loop_and_again_after_a_kill(tmp_path: Path) -> None:
    rows = HeldOut([asked(number) for number in range(4)])
    broken = ran(status=Status.ERROR)
    loop = Scripted(
        {
            "q0": said("42", ran(printed="42")),
            "q1": said("42", broken, ran(printed="40 + 1")),
            "q2": said("42"),
            "q3": said("41", ran(picture=asked(9).image), ran(printed="41")),
        }
    )

    def ask() -> tuple[Answers, EvidenceFile]:
        answers = Answers(tmp_path / "predictions.jsonl", {}, resume=True)
        evidence = EvidenceFile(tmp_path / "evidence" / "heldout.jsonl")
        asking = Asking(rows=rows, loop=loop, sampling=Sampling())  # type: ignore[arg-type]
        with Kept(rows, answers, tmp_path / "rollouts" / "heldout.jsonl", evidence=evidence) as kept:
            asking.run([number for number in range(4) if f"q{number}" not in answers.done], kept)
        answers.close()
        evidence.close()
        return answers, evidence

    answers, _ = ask()
    path = tmp_path / "evidence" / "heldout.jsonl"
    whole = read_evidence(path)
    assert [(one.index, one.verdict) for one in whole] == [
        ("q0", "held"),
        ("q1", "absent"),
        ("q2", None),
        ("q3", "held"),
    ]
    assert [call["verdict"] for call in whole[1].calls] == ["absent", "absent"]
    right = {(one.index, i): value >= 0.5 for one in answers.done.values() for i, value in enumerate(one.values)}
    figures = evidence_figures(whole, right)
    assert figures is not None and (figures.n, figures.right_held, figures.right_absent) == (3, 50.0, 50.0)
    assert answers.done["q1"].mended == 1 and answers.done["q3"].mended == 0

    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"index": "q1", "samp')
    ask()
    assert sorted(read_evidence(path), key=lambda one: one.index) == whole
    assert len(json.loads((tmp_path / "rollouts" / "heldout.jsonl").read_text().splitlines()[0])["turns"]) == 1
