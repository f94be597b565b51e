"""Signals, sent to real processes: what they raise, what is said and which code the process ends with."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from thyme.interrupt import Interrupted, Postponed, exit_code, goes_on_with, held, left_to_asyncio, raised

ROOT = Path(__file__).parents[1]
BEGIN = """
import asyncio, sys, time
from contextlib import contextmanager
from thyme import interrupt
from thyme.interrupt import Postponed, goes_on_with, left_to_asyncio, raised

def wait(name):
    print(name, flush=True)
    time.sleep(30)

def ended(what):
    try:
        with raised():
            what()
    except KeyboardInterrupt as error:
        print("ended", getattr(error, "__notes__", []), flush=True)
        sys.exit(interrupt.exit_code(error))
"""
CLOSED = """
def what():
    with goes_on_with("again"):
        try:
            wait("ready")
        finally:
            print("closed", flush=True)
ended(what)
"""
SLOW_TO_CLOSE = """
def what():
    try:
        wait("ready")
    finally:
        wait("closing")
ended(what)
"""
STEPS = """
def what():
    with Postponed("step") as stop:
        for step in range(3):
            print("step", step, flush=True)
            time.sleep(0.7)
            if stop.signum:
                print("saved", step, flush=True)
                raise interrupt.Interrupted(stop.signum)
ended(what)
"""
LONG_STEP = """
def what():
    with Postponed("step"):
        try:
            wait("ready")
            wait("ready")
        finally:
            wait("closing")
ended(what)
"""
ASYNCIO = """
async def item(number):
    try:
        print("item", number, flush=True)
        await asyncio.sleep(30)
    finally:
        print("closed", number, flush=True)
async def all():
    async with asyncio.TaskGroup() as group:
        for number in range(2):
            group.create_task(item(number))
def what():
    with goes_on_with("again"), left_to_asyncio():
        asyncio.run(all())
ended(what)
"""


class Child:
    """Python that runs `code`, and is sent signals once it has said something."""

    def __init__(self, code: str, *, ignores: bool = False) -> None:
        how = "SIG_IGN" if ignores else "default_int_handler"
        first = f"import signal; signal.signal(signal.SIGINT, signal.{how})\n"
        command, env = [sys.executable, "-c", first + BEGIN + code], os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def hears(self, line: str, signum: int) -> None:
        """Sends the signal when the child has said the line."""
        assert self._process.stdout is not None
        while (said := self._process.stdout.readline().strip()) != line:
            assert said, self._process.communicate()
        self._process.send_signal(signum)

    def end(self) -> tuple[int, list[str], str]:
        """Its code, what it said after that, and its stderr."""
        out, err = self._process.communicate(timeout=20)
        return self._process.returncode, out.splitlines(), err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_open_is_closed_and_the_code_says_which_signal(signum: int, code: int) -> None:
    child = Child(CLOSED)
    child.hears("ready", signum)
    assert child.end() == (code, ["closed", "ended ['again']"], "")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(second: int) -> None:
    child = Child(SLOW_TO_CLOSE)
    child.hears("ready", signal.SIGINT)
    child.hears("closing", second)
    assert child.end() == (-second, [], "")  # by the signal: a shell says 128 + its number


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_step_is_done_first(signum: int, code: int) -> None:
    child = Child(STEPS)
    child.hears("step 1", signum)
    said = "thyme: stopping after this step; once more stops at once\n"
    assert child.end() == (code, ["saved 1", "ended []"], said)


def test_a_second_signal_does_not_wait_for_the_step_and_a_third_for_nothing() -> None:
    child = Child(LONG_STEP)
    child.hears("ready", signal.SIGTERM)
    time.sleep(0.1)
    child._process.send_signal(signal.SIGINT)  # a parent's word of the same, so soon after it
    time.sleep(0.7)
    assert child._process.poll() is None and not select.select([child._process.stdout], [], [], 0)[0]
    child._process.send_signal(signal.SIGINT)
    child.hears("closing", signal.SIGINT)
    code, said, _ = child.end()
    assert (code, said) == (-signal.SIGINT, [])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asyncio_cancels_what_it_runs(signum: int, code: int) -> None:
    child = Child(ASYNCIO)
    child.hears("item 1", signum)
    assert child.end() == (code, ["closed 0", "closed 1", "ended ['again']"], "")


def test_what_a_process_was_started_to_ignore_it_ignores() -> None:
    """Behind nohup, or as a shell's background job."""
    child = Child(CLOSED, ignores=True)
    child.hears("ready", signal.SIGINT)
    time.sleep(0.3)
    child._process.send_signal(signal.SIGTERM)
    assert child.end() == (143, ["closed", "ended ['again']"], "")


@pytest.fixture
def handlers() -> Iterator[list[object]]:
    """Those of this process, which no test may leave changed."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_are_put_back(handlers: list[object]) -> None:
    with raised(), Postponed("step"):
        assert signal.getsignal(signal.SIGTERM) not in handlers
    with raised(), left_to_asyncio():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(Interrupted) as ended, raised():
        signal.raise_signal(signal.SIGTERM)
    assert exit_code(ended.value) == 143 and exit_code(KeyboardInterrupt()) == 130


def test_what_is_started_is_known_before_a_signal_is_heard(handlers: list[object]) -> None:
    started = ""
    with pytest.raises(Interrupted), raised():
        with held():
            signal.raise_signal(signal.SIGTERM)
            started = "a process"
        started = "and what follows"
    assert started == "a process"


def test_only_an_interruption_gets_the_note() -> None:
    with pytest.raises(ValueError) as failed, goes_on_with("again"):
        raise ValueError("no")
    assert not hasattr(failed.value, "__notes__")


@pytest.mark.parametrize("args", [("--help",), ("rl", "--help"), ("rl", "demo", "--dry-run"), ("nonsense",)])
def test_output_that_nobody_reads_is_no_error(args: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "thyme", *args], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    os.close(write)
    if args == ("nonsense",):
        assert done.returncode == 2 and "unknown verb" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
