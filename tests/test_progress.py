"""The line of long work: rates, time left, and where it is shown."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from thyme.progress import RECENT_S, Line, Pace, clock_time, progress
from thyme.train.metrics import step_progress

ROOT = Path(__file__).parents[1]
CODE = """
import sys, time
from thyme.progress import progress
with progress(3, "build", "item") as line:
    for number in range(3):
        time.sleep(0.05)
        line.advance(tokens=100, numbers={"kept": number})
        print("row", number)
print("end")
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_rate_is_that_of_the_recent_while(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.rate == 0 and pace.left(10) is None
    pace.start(0)
    for count in range(1, 11):
        clock.now += 1
        pace.add(count)
    assert pace.rate == pytest.approx(1) and pace.left(30) == pytest.approx(20)
    for count in range(11, 51):  # it becomes four times as slow
        clock.now += 4
        pace.add(count)
    assert pace.rate == pytest.approx(0.25) and pace.left(60) == pytest.approx(40)
    assert RECENT_S < 160
    assert pace.left(40) == 0


def test_a_line_says_what_is_done_how_fast_and_how_long_still(clock: Clock) -> None:
    line = Line("sft", 100, "step", clock=clock)
    assert line.told() == "0/100"
    clock.now += 10
    line.at(1, tokens=5000, numbers={"loss": 2.0, "locate": 0.5})
    assert line.told() == "1/100  10 s/step  500 tok/s  16:30 left  loss 2  locate 0.5"
    clock.now += 0.2
    line.advance(50, tokens=97_000, numbers={"loss": 1.25})
    assert line.told() == "51/100  5 step/s  10,000 tok/s  0:10 left  loss 1.25  locate 0.5"
    line.at(100)
    assert "left" not in line.told()
    assert not line.is_shown


def test_what_an_earlier_run_did_is_not_this_one_s_pace(clock: Clock) -> None:
    line = Line("rl", 1000, "step", clock=clock)
    clock.now += 2
    line.at(901)
    assert line.told() == "901/1000  2 s/step  3:18 left"


def test_work_that_goes_on_shows_what_was_done_before(clock: Clock) -> None:
    line = Line("compose", 100, "question", clock=clock)
    line.begin(40)
    assert line.told() == "40/100"
    for _ in range(10):
        clock.now += 2
        line.advance()
    assert line.told() == "50/100  2 s/question  1:40 left"


def test_without_a_total_nothing_is_left(clock: Clock) -> None:
    line = Line("check", None, "row", clock=clock)
    clock.now += 1
    line.advance(30)
    assert line.told() == "30 rows  30 row/s"


def test_times_are_told_as_a_clock_does() -> None:
    assert [clock_time(seconds) for seconds in (0, 9.6, 65, 3600, 86_461)] == [
        "0:00",
        "0:10",
        "1:05",
        "1:00:00",
        "24:01:01",
    ]


def test_a_stage_shows_its_metrics_and_who_else_is_told_decides() -> None:
    with step_progress(10, "sft", {"loss": "loss", "gate/one": "one"}, then=lambda m: m["step"] == 1) as on_step:
        assert on_step is not None
        assert not on_step({"step": 0, "loss": 2.0, "gate/one": 0.5, "batch/tokens": 9.0})
        assert on_step({"step": 1, "loss": 1.0})
    with step_progress(10, None, {}) as on_step:
        assert on_step is None


def test_in_a_pipe_there_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "build") as line:
        line.advance()
    assert not line.is_shown and capsys.readouterr() == ("", "")


def on_terminal(*, pipes_stdout: bool, **environment: str) -> tuple[str, str]:
    """What a terminal shows of the code, and what its stdout's pipe got."""
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | environment
    out = subprocess.PIPE if pipes_stdout else theirs
    with subprocess.Popen([sys.executable, "-c", CODE], env=env, stdout=out, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = io.BytesIO()
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # its last writer has gone
                break
            if not piece:
                break
            shown.write(piece)
        piped = process.stdout.read().decode() if process.stdout is not None else ""
    os.close(ours)
    assert process.returncode == 0
    return shown.getvalue().decode(), piped


def test_on_a_terminal_it_stands_below_what_is_printed() -> None:
    shown, _ = on_terminal(pipes_stdout=False)
    assert "3/3" in shown and "tok/s" in shown and "kept 2" in shown and "\x1b[3" in shown
    assert [line for line in shown.split("\r\n") if line.endswith("end")]
    assert all(f"row {number}" in shown for number in range(3))


def test_what_is_piped_is_only_what_was_printed() -> None:
    shown, piped = on_terminal(pipes_stdout=True)
    assert piped == "row 0\nrow 1\nrow 2\nend\n" and "3/3" in shown and "row" not in shown.replace("row 0", "", 0)


def test_terminals_that_cannot_or_should_not() -> None:
    shown, _ = on_terminal(pipes_stdout=False, TERM="dumb")
    assert shown.replace("\r", "") == "row 0\nrow 1\nrow 2\nend\n"
    shown, _ = on_terminal(pipes_stdout=False, NO_COLOR="1")
    assert "3/3" in shown and "\x1b[3" not in shown and "\x1b[9" not in shown
