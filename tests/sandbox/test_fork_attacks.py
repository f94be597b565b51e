"""What a snippet may do to get something out of a fork: copies are jailed like all others, and it can spoil its own; to
the machine, and to whoever else runs, it does nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sandbox.attacks import ATTACKS
from tests.sandbox.host import PYTHON_BELOW_TMP, Host, check_crop, eventually, facts, named, snippets_of
from tests.sandbox.test_modes import BY_NAME, SMOKE
from thyme.sandbox import Sandbox, SandboxConfig, SandboxSession, Status, forking
from thyme.sandbox.child_handle import pid_of

_PLAN = """
import sys, ctypes
frame = sys._getframe()
while 'plan' not in frame.f_locals:
    frame = frame.f_back
plan = frame.f_locals['plan']
"""
_FORBIDDEN = """
import os, socket, ctypes
got = []
libc = ctypes.CDLL(None)
for name, attempt in dict(
        fork=lambda: 1 // (1 + libc.fork()), socket=lambda: socket.socket(socket.AF_INET),
        mount=lambda: 1 // (1 + libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None))).items():
    try:
        attempt()
        got.append(name)
    except (OSError, ZeroDivisionError):
        pass
print('ESCAPED' if got else 'refused', got)
"""
_LOOP = "import thyme.sandbox.checkpoint as c, os, time, json\n"

# Run in a session that is then forked; {} where nothing of it may show in what the copy and the original do.
TRICKS = {
    "patches os.fork": "import os\nos.fork = lambda: 0\nos.getpid = lambda: 1",
    "clears modules": "import sys\nsys.modules.clear()",
    "breaks builtins": "import builtins\nfor n in ('len', 'sorted', 'str', 'isinstance'): setattr(builtins, n, None)",
    "tracer, collector and audit hook that raise": "import sys, gc\ngc.callbacks.append(lambda *a: 1 / 0)\n"
    "sys.addaudithook(lambda *a: 1 / 0)",
    "a filter of its own in place of ours": _PLAN
    + "allow = bytes.fromhex('060000000000ff7f')\ncode = plan.seccomp._code\n"
    "ctypes.memmove(code, allow * (len(code) // 8), len(code) // 8 * 8)",
    "scribbles over where copies are made": "import ctypes\nfrom thyme import _fork\nstart, size = _fork.SERVICE\n"
    "ctypes.memset(start, 0xff, size)",
    "takes away where copies are made": "import ctypes\nfrom thyme import _fork\nstart, size = _fork.SERVICE\n"
    "ctypes.CDLL(None).munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))",
    "thousands of mappings": "import mmap\n"
    "keep = [mmap.mmap(-1, 4096, flags=34, prot=1 + 2 * (i % 2)) for i in range(9000)]",
    "thousands of holes": "import ctypes\nl = ctypes.CDLL(None)\nl.mmap.restype = ctypes.c_void_p\n"
    "at = l.mmap(None, ctypes.c_size_t(4096 * 9000), 3, 34, -1, 0)\n"
    "for i in range(0, 9000, 2): l.munmap(ctypes.c_void_p(at + 4096 * i), ctypes.c_size_t(4096))",
    "holds locks": "import threading, _imp\nlock = threading.Lock(); lock.acquire(); _imp.acquire_lock()",
    "handlers of every signal": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *a: 1 / 0)\n"
    "    except (OSError, ValueError): pass",
    "never answers": _LOOP + "c.fork = lambda i: time.sleep(1000)",
    "leaves when asked": _LOOP + "c.fork = lambda i: os._exit(0)",
    "answers nonsense": _LOOP + "c.fork = lambda i: os.write(3, b'[' * 9000) or True",
    "declines with a lie": _LOOP + "c.fork = lambda i: os.write(3, json.dumps(dict(held='x' * 5000)).encode()) or True",
    "answers over and over": _LOOP + "c._hold = lambda s, r: [os.write(3, r) for _ in range(50)] and False",
    "claims to hold still and does not": _LOOP + "c._hold = lambda s, r: os.write(3, r) and False",
    "claims to be the copy": _LOOP + "c._hold = lambda s, r: True",
    "copies that never wake": _LOOP + "def endless(*a):\n    while True: pass\nc._settle = endless",
    "copies that leave": _LOOP + "c._settle = lambda *a: os._exit(0)",
    "copies that send nonsense": _LOOP + "c._settle = lambda *a: os.write(3, b'x' * 20000)",
    "copies that send over and over": _LOOP + "c._settle = lambda *a: [os.write(3, c.READY) for _ in range(50)]",
    "fills its memory": "import numpy as np\nkeep = np.ones(100 << 20, 'u1')",
    "fills its scratch": "for i in range(6): open(f'{i}', 'wb').write(b'x' * (20 << 20))",
    "locked folders": "import os\nos.mkdir('d', 0)",
}


@pytest.fixture(scope="module")
def own() -> Iterator[Sandbox]:
    config = SandboxConfig(workers=4, timeout_s=2.0, memory_mib=256, max_sessions=12, scratch_mib=192)
    with Sandbox(config) as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_HOLD_S", 1.0)


def ids_of(sandbox: Sandbox) -> set[int]:
    server = sandbox._client.server.process.pid
    return snippets_of(server)


def process_of(session: SandboxSession) -> int:
    child = session._state.child
    assert child is not None and child.pidfd is not None
    return pid_of(child.pidfd)


@pytest.mark.parametrize("trick", TRICKS)
def test_nothing_comes_of(trick: str, own: Sandbox, image) -> None:
    before = ids_of(own)
    with own.session(image) as parent, own.session(image) as neighbour:
        assert neighbour.run("x = 'mine'").status is Status.OK
        parent.run("x = 1")
        parent.run(TRICKS[trick])
        ordered = own._client.rounds._num_ordered
        copies = parent.fork(2)
        assert len(copies) == 2 and own._client.rounds._num_ordered <= ordered + 2
        for session in (*copies, parent):
            result = session.run(_FORBIDDEN)
            assert "ESCAPED" not in result.stdout, (trick, session.fork_detail, result)
            session.close()
        assert neighbour.run("print(x)").stdout == "mine\n"
    check_crop(own, image)
    assert own._client.restarts == 0 and own._client.rounds.num_running == 0
    assert eventually(lambda: len(ids_of(own)) <= len(before))


def test_what_a_filter_of_ones_own_would_get(image) -> None:
    """The trick is one: without the filter that the copy puts on, what is refused above is not."""
    config = SandboxConfig(workers=1, memory_mib=256)
    with Sandbox(config, _off=frozenset({"seccomp"})) as sandbox, sandbox.session(image) as parent:
        parent.run("x = 1")
        (copy,) = parent.fork()
        assert not copy.fork_detail
        assert "ESCAPED" in copy.run(_FORBIDDEN).stdout


def test_a_copy_is_jailed_like_any_other(own: Sandbox) -> None:
    with own.session() as parent:
        pid = int(parent.run("import os\nprint(os.getpid())").stdout)
        (copy,) = parent.fork()
        with copy:
            if copy.fork_detail:
                pytest.skip(f"no live forks here: {copy.fork_detail}")
            assert int(copy.run("print(os.getpid())").stdout) != pid
            both = process_of(parent), process_of(copy)
            old, new = map(facts, both)
            for name in ("Seccomp", "NoNewPrivs", "CapPrm", "CapEff", "CapInh", "CapAmb", "Seccomp_filters"):
                assert new[name] == old[name], name
            assert new["Seccomp"] == "2" and new["NoNewPrivs"] == "1" and int(new["CapEff"], 16) == 0
            if any(layer.name == "own user id" and layer.ok for layer in own.layers()):
                assert new["Uid"] != old["Uid"]
            assert len({Path(f"/proc/{p}/ns/mnt").readlink() for p in both}) == 2


def assault(sandbox: Sandbox, name: str, host: Host, image) -> None:
    attack, before = BY_NAME[name], host.facts()
    with sandbox.session(image, "/data/photo.jpg") as parent:
        parent.run("kept = 1")
        (copy,) = parent.fork()
        with copy:
            result = copy.run(host.fill(attack.code))
        assert "ESCAPED" not in result.stdout and "a secret" not in result.stdout, result
        assert result.status.name in attack.expected_under(result.isolation), result
        assert parent.run("print(kept)").stdout == "1\n"
    assert host.facts() == before and not host.was_called()


@pytest.mark.parametrize("name", SMOKE)
def test_attacks_from_a_copy(name: str, sandbox: Sandbox, hasty: Sandbox, host: Host, image) -> None:
    assault(hasty if BY_NAME[name].hangs else sandbox, name, host, image)


@pytest.mark.soak
@pytest.mark.parametrize("name", BY_NAME)
def test_every_attack_from_a_copy(name: str, sandbox: Sandbox, hasty: Sandbox, host: Host, image) -> None:
    assault(hasty if BY_NAME[name].hangs else sandbox, name, host, image)
    assert len(ATTACKS) == len(BY_NAME)


def contents(session: SandboxSession) -> str:
    return session.run(
        f"import os\nprint([(p, open(p).read()) for t in ('/mnt/data', '/tmp') for d, _, fs in sorted(os.walk(t)) "
        f"for p in sorted(os.path.join(d, f) for f in fs) if not d.startswith({PYTHON_BELOW_TMP})])"
    ).stdout


def test_files_of_one_do_not_show_in_the_other(own: Sandbox) -> None:
    """By path, and by a descriptor that both have open."""
    with own.session() as parent:
        parent.run("f = open('/mnt/data/f', 'w'); f.write('both'); f.flush(); open('/tmp/g', 'w').write('both')")
        (copy,) = parent.fork()
        with copy:
            assert not copy.fork_detail or "live" in copy.fork_detail
            parent.run(
                "f.write(' parent'); f.flush(); open('/tmp/p', 'w').write('p'); open('/tmp/g', 'w').write('mine')"
            )
            copy.run("f.seek(0); f.write('COPY'); f.flush(); os.remove('/tmp/g'); open('/mnt/data/c', 'w').write('c')")
            assert contents(parent) == "[('/mnt/data/f', 'both parent'), ('/tmp/g', 'mine'), ('/tmp/p', 'p')]\n"
            assert contents(copy) == "[('/mnt/data/c', 'c'), ('/mnt/data/f', 'COPY')]\n"


def test_a_copy_has_no_descriptor_more(own: Sandbox) -> None:
    code = BY_NAME["protocol: inherited descriptors"].code
    with own.session() as parent:
        parent.run("x = 1")
        for session in (*parent.fork(2), parent):
            assert session.run(code).stdout == "none\n"
            session.close()


def test_forks_are_sessions_of_which_there_are_so_many(own: Sandbox, image) -> None:
    with own.session(image) as parent:
        parent.run("x = 7")
        assert [copy.fork_detail for copy in parent.fork(12)] == ["no room for 12 more of max_sessions=12"] * 12
        copies = [copy for _ in range(11) for copy in parent.fork()]
        (late,) = parent.fork()
        assert not any(copy.fork_detail for copy in copies) and "no room" in late.fork_detail
        copies.pop().close()
        assert late.run("print(x)").stdout == "7\n", "its code ran again"
        late.close()
        for copy in copies:
            assert copy.run("print(x)").stdout == "7\n"
            copy.close()
        assert parent.run("print(x)").stdout == "7\n"
    check_crop(own, image)


def test_who_may_not_be_forked(own: Sandbox) -> None:
    session = own.session()
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        session.fork(0)

    async def while_it_runs() -> None:
        running = asyncio.create_task(session.arun("import time\ntime.sleep(.3)\nx = 5"))
        await asyncio.sleep(0.05)
        with pytest.raises(ValueError, match="the session is busy"):
            await session.afork()
        await running
        (copy,) = await session.afork()
        assert (await copy.arun("print(x)")).stdout == "5\n"
        copy.close()

    asyncio.run(while_it_runs())
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.fork()


def test_of_a_session_whose_process_was_lost(own: Sandbox) -> None:
    """Idle for too long: its code runs again. Killed for its time: there is nothing to go on from."""
    with own.session() as parent:
        parent.run("x = 5")
        os.kill(process_of(parent), 9)
        assert eventually(lambda: parent._state.child is None)
        (copy,) = parent.fork()
        assert copy.fork_detail == "its process has ended" and copy.run("print(x)").stdout == "5\n"
        copy.close()
    with own.session() as parent:
        parent.run("x = 5")
        assert parent.run("while True: pass").status is Status.TIMEOUT
        (copy,) = parent.fork()
        result = copy.run("print('x' in globals())")
        assert result.stdout == "False\n" and result.restarted
        copy.close()


def test_code_that_gives_something_else_is_told(own: Sandbox) -> None:
    with own.session() as parent:
        parent.run("import time\nprint(time.time_ns())\nimport mmap\nm = mmap.mmap(-1, 4096)")
        (copy,) = parent.fork()
        assert copy.fork_detail.endswith("it has mapped a file or shared memory")
        result = copy.run("print(1)")
        assert result.status is Status.REFUSED and result.error is not None and result.error.type == "Diverged"


def test_copies_wait_for_a_process_that_takes_its_time() -> None:
    """They are ordered before it holds still, and their limit counts from there."""
    with Sandbox(SandboxConfig(workers=2, memory_mib=256, timeout_s=0.4)) as sandbox, sandbox.session() as parent:
        parent.run("x = 1")
        before, pid = len(ids_of(sandbox)), process_of(parent)
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            forking_ = pool.submit(parent.fork, 2)
            assert eventually(lambda: len(ids_of(sandbox)) == before + 2)
            time.sleep(0.8)
            os.kill(pid, signal.SIGCONT)
            copies = forking_.result()
        for copy in copies:
            assert not copy.fork_detail and copy.run("print(x)").stdout == "1\n"
            assert copy.run("while True: pass").status is Status.TIMEOUT
            copy.close()


def test_copies_of_a_process_that_does_not_hold_still_are_gone(own: Sandbox) -> None:
    before = len(ids_of(own))
    with own.session() as parent:
        parent.run("import os\nf = open('a', 'w')\nos.remove('a')")
        for copy in parent.fork(3):
            assert copy.fork_detail == "a file is open whose path is not known"
            copy.close()
        assert eventually(lambda: len(ids_of(own)) == before + 1)
        assert parent.run("print(f.closed)").stdout == "False\n"
        pid = process_of(parent)
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            forking_ = pool.submit(parent.fork, 3)
            assert eventually(lambda: len(ids_of(own)) == before + 4)
            os.kill(pid, signal.SIGKILL)
            assert all(copy.fork_detail for copy in forking_.result())
    assert eventually(lambda: len(ids_of(own)) <= before)


def test_a_cancelled_fork_leaves_nothing(own: Sandbox, image) -> None:
    before = len(ids_of(own))

    async def program() -> None:
        with own.session(image) as parent:
            await parent.arun("x = 1")
            for pause in (0, 0.001, 0.003, 0.01):
                forking_ = asyncio.create_task(parent.afork(2))
                await asyncio.sleep(pause)
                forking_.cancel()
                done = (await asyncio.gather(forking_, return_exceptions=True))[0]
                for copy in done if isinstance(done, list) else ():
                    copy.close()
            while parent._state.round is not None:
                await asyncio.sleep(0.01)
            assert (await parent.arun("print(x)")).stdout == "1\n"

    asyncio.run(program())
    assert eventually(lambda: len(ids_of(own)) <= before)


def test_the_fork_server_killed_meanwhile(image) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox, sandbox.session(image) as parent:
        parent.run("x = 1")
        os.kill(min(named(sandbox._client.server.process.pid, "thyme-template")), 9)
        copies = parent.fork(2)
        for copy in copies:
            assert copy.run("print('x' in globals())").status is Status.OK
            copy.close()
        check_crop(sandbox, image)


def test_where_there_are_no_live_forks_the_code_runs_again(monkeypatch: pytest.MonkeyPatch, image) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256, max_sessions=4)) as sandbox, sandbox.session(image) as parent:
        parent.run("x = 3")
        client = sandbox._client
        monkeypatch.setattr(client.server, "layers", tuple(x for x in client.layers if x.name != "live fork"))
        (copy,) = parent.fork()
        assert copy.fork_detail == "no live forks on this machine"
        assert copy.run("print(x)").stdout == "3\n"
        copy.close()
