"""A test or contender that hangs costs itself alone: planted hangs on the CPU, run as bench/gpu.sh runs its stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import survive

ROOT = Path(__file__).resolve().parents[2]
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
"""The environment of a process that is no worker of xdist."""
HANGS = """
import time

def test_before():
    pass

def test_hangs():
    time.sleep(1000)

def test_after():
    pass
"""
PLUGIN = """
import time

def pytest_collection_finish(session):
    for item in session.items:
        item.module.RUNS["torch"] = lambda: lambda x: time.sleep(1000)
"""


def test_what_began_and_did_not_end_hung() -> None:
    began, ended, turn = ["test", "a"], ["done", "a"], ["contender", json.dumps(["t", "ours"])]
    assert survive.hung([]) is None
    assert survive.hung([began, ended]) is None
    assert survive.hung([began, ended, ["test", "b"]]) == ("b", None)
    assert survive.hung([began, turn]) == ("a", ["t", "ours"])
    assert survive.hung([began, turn, ended, ["test", "b"]]) == ("b", None)


def test_a_hanging_test_and_a_hanging_contender_cost_themselves_alone(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(HANGS)
    (tmp_path / "planted.py").write_text(PLUGIN)
    environment = ALONE | {
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "PACKAGES": str(tmp_path),
        "TEST_LIMIT": "8",
        "BENCH_BUDGET_S": "0.01",
    }
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path / "test_planted.py")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "test_planted: failed with status 1" in summary
    assert "hung, stopped after 8 s: " in summary and "::test_hangs" in summary
    log = (tmp_path / "out" / "test_planted.txt").read_text()
    assert "test_planted.py" in log and "in test_hangs" in log  # the stack of what hung
    assert "1 passed, 2 deselected" in log  # the one behind it, in a process of its own

    environment["PYTEST_ADDOPTS"] = "-p planted --shapes 8x64 -k 'not backward'"
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "bench-swiglu", "table"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "hung, stopped after 8 s: torch of swiglu: 8 x 64 float32" in done.stdout, done.stdout
    results = json.loads((tmp_path / "out" / "bench-swiglu.json").read_text())
    measured = {(row["group"], row["extra_info"]["contender"]) for row in results["benchmarks"]}
    assert ("swiglu: 8 x 64 float32", "ours") in measured
    assert "torch" not in {contender for _, contender in measured}
    assert results["machine_info"]["device"].startswith("CPU")
    assert "torch: hung before" in (tmp_path / "out" / "table.txt").read_text()


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "kernel"],
        cwd=ROOT, env=ALONE | {"OUT": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "kernel: there is no such stage" in done.stdout


def test_shards_are_disjoint_and_together_all(tmp_path: Path) -> None:
    (tmp_path / "test_many.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', range(40))\ndef test_one(x):\n    pass\n"
    )
    ran: list[str] = []
    for part in (1, 2, 3):
        command = [sys.executable, "bench/survive.py", "--shard", f"{part}/3", "--", str(tmp_path), "-v"]
        done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        ran += [line.split()[0] for line in done.stdout.splitlines() if "PASSED" in line]
    assert len(ran) == len(set(ran)) == 40
