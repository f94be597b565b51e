"""The child that is parked, forked ahead of the order it will get: it is jailed like one forked for its order, looks
the same from inside, serves once, and nothing depends on its being there. And what is loaded before any is forked."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.sandbox.host import check_crop, children_of, eventually, facts, picture, snippets_of
from thyme.sandbox import Sandbox, SandboxConfig, Status, child
from thyme.sandbox.birth import take_order
from thyme.sandbox.errand import Errand
from thyme.sandbox.fork_loop import _errand
from thyme.sandbox.interpreter import Job
from thyme.sandbox.jail import SeccompFilter
from thyme.sandbox.protocol import Order
from thyme.sandbox.root import Image


def started_by(sandbox: Sandbox) -> int:
    return sandbox._client.server.process.pid


def parked(sandbox: Sandbox) -> list[int]:
    """Ids of children that have got ready and sleep."""
    waiting = [facts(pid) for pid in children_of(started_by(sandbox))]
    return [int(f["Pid"]) for f in waiting if f.get("Name") == "thyme-parked" and f["State"].startswith("S")]


def the_parked(sandbox: Sandbox) -> int:
    assert eventually(lambda: len(parked(sandbox)) == 1)
    return parked(sandbox)[0]


@pytest.fixture(scope="module")
def own() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def unparked() -> Iterator[Sandbox]:
    """Every child is forked for its order."""
    with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=frozenset({"parking"})) as sandbox:
        yield sandbox


def test_the_parked_child_serves_the_next_session_and_no_other(own: Sandbox) -> None:
    first = the_parked(own)
    with own.session() as session:
        inside = session.run("import os; x = 1; print(os.getpid())").stdout
        assert first in snippets_of(started_by(own))
        assert session.run("print(os.getpid(), x)").stdout == f"{inside.strip()} 1\n"
        second = the_parked(own)
        assert second != first
        assert own.run("import os; print('x' in globals(), os.getpid())").stdout != f"False {inside}"
    assert eventually(lambda: not Path(f"/proc/{first}").exists())


def test_it_waits_in_half_a_jail(own: Sandbox) -> None:
    """Whatever needs no order is put on before: no privilege is left, and no way to get one."""
    status = facts(the_parked(own))
    assert status["NoNewPrivs"] == "1"
    assert all(int(status[name], 16) == 0 for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"))
    if any(layer.name == "own user id" and layer.ok for layer in own.layers()):
        assert all(int(uid) >= 1_900_000_000 for uid in status["Uid"].split())


def test_nothing_of_the_client_is_read_before_the_jail() -> None:
    """The order in which a child does things: what puts the jail on comes before what leads to code is in place, and
    that before the first line of Python. (That each of the calls does what it is for the attacks show.)"""
    plan = SimpleNamespace(abi=7, seccomp=SeccompFilter())
    assert take_order(plan).what == [  # type: ignore[arg-type]
        "name",
        "landlock_restrict_self",
        "seccomp",
        *["dup3"] * 4,
    ]


@pytest.mark.parametrize("scratch", [None, "/s"])
def test_an_order_is_a_job_in_the_childs_own_terms(scratch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(id="1", image_path="a.png", image_file="b.img", image_format="PNG", more_images=[("c", "d")], seed=3)
    images = [Image(file="b.img", path="/h/a.png", folder="/h"), Image(file="d", path="/h/c", folder="/h")]
    served: list[Job] = []
    monkeypatch.setattr(child, "serve", lambda job, _: served.append(job))
    monkeypatch.setattr(child.os.path, "isfile", lambda path: path == "/h/a.png")
    monkeypatch.setattr(child.os.path, "isdir", lambda path: path == "/h")
    plan, message = SimpleNamespace(images="/i"), _errand(order, images).encode()
    child.live((scratch or "").encode(), message, plan=plan, config=None)  # type: ignore[arg-type]
    if scratch is None:
        places, file, more = {"/mnt/data": "/mnt/data", "/tmp": "/tmp", "/h": "/h"}, "/h/a.png", {"c": "/h/c"}
    else:
        places, file, more = {"/mnt/data": "/s/data", "/tmp": "/s/tmp", "/h": "/s/input"}, "/i/b.img", {"c": "/i/d"}
    job = Job(places=places, image_path="a.png", image_file=file, image_format="PNG", seed=3, more_images=more)
    assert served == [job]
    assert _errand({**order, "image_file": None, "more_images": []}, []) == Errand(image_path="a.png", seed=3)


_EVERYTHING = """
import decimal, gc, linecache, os, random, re, resource, signal, stat, sys, tempfile, threading, warnings
import numpy as np
from PIL import Image
print(sorted(sys.modules), sorted(globals()), sys.argv, sys.path, sorted(sys.path_importer_cache))
print(random.random(), np.random.rand(), hash('x'), list({'a', 'b', 'c'}), random.getstate()[1][-1])
print(os.getcwd(), sorted(os.walk('/mnt/data')), tempfile.gettempdir(), os.umask(0o77), dict(os.environ))
print(warnings.filters, sorted(linecache.cache), np.geterr(), decimal.getcontext(), threading.active_count())
print(gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(), [signal.getsignal(n) for n in range(1, 32)])
print([resource.getrlimit(n) for n in range(16)], [m for m in sys.modules.values() if m and '_' == m.__name__])
fds = []
for fd in range(100):
    try: fds.append((fd, stat.S_IFMT(os.fstat(fd).st_mode)))
    except OSError: pass
print(fds, image_path, sys.stdin.read(), sys.stdout.encoding, sys.exc_info(), Image.open(image_path).size)
print(shown) if 'shown' in globals() else Image.new('RGB', (3, 3)).show()
print(sorted(os.listdir('.')), processed_path if 'processed_path' in globals() else None)
"""


@pytest.mark.parametrize("seed", [0, 7])
def test_from_inside_it_looks_like_one_forked_for_its_order(own: Sandbox, unparked: Sandbox, seed: int) -> None:
    image, ready = picture(30, 20), the_parked(own)
    with own.session(image, "photo.png", seed=seed) as session:
        early = session.run(_EVERYTHING)
        assert ready in snippets_of(started_by(own))
    on_demand = unparked.run(_EVERYTHING, image, "photo.png", seed=seed)
    assert early.status is Status.OK, early
    # The limit of the address space is relative to what the fork-server maps.
    assert early.stdout.splitlines()[:5] == on_demand.stdout.splitlines()[:5]
    assert early.stdout.splitlines()[6:] == on_demand.stdout.splitlines()[6:]
    assert [early.fixes, [i.size for i in early.images]] == [on_demand.fixes, [i.size for i in on_demand.images]]


def test_off_means_off(unparked: Sandbox) -> None:
    assert unparked.run("print(1)").stdout == "1\n"
    time.sleep(0.3)  # in which one would have been parked; a child that is ending may be seen for a moment
    assert eventually(lambda: not parked(unparked))


@pytest.mark.parametrize("mode", ["full", "plain"])
def test_without_it_the_next_snippet_is_served(mode: str, image) -> None:
    off = frozenset({"namespaces"}) if mode == "plain" else frozenset()
    with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=off) as sandbox:
        ready = the_parked(sandbox)
        os.kill(ready, signal.SIGKILL)
        assert eventually(lambda: not Path(f"/proc/{ready}").exists())  # noticed, buried
        assert not eventually(lambda: parked(sandbox), 0.2)  # what does not last is not made over and over
        check_crop(sandbox, image)
        assert the_parked(sandbox) != ready  # but again after an order
        assert sandbox._client.restarts == 0
        family = children_of(started_by(sandbox))
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


@pytest.mark.parametrize("off", [frozenset(), frozenset({"namespaces"})], ids=["full", "plain"])
def test_it_ends_with_the_fork_server(off: frozenset[str], image) -> None:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=off) as sandbox:
        ready, outer = the_parked(sandbox), started_by(sandbox)
        servers = [pid for pid in (outer, *snippets_of(outer)) if facts(pid).get("Name") == "thyme-zygote"]
        os.kill(max(servers), signal.SIGKILL)  # the one that serves: the other waits for it
        assert eventually(lambda: not Path(f"/proc/{ready}").exists())
        assert eventually(lambda: sandbox._client.restarts == 1)
        check_crop(sandbox, image)
        the_parked(sandbox)


def test_a_killed_fork_server_leaves_no_files_to_the_next() -> None:
    """Where scratch folders are on disk, nothing but the next fork-server can clear them."""
    with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=frozenset({"namespaces"})) as sandbox:
        with sandbox.session() as one, sandbox.session() as other:
            for session in (one, other):
                assert session.run("open('/mnt/data/left', 'w').close()").status is Status.OK
            the_parked(sandbox)
            os.kill(started_by(sandbox), signal.SIGKILL)
            assert eventually(lambda: sandbox._client.restarts == 1)
            with sandbox.session() as third:
                seen = [s.run("print(sorted(os.listdir('/mnt/data')), os.listdir('.'))") for s in (one, other, third)]
        assert [r.stdout for r in seen] == ["['temp_processed_images'] []\n"] * 3, seen
        assert [r.restarted for r in seen] == [True, True, False]


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_modules_fall_back_on_what_is_loaded(own: Sandbox) -> None:
    """Without OpenSSL and libuuid: the digests and identifiers are the same."""
    code = (
        "import hashlib, hmac, uuid, secrets, zlib, zipfile, asyncio, inspect, logging, urllib.parse, zoneinfo\n"
        "for name in sorted(hashlib.algorithms_guaranteed - {'shake_128', 'shake_256'}):\n"
        "    print(name, hashlib.new(name, b'thyme').hexdigest())\n"
        "print(hmac.new(b'key', b'thyme', 'sha256').hexdigest(), uuid.uuid5(uuid.NAMESPACE_DNS, 'thyme'))\n"
        "print(len({uuid.uuid1(), uuid.uuid4(), uuid.uuid4()}), len(secrets.token_hex()), zlib.crc32(b'thyme'))"
    )
    result = own.run(code)
    assert result.status is Status.OK, result
    *digests, keyed, counted = result.stdout.splitlines()
    guaranteed = sorted(hashlib.algorithms_guaranteed - {"shake_128", "shake_256"})
    assert digests == [f"{name} {hashlib.new(name, b'thyme').hexdigest()}" for name in guaranteed]
    assert keyed == (f"{hmac.new(b'key', b'thyme', 'sha256').hexdigest()} {uuid.uuid5(uuid.NAMESPACE_DNS, 'thyme')}")
    assert counted == f"3 64 {zlib.crc32(b'thyme')}"


def test_what_is_left_out_says_so(own: Sandbox) -> None:
    error = own.run("import sqlite3").error
    assert error is not None and error.type == "ModuleNotFoundError" and error.line == 1
    assert (
        error.message == "'_sqlite3' is not in the sandbox (available: numpy, PIL, cv2, most of the standard library)"
    )
    assert own.run("try:\n    import sqlite3\nexcept ImportError:\n    print('without')").stdout == "without\n"


def test_what_the_user_preloads_may_load_anything() -> None:
    with Sandbox(SandboxConfig(workers=1, memory_mib=256, preload=("sqlite3",))) as sandbox:
        code = "import sqlite3\nprint(sqlite3.connect(':memory:').execute('select 6 * 7').fetchone()[0])"
        assert sandbox.run(code).stdout == "42\n"
        assert sandbox.run("import ssl").status is Status.ERROR
