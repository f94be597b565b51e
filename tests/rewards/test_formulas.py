"""Formulas by math-verify: in a process with limits, remembered, and never the end of a step."""

import logging
from collections.abc import Iterator

import pytest

from thyme.rewards import RuleJudge, formulas, judged, result
from thyme.rewards.formulas import is_formula, to_latex

HANG = r"10^{10^{10^{10}}}"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[formulas._Worker]:
    """A process of the test's own, with nothing remembered."""
    pytest.importorskip("math_verify", reason="math-verify (extra `eval`) decides formulas")
    own = formulas._Worker()
    monkeypatch.setattr(formulas, "_worker", own)
    formulas._cached.cache_clear()
    yield own
    own.close()
    formulas._cached.cache_clear()


def test_a_pair_that_takes_for_ever_is_ended_counted_and_remembered(
    worker: formulas._Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(formulas, "CPU_SECONDS", 0.3)
    assert result("2^3", "8", "") == 1.0
    first = worker._process
    value, error = judged(HANG, "7", "")
    assert value == 0.0 and error is not None and error.startswith("result: FormulaError: ") and "0.3 s" in error
    assert first is not None and first.poll() is not None and worker._process is None
    assert judged(HANG, "7", "") == (value, error) and worker._process is None  # remembered: nothing was started
    with caplog.at_level(logging.WARNING):
        assert result(HANG, "7", "") == 0.0
    assert "FormulaError" in caplog.text
    assert result("3^2", "9", "") == 1.0 and worker._process is not first


def test_a_process_that_dies_or_never_starts_costs_one_answer(
    worker: formulas._Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result("2^3", "8", "") == 1.0
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    assert judged("2^4", "16", "")[0] == 0.0
    assert result("2^5", "32", "") == 1.0
    worker.close()
    monkeypatch.setattr(formulas.sys, "executable", "/bin/false")
    value, error = judged("2^6", "64", "")
    assert value == 0.0 and error is not None and "does not start" in error
    monkeypatch.undo()


def test_answers_are_remembered_and_the_process_is_replaced_in_time(
    worker: formulas._Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "PAIRS_PER_PROCESS", 2)
    processes = set()
    for power in range(2, 6):
        for _ in range(3):
            assert result(f"2^{power}", str(2**power), "") == 1.0
        assert worker._process is not None
        processes.add(worker._process.pid)
    assert len(processes) == 2 and formulas._cached.cache_info().misses == 4


def test_what_rules_decide_never_starts_the_process(worker: formulas._Worker) -> None:
    for answer, solution in (("5 cm", "5 km"), ("B", "A"), ("red", "blue"), ("5-10", "-5"), ("2024-01-05", "2018")):
        assert result(answer, solution, "", RuleJudge()) == 0.0
    for answer, solution in (("[1, 2, 3]", "[1, 2, 4]"), ("3/4", "3/5"), ("16:9", "16:10"), ("No idea", r"\sqrt{2}")):
        assert result(answer, solution, "") == 0.0
    assert worker._process is None


@pytest.mark.parametrize(
    ("typed", "latex"),
    [
        ("2*sqrt(3)", r"2\cdot \sqrt{3}"),
        ("√3", r"\sqrt{3}"),
        ("sqrt(1+sqrt(2))", r"\sqrt{1+\sqrt{2}}"),
        (r"\sqrt{3}", r"\sqrt{3}"),
        (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
        ("x <= 5", r"x \leq  5"),
        ("sin(x)", r"\sin (x)"),
        ("pi r^2", r"\pi  r^2"),
        ("sqrt(", r"\sqrt("),
    ],
)
def test_typed_mathematics_becomes_latex(typed: str, latex: str) -> None:
    assert to_latex(typed).replace(" ", "") == latex.replace(" ", "")


@pytest.mark.parametrize("text", ["5 wrong", "the root of 5", "red", "", "x" * 500, "二", "A dog (1)"])
def test_words_are_no_formula(text: str) -> None:
    assert not is_formula(text)
