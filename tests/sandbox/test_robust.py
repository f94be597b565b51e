"""A client whose surroundings fail: no descriptors, no disk, a fork-server killed or stopped while code runs."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.sandbox.host import check_crop, children_of, eventually, open_descriptors, server_of
from thyme.sandbox import Sandbox, SandboxConfig, SandboxUnavailable, Status

ROOT = Path(__file__).parents[2]
CONFIG = SandboxConfig(workers=2, memory_mib=256, timeout_s=1.0)
ANSWERED = (Status.OK, Status.REFUSED, Status.CRASHED)


@contextmanager
def no_descriptors(spare: int) -> Iterator[list[int]]:
    """All descriptors of this process are taken, but for `spare`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for _ in range(spare):
            os.close(taken.pop())
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_out_of_descriptors_at_every_step(image: Image.Image) -> None:
    """Refused or served, never stuck, and well again afterwards."""
    with Sandbox(CONFIG) as sandbox:
        check_crop(sandbox, image)
        before = open_descriptors()
        with no_descriptors(0) as taken:
            outcomes = []
            for _ in range(10):
                outcomes.append(sandbox.run("print(1)").status)
                os.close(taken.pop())
        assert outcomes[0] is Status.REFUSED
        assert set(outcomes) <= set(ANSWERED)
        check_crop(sandbox, image)
        assert eventually(lambda: open_descriptors() <= before)


def test_out_of_descriptors_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that cannot start says so and leaves nothing: no folder, no process, no descriptor."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Sandbox(CONFIG).close()  # whatever is imported is imported
    before, processes = open_descriptors(), children_of(os.getpid())
    for spare in range(6):
        try:
            with no_descriptors(spare):
                Sandbox(CONFIG).close()
        except (OSError, SandboxUnavailable) as error:
            assert "Too many open files" in str(error) or "did not start" in str(error)
        else:
            assert spare > 2
        assert open_descriptors() == before
        assert eventually(lambda: children_of(os.getpid()) <= processes)
        assert not list(tmp_path.iterdir())


def test_who_answers_can_be_killed(image: Image.Image) -> None:
    """Also where the answer is read first: a fork-server that is stopped may not be needed for it any more."""
    with Sandbox(CONFIG) as sandbox, sandbox.session(image) as session:
        with sandbox._client.lock:  # the reader waits, and this thread is the reader
            round_ = sandbox._client.submit(session._state, "print(1)")
            child = session._state.child
            assert child is not None
            assert select.select([child.socket], [], [], 5.0)[0]
            sandbox._client._on_child(session._state)
            assert session._state.round is None
            assert child.pidfd is not None
        assert round_.future.result(5.0).stdout == "1\n"


def test_a_stopped_server_is_not_needed_by_what_runs(image: Image.Image) -> None:
    with Sandbox(CONFIG) as sandbox, sandbox.session(image) as session, sandbox.session() as other:
        session.run("im = Image.open(image_path)")
        other.run("x = 1")
        server = server_of(sandbox)
        os.kill(server, signal.SIGSTOP)
        try:
            assert session.run("print(im.size)").stdout == "(120, 80)\n"
            assert other.run("while True: pass").status is Status.TIMEOUT  # killed through its pidfd
            assert session.run("print(im.size)").stdout == "(120, 80)\n"
        finally:
            os.kill(server, signal.SIGCONT)
        assert sandbox._client.restarts == 0
        check_crop(sandbox, image)


def test_a_server_stopped_while_code_runs(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs comes back; what comes next gets a new server."""
    monkeypatch.setattr("thyme.sandbox.round_queue._FORK_S", 0.5)
    with Sandbox(CONFIG) as sandbox, sandbox.session() as session:
        session.run("import time")
        threading.Timer(0.1, lambda: os.kill(server_of(sandbox), signal.SIGSTOP)).start()
        assert session.run("time.sleep(.4); print('slept')").stdout == "slept\n"
        check_crop(sandbox, image)
        assert sandbox._client.restarts == 1


FULL = """
import os, sys
from pathlib import Path
import tempfile
from thyme.sandbox import Sandbox, SandboxConfig, jail
from tests.sandbox.host import check_crop, picture
if os.geteuid():
    jail.enter_user_namespace()
jail.unshare(jail.CLONE_NEWNS)
jail.mount("none", "/", None, jail.MS_REC | jail.MS_PRIVATE)
tempfile.tempdir = tempfile.mkdtemp(dir="/var/tmp")
jail.mount("tmpfs", tempfile.tempdir, "tmpfs", 0, "size=4m,mode=755")
off = frozenset(sys.argv[1:])
with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=off) as sandbox:
    filler = Path(tempfile.tempdir, "filler")
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    print(sandbox.run("print(1)").status.name)
    try:
        sandbox.run("print(1)", picture(200, 200))
    except OSError as error:
        print(error.strerror)
    print(sorted(p.name for p in (sandbox._client.run_dir / "images").iterdir()))
    filler.unlink()
    check_crop(sandbox, picture(200, 200))
    print(sandbox._client.restarts)
print(os.listdir(tempfile.tempdir))
jail.unmount(tempfile.tempdir)
os.rmdir(tempfile.tempdir)
"""


@pytest.mark.parametrize("off", [(), ("namespaces",)], ids=["full", "plain"])
def test_full_temporary_folder(off: tuple[str, ...]) -> None:
    """An image that cannot be stored is an error of the caller's, half a file of it does not stay, and code without one
    runs (where scratch lies elsewhere) or is refused; with room again all is well."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, *off],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *rest = done.stdout.splitlines()
    assert Status[first] in (ANSWERED if off else (Status.OK,))
    assert rest == ["No space left on device", "[]", "0", "[]"]


@pytest.mark.soak
def test_a_server_killed_again_and_again(image: Image.Image) -> None:
    """Eight callers while the server dies every half second: everybody gets an answer, and right ones are right."""
    config = SandboxConfig(workers=4, memory_mib=256, timeout_s=20.0)
    with Sandbox(config) as sandbox, ThreadPoolExecutor(8) as callers:
        over = threading.Event()

        def kill() -> None:
            while not over.wait(0.5):
                try:
                    os.kill(server_of(sandbox), signal.SIGKILL)
                except (OSError, ValueError, AttributeError):  # it is being replaced
                    continue

        killer = threading.Thread(target=kill)
        killer.start()
        results = list(callers.map(lambda i: (i, sandbox.run(f"import time; time.sleep(.05); print({i})")), range(200)))
        over.set()
        killer.join()
        assert all(result.status in ANSWERED for _, result in results)
        assert all(result.stdout == f"{i}\n" for i, result in results if result.status is Status.OK)
        assert sandbox._client.restarts > 3
        assert sandbox._client.rounds.num_running == 0
        check_crop(sandbox, image)
