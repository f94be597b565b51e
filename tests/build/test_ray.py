"""A build on two Ray workers of one machine: the same rows, also after its driver and a worker were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.build.endpoint import Endpoint, raw_rows
from tests.build.test_build import NO_PLUGIN, ROOT, arguments, built, ends
from tests.progress_line import watched
from thyme.build.store import journaled
from thyme.cli import main
from thyme.verbs import data_build

pytestmark = pytest.mark.soak
pytest.importorskip("ray")

PLAIN = ("--build.triage", "false")
RAY = (*PLAIN, "--build.ray-workers", "2", "--build.ray-batch", "3")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def launched(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    environment = NO_PLUGIN | {"PYTHONPATH": str(ROOT), "RAY_ENABLE_UINT_STATS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", "thyme", *arguments], env=environment, stdout=file, stderr=file)


def waits_for(condition: object, process: subprocess.Popen[bytes], log: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def written(name: str) -> int:
    return sum(1 for _ in journaled(Path(f"runs/{name}")))


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Ray's actor processes below a driver."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ") if folder.name.isdigit() else b""
            parents = _ancestors(int(folder.name)) if b"ray::" in line and b"Worker" in line else []
        except OSError:
            continue
        if process.pid in parents:
            found.append(int(folder.name))
    return found


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def test_two_workers_build_what_one_process_builds_also_when_they_are_killed() -> None:
    raw = raw_rows(Path("raw"), 40, text=4).resolve()
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, "--name", "whole", *PLAIN))
        answer = endpoint.reply
        endpoint.reply = lambda asked, number: (time.sleep(0.3), answer(asked, number))[1]  # time to be killed in
        command, log = arguments(raw, endpoint, "--name", "ray", *RAY), Path("log")

        driver = launched(command, log)
        waits_for(lambda: Path("runs/ray/journal").is_dir() and written("ray") >= 4, driver, log)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before = written("ray")
        assert 4 <= before < 44

        driver = launched(command, log)
        waits_for(lambda: written("ray") > before and len(workers_of(driver)) == 2, driver, log)
        os.kill(workers_of(driver)[0], signal.SIGKILL)
        assert driver.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert ends("ray") == {"kept": 44} and built("ray") == built("whole")
    assert "44 rows in" in log.read_text() or json.loads(Path("runs/ray/funnel.json").read_text())["kept"]


def test_what_workers_have_done_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_rows(Path("raw"), 5).resolve()
    shown = watched(monkeypatch, data_build)
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, *RAY, "--build.shares.no-code", "0"))
    assert shown == [f"build {done}/5  kept {done}" for done in range(1, 6)]


def test_a_worker_says_what_is_wrong_with_the_recipe() -> None:
    raw = raw_rows(Path("raw"), 3).resolve()
    with Endpoint() as endpoint:
        Path("evidence.py").write_text("def check(case):\n    raise KeyError('gone')\n")
        command = arguments(raw, endpoint, *RAY, "--build.evidence", "evidence.py:check", "--build.shares.no-code", "0")
        driver = launched(command, Path("log"))
        assert driver.wait(timeout=400) == 2
    assert "the check raised KeyError" in Path("log").read_text()
