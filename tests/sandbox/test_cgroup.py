"""The bound on all processes together: idle sessions cannot hold more than it, and it leaves nothing behind.

A machine that gives no control groups must say so in the layer; there is nothing else to see there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox.host import check_crop, children_of, eventually
from thyme.sandbox import Layer, Sandbox, SandboxConfig, SandboxSession, Status, cgroup

ROOT = Path(__file__).parents[2]
SMALL = SandboxConfig(workers=1, memory_mib=128, scratch_mib=32, max_sessions=8, max_pixels=1 << 20, timeout_s=30.0)
HOLD = "x = np.ones({} << 20, 'u1'); print(x.nbytes >> 20)"


def layer_of(sandbox: Sandbox) -> Layer:
    return next(layer for layer in sandbox.layers() if layer.name == "cgroup")


def is_given(sandbox: Sandbox) -> bool:
    """Whether this machine has the layer; if not, it must say why and what that means."""
    layer = layer_of(sandbox)
    assert not layer.core
    assert layer.ok or "idle sessions" in layer.detail
    return layer.ok


def alive(session: SandboxSession) -> bool:
    return session._state.child is not None


def memory_of(sandbox: Sandbox) -> int:
    folder = sandbox._client.group._folders["memory"]
    first, second = folder / "memory.usage_in_bytes", folder / "memory.current"
    return int((first if first.exists() else second).read_text())


def test_idle_sessions_are_bounded_in_all(image) -> None:
    """Six sessions that keep 100 MiB each do not fit; the small ones and the server live on."""
    with Sandbox(SMALL) as sandbox:
        if not is_given(sandbox):
            return
        limit = sandbox._client.group.limit
        assert cgroup.budget_mib(SMALL) < limit >> 20 < 6 * 100
        small, large = [sandbox.session() for _ in range(2)], [sandbox.session() for _ in range(6)]
        for session in small:
            session.run("x = 'kept'")
        for session in large:
            result = session.run(HOLD.format(100))
            assert result.stdout == "100\n" or result.status is Status.MEMORY, result
            assert memory_of(sandbox) <= limit
        assert eventually(lambda: not all(alive(session) for session in large))
        assert [session.run("print(x)").stdout for session in small] == ["kept\n"] * 2
        ended = next(session for session in large if not alive(session))
        assert ended.run("print('x' in globals())").stdout == "False\n"
        assert sandbox._client.restarts == 0
        check_crop(sandbox, image)


def test_the_largest_is_ended_as_memory(image) -> None:
    """Others hold little each, but together; a snippet that grows beyond what is left is the one to go."""
    with Sandbox(SMALL) as sandbox:
        if not is_given(sandbox):
            return
        others = [sandbox.session() for _ in range(5)]
        for session in others:
            assert session.run(HOLD.format(64)).stdout == "64\n"
        with sandbox.session() as session:
            session.run(HOLD.format(45))
            result = session.run("y = np.ones(75 << 20, 'u1'); print(y.nbytes)")
            assert result.status is Status.MEMORY, result
            assert result.error is not None and "memory" in result.error.message
            assert session.run("print('x' in globals())").restarted
        assert [session.run("print(x.nbytes >> 20)").stdout for session in others] == ["64\n"] * 5
        assert sandbox._client.restarts == 0
        check_crop(sandbox, image)


def test_without_it_they_are_not() -> None:
    """What the layer is for: the same six sessions all live where it is off."""
    with Sandbox(SMALL, _off=frozenset({"cgroup"})) as sandbox:
        assert layer_of(sandbox) == Layer("cgroup", False, False, layer_of(sandbox).detail)
        assert "switched off" in layer_of(sandbox).detail
        large = [sandbox.session() for _ in range(6)]
        assert [session.run(HOLD.format(100)).stdout for session in large] == ["100\n"] * 6
        assert all(alive(session) for session in large)


def test_no_group_is_left() -> None:
    with Sandbox(SMALL) as sandbox:
        folders = list(sandbox._client.group._folders.values())
        sandbox.run("print(1)")
        assert all(folder.is_dir() for folder in folders)
        os.kill(sandbox._client.server.process.pid, 9)
        assert eventually(lambda: sandbox._client.restarts == 1)
        assert sandbox.run("print(1)").stdout == "1\n"
        if is_given(sandbox):
            processes = (folders[0] / "cgroup.procs").read_text().split()
            assert str(sandbox._client.server.process.pid) in processes  # the new one is in, too
    assert not any(folder.exists() for folder in folders)


def start_and_kill_a_client(off: str = "", *, server_too: bool = False) -> list[Path]:
    """The groups of a client that was killed in the middle of a snippet, once no process of it is left."""
    code = (
        "import threading, time\nfrom thyme.sandbox import Sandbox, SandboxConfig\n"
        f"s = Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=frozenset({off.split()}))\n"
        "threading.Thread(target=s.run, args=('while True: pass',), daemon=True).start()\n"
        "while not s._client.rounds.num_running: time.sleep(.01)\n"
        "print(*s._client.group.folders, s._client.server.process.pid, flush=True); time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with client:
        *names, server = client.stdout.readline().split()
        family = children_of(client.pid)
        if server_too:
            os.kill(int(server), 9)
        client.kill()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    return [Path(name) for name in names]


@pytest.mark.parametrize("off", ["", "namespaces"], ids=["full", "plain"])
def test_the_group_of_a_killed_client_goes_with_it(off: str) -> None:
    with Sandbox(SMALL) as sandbox:
        given = is_given(sandbox)
    folders = start_and_kill_a_client(off)
    assert bool(folders) == given and not any(folder.exists() for folder in folders)


def test_killed_together_with_its_fork_server_the_next_start_sweeps() -> None:
    folders = start_and_kill_a_client(server_too=True)

    def swept() -> bool:
        with Sandbox(SMALL):  # a group is swept once the last process in it is gone
            return not any(folder.exists() for folder in folders)

    assert eventually(swept)


def test_a_machine_without_control_groups(monkeypatch: pytest.MonkeyPatch, image) -> None:
    monkeypatch.setattr(cgroup, "_homes", dict)
    with Sandbox(SMALL) as sandbox:
        assert not layer_of(sandbox).ok
        assert "no hierarchy of control groups has 'memory'" in layer_of(sandbox).detail
        check_crop(sandbox, image)


def test_version_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files of version 2, on a folder that stands for its hierarchy."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    monkeypatch.setattr(cgroup, "_homes", lambda: {"memory": tmp_path, "pids": tmp_path})
    group = cgroup.Group(SMALL)
    (folder,) = set(group._folders.values())
    group.add(123)
    (folder / "memory.current").write_text(str(50 << 20))
    group.bound()
    wrote = {p.name: p.read_text() for p in (*folder.iterdir(), tmp_path / "cgroup.subtree_control")}
    assert wrote == {
        "cgroup.subtree_control": "+pids",
        "cgroup.procs": "123",
        "pids.max": str(SMALL.max_sessions + 18),
        "memory.current": str(50 << 20),
        "memory.max": str(50 + cgroup.budget_mib(SMALL) << 20),
        "memory.swap.max": "0",
    }
    assert group.layer().ok
    for file in folder.iterdir():  # in the kernel's file system they go with the folder
        file.unlink()
    group.remove()
    assert not folder.exists()


def test_a_controller_that_may_not_be_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A group of version 2 that has processes may not: the layer says so and nothing is left."""
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    (tmp_path / "cgroup.subtree_control").mkdir()  # cannot be written
    monkeypatch.setattr(cgroup, "_homes", lambda: {"memory": tmp_path, "pids": tmp_path})
    group = cgroup.Group(SMALL)
    assert not group.layer().ok and "cgroup.subtree_control" in group.layer().detail
    group.add(123)
    group.bound()
    group.remove()
    assert {p.name for p in tmp_path.iterdir()} == {"cgroup.controllers", "cgroup.subtree_control"}
