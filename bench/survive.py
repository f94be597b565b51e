"""Runs pytest so that a test that hangs costs that test alone: a kernel that never ends cannot be interrupted in its
process, so the process is stopped, and the tests that are left are run in another.

    python bench/survive.py [--limit 60] [--total 300] [--json OUT.json] -- tests/kernels/test_gpu.py -m gpu -q

Of a benchmark the contender that hung is left out of its group, and the group is measured again; --json has the results
of all processes, as pytest-benchmark writes those of one. Exits with 1 when a test failed or hung, with 124 when the
total is up; one line says what hung. --shard 2/4 runs the second quarter of the tests: which those are depends on their
names alone.

As a plugin (`-p survive`) it notes what runs in the file that SURVIVE_NOTES names, and ends the process, with every
thread's stack, when one test takes longer than SURVIVE_LIMIT seconds.
"""

import argparse
import contextlib
import faulthandler
import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

STDERR = os.dup(2)
"""As it is before pytest captures it."""
GRACE_S = 15
"""Beyond the limit, before the process is killed from outside."""


# --- inside of pytest -------------------------------------------------------------------------------------------------


def note(kind: str, text: str) -> None:
    """Appends a line to the notes, if anybody reads them.

    Args:
        kind: "test" begins, "done" is its end; "contender" is at its turn, "result" a benchmark's figures, "machine"
            what it runs on.
        text: a node id, or JSON.
    """
    if name := os.environ.get("SURVIVE_NOTES"):
        with Path(name).open("a") as file:
            file.write(json.dumps([kind, text]) + "\n")


def left_out(title: str, contender: str) -> bool:
    """Whether a contender hung in this group before."""
    return [title, contender] in json.loads(os.environ.get("SURVIVE_LEFT_OUT", "[]"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, _, parts = os.environ.get("SURVIVE_SHARD", "1/1").partition("/")
    chosen = [zlib.crc32(item.nodeid.encode()) % int(parts) == int(part) - 1 for item in items]
    config.hook.pytest_deselected(items=list(itertools.compress(items, map(operator.not_, chosen))))
    items[:] = itertools.compress(items, chosen)


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    note("test", nodeid)
    if limit := os.environ.get("SURVIVE_LIMIT"):
        # A thread of C: it also ends a process that is inside of a call of the driver.
        faulthandler.dump_traceback_later(float(limit), exit=True, file=STDERR)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    faulthandler.cancel_dump_traceback_later()
    note("done", nodeid)


# --- outside of it ----------------------------------------------------------------------------------------------------


def hung(notes: list[list[str]]) -> tuple[str, list[str] | None] | None:
    """The test that began and did not end, and the [title, contender] that it was at, if it is a benchmark."""
    done = {text for kind, text in notes if kind == "done"}
    test: str | None = None
    contender: list[str] | None = None
    for kind, text in notes:
        if kind == "test":
            test, contender = text, None
        elif kind == "contender":
            contender = json.loads(text)
    return None if test is None or test in done else (test, contender)


def run(arguments: list[str], *, limit: float, total: float, output: Path | None, shard: str = "1/1") -> int:
    """Runs pytest until all its tests have ended, hung or run out of time; returns the status to exit with."""
    finished: list[str] = []
    out: list[list[str]] = []
    notes_of_all: list[list[str]] = []
    ends, status = time.monotonic() + total, 0
    for turn in range(1, 1_000):
        left = ends - time.monotonic()
        if left < 1:
            print(f"\nsurvive: the {total:g} s are up", flush=True)
            return 124
        with tempfile.TemporaryDirectory() as folder:
            notes = Path(folder) / "notes"
            environment = os.environ | {
                "SURVIVE_NOTES": str(notes),
                "SURVIVE_LIMIT": str(limit),
                "SURVIVE_SHARD": shard,
                "SURVIVE_LEFT_OUT": json.dumps(out),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-m", "pytest", "-p", "survive", *arguments]
            command += [f"--deselect={nodeid}" for nodeid in finished]
            code = _watched(command, environment, notes, limit=limit, total=left)
            found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        notes_of_all += found
        if output is not None:
            _write(output, notes_of_all)
        finished += [text for kind, text in found if kind == "done"]
        stuck = hung(found)
        if stuck is None:
            is_empty = code == 5 and (turn > 1 or shard != "1/1")
            return max(status, 0 if is_empty else int(code != 0))
        test, contender = stuck
        what = f"{contender[1]} of {contender[0]}" if contender else test
        print(f"\nsurvive: hung, stopped after {min(limit, left):.0f} s: {what}", flush=True)
        status = 1
        if contender:
            out.append(contender)
        else:
            finished.append(test)
    return status


def _write(output: Path, notes: list[list[str]]) -> None:
    """What has been measured so far, in the form of pytest-benchmark."""
    machines = [json.loads(text) for kind, text in notes if kind == "machine"]
    if machines:
        results = [json.loads(text) for kind, text in notes if kind == "result"]
        output.write_text(json.dumps(machines[-1] | {"benchmarks": results}, indent=1) + "\n")


def _watched(command: list[str], environment: dict[str, str], notes: Path, *, limit: float, total: float) -> int:
    """Waits for a process; kills it, and what it started, where its own limit does not end it."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    started = last = time.monotonic()
    size = 0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.2)
            now = time.monotonic()
            if notes.exists() and notes.stat().st_size != size:
                size, last = notes.stat().st_size, now
            # Until the first note it collects, which may take its time.
            if now - started > total or (size and now - last > limit + GRACE_S):
                return -9
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--limit", type=float, default=60, help="seconds of one test")
    parser.add_argument("--total", type=float, default=300, help="seconds of all")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="one of N parts of the tests")
    parser.add_argument("--json", type=Path, help="results of benchmarks")
    parser.add_argument("pytest", nargs="+", help="its arguments, after --")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    sys.exit(run(options.pytest, limit=options.limit, total=options.total, output=options.json, shard=options.shard))
