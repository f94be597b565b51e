"""Evidence as a metric: shares by hand, and files that a killed run left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rewards.test_evidence import answered_with, ran
from thyme.evals.evidence import EvidenceFile, Found, evidence_figures, found_of, read_evidence, shown


def found(index: str, verdict: str | None, sample: int = 0) -> Found:
    return Found(index=index, sample=sample, verdict=verdict, reason="")


def test_shares_are_of_answers_that_called_a_tool() -> None:
    every = [
        found("a", "held"),
        found("b", "absent"),
        found("c", "absent"),
        found("d", "unreadable"),
        found("e", None),
    ]
    figures = evidence_figures(every, {("a", 0): True, ("b", 0): True, ("c", 0): False, ("e", 0): True})
    assert figures is not None and figures.n == 4
    assert (figures.held, figures.absent, figures.unreadable) == (25.0, 50.0, 25.0)
    assert (figures.right_held, figures.right_absent) == (50.0, 50.0)
    assert "evidence of 4 answers with calls: 25 % held, 50 % absent" in shown(figures)
    assert evidence_figures([found("e", None)], {}) is None
    none_right = evidence_figures(every, {})
    assert none_right is not None and none_right.right_held is None


def test_samples_are_told_apart() -> None:
    figures = evidence_figures([found("a", "held", 0), found("a", "absent", 1)], {("a", 1): True})
    assert figures is not None and (figures.right_held, figures.right_absent) == (0.0, 100.0)


def test_lines_are_kept_and_half_a_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "x.jsonl"
    file = EvidenceFile(path)
    file.add("a", answered_with(ran(printed="42")))
    file.add("a", answered_with(ran(printed="41")))  # is there already
    file.close()
    with path.open("a") as end:
        end.write('{"index": "b", "sam')
    again = EvidenceFile(path)
    again.add("b", answered_with())
    again.close()
    assert [(one.index, one.verdict) for one in read_evidence(path)] == [("a", "held"), ("b", None)]
    assert json.loads(path.read_text().splitlines()[0])["calls"] == [
        {"verdict": "held", "by": "value", "reason": "prints 42"}
    ]
    path.write_text('{"index": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: no evidence of an evaluation"):
        EvidenceFile(path)


def test_a_search_that_raises_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rollout: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr("thyme.evals.evidence.rollout_evidence", broken)
    one = found_of("a", replace(answered_with(ran(printed="42")), index=3))
    assert (one.verdict, one.sample, one.reason) == ("unreadable", 3, "the search raised RuntimeError: odd")
