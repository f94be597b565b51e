"""How often the verdicts are wrong, counted on calls whose truth is known; the figures of docs/evidence.md."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from tests.rewards.evidence_pictures import Made, made_calls
from thyme.rewards.evidence import Verdict, evidence, reader

HELD, ABSENT, UNREADABLE = Verdict.HELD, Verdict.ABSENT, Verdict.UNREADABLE
TEXTS = ("word", "number", "price", "phone", "plate")

Counts = Counter[tuple[Verdict, Verdict]]
"""Calls by truth and verdict."""


def by_content(calls: Iterable[Made]) -> Iterator[tuple[Verdict, Verdict]]:
    for made in calls:
        found = evidence(made.answer, made.question, [made.call], picture=made.picture).verdict
        assert found is not None
        yield made.truth, found


def by_place(calls: Iterable[Made], *, code: bool) -> Iterator[tuple[Verdict, Verdict]]:
    """The place alone, whatever is answered: at least three quarters of the box, or not."""
    for made in calls:
        call = made.call if code else replace(made.call, code="")
        found = evidence(made.answer, made.question, [call], picture=made.picture, boxes=[made.box]).verdict
        assert found is not None
        yield HELD if made.cut == "on it" else ABSENT, found


def shown(name: str, counts: Counts) -> str:
    held, absent = (sum(n for (truth, _), n in counts.items() if truth is kind) for kind in (HELD, ABSENT))
    unreadable = counts[HELD, UNREADABLE] + counts[ABSENT, UNREADABLE]
    return (
        f"{name}: {held + absent} calls; held though absent {counts[ABSENT, HELD]} of {absent}, absent though held "
        f"{counts[HELD, ABSENT]} of {held}, unreadable {unreadable} ({counts[HELD, UNREADABLE]} of them held)"
    )


def share(counts: Counts, truth: Verdict, verdict: Verdict) -> float:
    return counts[truth, verdict] / sum(n for (one, _), n in counts.items() if one is truth)


@pytest.mark.soak
@pytest.mark.skipif(not reader.is_available(), reason="rapidocr-onnxruntime is not installed (Python up to 3.12)")
def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(by_content(made_calls(0, 110, TEXTS)))
    with capsys.disabled():
        print("\n" + shown("text", counts))
    assert counts.total() >= 500
    assert share(counts, ABSENT, HELD) <= 0.02 and share(counts, HELD, ABSENT) <= 0.05
    assert share(counts, HELD, HELD) >= 0.8 and share(counts, ABSENT, ABSENT) >= 0.5


@pytest.mark.soak
def test_colors(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(by_content(made_calls(0, 150, ("color",))))
    with capsys.disabled():
        print("\n" + shown("colors", counts))
    assert counts.total() >= 500
    assert share(counts, ABSENT, HELD) <= 0.05 and share(counts, HELD, ABSENT) <= 0.02
    assert share(counts, HELD, HELD) >= 0.8


@pytest.mark.soak
@pytest.mark.parametrize("code", [True, False])
def test_places(code: bool, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(by_place(made_calls(1, 110, (*TEXTS, "color")), code=code))
    with capsys.disabled():
        print("\n" + shown(f"boxes, {'by the code' if code else 'by pixels alone'}", counts))
    assert counts.total() >= 500
    assert counts[ABSENT, HELD] == counts[HELD, ABSENT] == 0, "a place that is told is the right one"
    assert counts[HELD, UNREADABLE] + counts[ABSENT, UNREADABLE] <= (0 if code else 0.05 * counts.total())
