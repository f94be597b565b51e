"""Decisions are only added; kappa is Cohen's; what several reviewers come to."""

import sqlite3
import threading
from pathlib import Path

import pytest

from thyme.report.decisions import Agreement, Decision, Decisions, agreements, cohens_kappa, settled


def decision(row: str, reviewer: str, verdict: str, response: str | None = None, at: float = 0.0) -> Decision:
    return Decision(row=row, place=f"rows:{row}", reviewer=reviewer, verdict=verdict, response=response, at=at)  # type: ignore[arg-type]


@pytest.fixture
def decisions(tmp_path: Path):  # type: ignore[no-untyped-def]
    opened = Decisions(tmp_path / "deep" / "rows.sqlite")
    yield opened
    opened.close()


def test_the_last_word_holds_and_all_words_stay(decisions: Decisions) -> None:
    decisions.add(decision("1", "ann", "reject"))
    decisions.add(decision("1", "ann", "edit", "better"))
    decisions.add(decision("1", "bob", "accept"))
    latest = decisions.latest()["1"]
    assert (latest["ann"].verdict, latest["ann"].response, latest["bob"].verdict) == ("edit", "better", "accept")
    assert [word.verdict for word in decisions.history("1")] == ["reject", "edit", "accept"]
    assert latest["bob"].at > 1e9
    again = Decisions(decisions.path)
    assert again.latest() == decisions.latest()
    again.close()


def test_what_was_said_cannot_be_unsaid(decisions: Decisions) -> None:
    decisions.add(decision("1", "ann", "reject"))
    other = sqlite3.connect(decisions.path)
    for statement in ("UPDATE decisions SET verdict = 'accept'", "DELETE FROM decisions"):
        with pytest.raises(sqlite3.IntegrityError, match="only added"):
            other.execute(statement)
    other.close()
    assert decisions.latest()["1"]["ann"].verdict == "reject"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (decision("1", " ", "accept"), "a reviewer's name"),
        (decision("1", "ann", "perhaps"), "verdict 'perhaps'"),
        (decision("1", "ann", "edit"), "an edit has a response"),
        (decision("1", "ann", "accept", "text"), "nothing else has one"),
    ],
)
def test_what_is_no_decision_is_refused(decisions: Decisions, wrong: Decision, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decisions.add(wrong)
    assert decisions.latest() == {}


def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.sqlite"
    path.write_text("no database " * 100)
    with pytest.raises(ValueError, match="no file of decisions"):
        Decisions(path)
    assert path.read_text() == "no database " * 100
    path.unlink()
    newer = sqlite3.connect(path)
    newer.execute("CREATE TABLE decisions (id INTEGER)")
    newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(ValueError, match="of version 9, this thyme reads 1"):
        Decisions(path)


def test_two_reviewers_write_at_once(decisions: Decisions) -> None:
    other = Decisions(decisions.path)

    def write(to: Decisions, name: str) -> None:
        for row in range(50):
            to.add(decision(str(row), name, "accept"))

    threads = [threading.Thread(target=write, args=pair) for pair in ((decisions, "ann"), (other, "bob"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert all(set(of_row) == {"ann", "bob"} for of_row in decisions.latest().values())
    assert len(decisions.latest()) == 50


def test_kappa_is_cohens() -> None:
    """The textbook's 2 x 2 table: 20, 5, 10, 15 of 50."""
    table = [("a", "a")] * 20 + [("a", "r")] * 5 + [("r", "a")] * 10 + [("r", "r")] * 15
    assert cohens_kappa(table) == pytest.approx(0.4)
    assert cohens_kappa([("a", "a"), ("r", "r")]) == 1
    assert cohens_kappa([("a", "r"), ("r", "a")]) == -1
    assert cohens_kappa([("a", "a")]) is None and cohens_kappa([]) is None


def test_agreement_counts_rows_that_both_decided(decisions: Decisions) -> None:
    for row, ann, bob in (
        ("1", "accept", "accept"),
        ("2", "reject", "accept"),
        ("3", "reject", "reject"),
        ("4", "accept", ""),
    ):
        decisions.add(decision(row, "ann", ann))
        if bob:
            decisions.add(decision(row, "bob", bob))
    assert agreements(decisions.latest()) == [Agreement("ann", "bob", 3, 2, pytest.approx(0.4))]


def test_what_reviewers_come_to() -> None:
    accept, other = decision("1", "ann", "accept", at=1), decision("1", "bob", "accept", at=2)
    reject, edit = decision("1", "cid", "reject", at=3), decision("1", "dan", "edit", "better", at=0)
    edited_otherwise = decision("1", "eve", "edit", "worse", at=5)
    assert settled({}) is None
    assert settled({"ann": accept, "bob": other}) == other
    assert settled({"ann": accept, "cid": reject}) is None
    assert settled({"ann": accept, "dan": edit}) == edit
    assert settled({"dan": edit, "eve": edited_otherwise}) is None
