"""The published traces: what their tools returned holds what they answer, and not what others answer."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.material import MISSING, published_cases
from thyme.rewards.evidence import Call, Evidence, Verdict, evidence, reader

CASES = {Path(folder).name: (Path(folder), case) for folder, case in published_cases().items()}

pytestmark = [
    pytest.mark.skipif(not CASES, reason=MISSING),
    pytest.mark.skipif(not reader.is_available(), reason="rapidocr-onnxruntime is not installed (Python up to 3.12)"),
]


def looked_at(name: str, answer: str | None = None, returned_by: str | None = None) -> Evidence:
    """The evidence of a case; with another answer, or with what the tools of another case returned."""
    _, asked = CASES[name]
    folder, case = CASES[returned_by or name]
    calls = [_call(folder, step) for step in case["rounds"]]
    return evidence(answer or asked["answer"][0], asked["question"][0], calls)


def _call(folder: Path, step: dict[str, Any]) -> Call:
    images = tuple(Image.open(folder / name).convert("RGB") for name in step["returned_images"])
    printed = "\n".join(entry["value"] for entry in step["returned_text"] or [])
    return Call(code=step["code"], images=images, printed=printed)


@pytest.mark.parametrize("name", ["case1", "case2", "case5", "case6", "case7"])
def test_what_the_tools_returned_holds_the_answer(name: str) -> None:
    """A street sign, a telephone number that stands upright, a turned formula by hand, faint writing, two values."""
    found = looked_at(name)
    assert found.verdict is Verdict.HELD, found


def test_what_is_said_not_to_be_there_is_unreadable_and_no_call_no_verdict() -> None:
    assert looked_at("case3").verdict is Verdict.UNREADABLE
    assert looked_at("case8").verdict is None


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("case1", "A. MACHIGAN"),
        ("case1", "C. MICHIGUN"),
        ("case2", "B. 206 451 5000"),
        ("case2", "D. 206 441 4000"),
        ("case7", "1.78, 0.54"),
    ],
)
def test_an_answer_that_is_not_in_it_is_absent(name: str, answer: str) -> None:
    assert looked_at(name, answer).verdict is Verdict.ABSENT


@pytest.mark.parametrize(("name", "other"), [("case1", "case2"), ("case2", "case1"), ("case6", "case1")])
def test_the_picture_of_another_case_does_not_hold_it(name: str, other: str) -> None:
    assert looked_at(name, returned_by=other).verdict is Verdict.ABSENT
