"""Nobody waits for ever: for a phase beyond its deadline, or for a rank that is gone."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.ranks import free_port, start
from thyme.train.config import DistributedConfig
from thyme.train.watchdog import EXIT_CODE, Watchdog

PATIENCE_S = 120
RANKS = "tests.train.watchdog_ranks"


def run(code: str) -> subprocess.CompletedProcess[str]:
    lines = "import os, threading, time\nfrom thyme.train.watchdog import Watchdog\n" + code
    root = Path(__file__).parent.parent.parent
    return subprocess.run([sys.executable, "-c", lines], cwd=root, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_phase_over_its_deadline_ends_the_process_with_every_stack() -> None:
    done = run(
        "def other_thread(): threading.Event().wait()\n"
        "threading.Thread(target=other_thread, daemon=True).start()\n"
        "def sampling(): threading.Event().wait()\n"
        "with Watchdog({'rollout': 0.2}) as watchdog:\n"
        "    with watchdog.phase('rollout'): sampling()\n"
    )
    assert done.returncode == EXIT_CODE
    line = done.stderr.splitlines()[-1]
    assert line.startswith("thyme: phase rollout: over its deadline of 0.2 s (distributed.rollout_deadline_s)")
    assert "in sampling" in done.stderr and "in other_thread" in done.stderr


def test_the_outer_phase_s_deadline_counts_in_an_inner_one() -> None:
    done = run(
        "with Watchdog({'update': 0.2, 'save': 60}) as watchdog:\n"
        "    with watchdog.phase('update'), watchdog.phase('save'): threading.Event().wait()\n"
    )
    assert done.returncode == EXIT_CODE
    assert "phase save: over its deadline of 0.2 s (distributed.update_deadline_s)" in done.stderr


def test_what_ends_in_time_or_has_no_deadline_is_left_alone() -> None:
    done = run(
        "with Watchdog({'update': 0.3, 'save': 60}) as watchdog:\n"
        "    for _ in range(3):\n"
        "        with watchdog.phase('update'): pass\n"
        "    with watchdog.phase('rollout'): time.sleep(0.4)\n"
        "    with watchdog.phase('save'): time.sleep(0.1)\n"
        "print('done')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_error_keeps_its_own_words() -> None:
    with pytest.raises(RuntimeError, match="mine"), Watchdog({"update": 60.0}) as watchdog, watchdog.phase("update"):
        raise RuntimeError("mine")


def test_deadlines_come_from_the_config_and_0_is_none() -> None:
    config = DistributedConfig(rollout_deadline_s=0, update_deadline_s=5)
    assert config.deadlines() == {"reward": 3600.0, "update": 5.0, "save": 3600.0}
    with pytest.raises(ValueError, match=r"DistributedConfig\.save_deadline_s: -1 must be at least 0"):
        DistributedConfig(save_deadline_s=-1)


def test_a_killed_rank_is_named_by_the_others_which_end() -> None:
    """`kill -9` inside a step; no launcher is there to clear up."""
    port = free_port()
    ranks = [start(rank, 2, port, "-m", RANKS, "600") for rank in range(2)]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "second step\n"
        ranks[1].send_signal(signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=PATIENCE_S)
        assert ranks[0].returncode == EXIT_CODE, said
        named = f"thyme: rank 0, phase update: rank 1 (process {ranks[1].pid}) has ended: this rank cannot go on"
        assert named in said.splitlines(), said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.soak
def test_a_stuck_rank_says_where_and_the_run_ends() -> None:
    port = free_port()
    ranks = [start(rank, 2, port, "-m", RANKS, "5") for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [EXIT_CODE, EXIT_CODE]
        over = "phase update: over its deadline of 5 s (distributed.update_deadline_s)"
        assert any(over in said for said in errors)
        assert "in stuck_for_good" in errors[1] or "rank 0 " in errors[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
