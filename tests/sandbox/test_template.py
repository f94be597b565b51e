"""The process that forks: it serves, its memory stays as it was, nothing of it is shared for writing, and it is missed
when it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.host import check_crop, eventually, facts, named
from thyme.sandbox import Sandbox, SandboxConfig, Status
from thyme.sandbox.needed_pages import _pieces


def run_alone(code: str) -> str:
    """Runs `code` in a process with one thread."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def template_of(sandbox: Sandbox) -> int:
    """The oldest process of that name: a child has it too until it has put its own on."""
    return min(named(sandbox._client.server.process.pid, "thyme-template"))


@pytest.fixture(scope="module", params=["full", "plain"])
def own(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    off = frozenset({"namespaces"}) if request.param == "plain" else frozenset()
    with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=off) as sandbox:
        yield sandbox


_TEMPLATE = """
import contextlib, os, signal, socket, struct
from thyme import _fork
from thyme.sandbox.call_list import CallList, Given, Parameter
from thyme.sandbox.template import Template
server = os.getpid()
def live(note, order):
    os.write(1, b"%s %s %s\\n" % (note, order, str(os.getppid() == server).encode()))
    if order == b"work":
        sum(range(3_000_000))
        os._exit(7)
    signal.pause()
def request(before, after, note=b"", num_descriptors=1):
    lists = before.encode(), after.encode()
    return struct.pack("=qiiiIII", 6, 3, num_descriptors, 0, *map(len, lists), 1 << 16) + b"".join(lists) + note
def moved():  # the channel to where it is looked for
    calls = CallList()
    calls.add("dup3", _fork.SYS_dup3, Given(0), 3, 0)
    calls.add("close", _fork.CLOSE_FROM, 4)
    return calls
def printing():  # to what came with the order; the parameter is 6
    calls = CallList()
    calls.add("dup3", _fork.SYS_dup3, Given(0), Parameter(), 0)
    calls.add("dup3", _fork.SYS_dup3, Parameter(), 1, 0)
    return calls
template = Template(live, leave=[], proc=os.open("/proc", os.O_PATH), memory_bytes=None)
read_end, write_end = os.pipe()
def forked(request):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        return ours, *template.fork(request, [theirs.fileno()])
"""


def test_it_forks_and_waits_for_its_children() -> None:
    """Note, order and descriptors reach the child; its status and CPU time come back, also of one that was killed."""
    code = (
        _TEMPLATE
        + """
for order in (b"work", b"wait"):
    channel, pid, pidfd = forked(request(moved(), printing(), b"a note"))
    socket.send_fds(channel, [order], [write_end])
    print(os.read(read_end, 100).decode().strip())
    if order == b"wait":
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    status, cpu_s = template.reap(pid)
    print(os.waitstatus_to_exitcode(status), 0.005 < cpu_s < 30 if order == b"work" else cpu_s < 1)
os.kill(template._pid, signal.SIGKILL)
try:
    template.fork(request(moved(), printing()), [write_end])
except RuntimeError as error:
    print(error)
template.stop()
"""
    )
    assert run_alone(code).splitlines() == [
        "a note work False",
        "7 True",
        "a note wait False",
        "-9 True",
        "the template process has ended",
    ]


def test_what_cannot_be_born_ends_before_any_python() -> None:
    """Without an order, with one that lacks descriptors, with a call that fails before it or after it."""
    code = (
        _TEMPLATE
        + """
def failing(calls):
    calls.add("chdir", _fork.SYS_chdir, b"/no/such/folder")
    return calls
def status(request, order=None):
    channel, pid, _ = forked(request)
    if order is not None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended by now
            socket.send_fds(channel, [b"work"], order)
    channel.close()
    return os.waitstatus_to_exitcode(template.reap(pid)[0])
print(status(request(moved(), printing())), end=" ")
print(status(request(moved(), printing(), num_descriptors=2), [write_end]))
print(status(request(failing(moved()), printing()), [write_end]))
print(status(request(moved(), failing(CallList())), [write_end]))
print(status(b"short", [write_end]), status(request(moved(), printing())[:200], [write_end]))
os.close(write_end)
print(os.read(read_end, 100))
template.stop()
"""
    )
    assert run_alone(code).splitlines() == ["0 0", "3", "3", "3 3", "b''"]


def test_shared_pages_keep_their_content_and_stay_private() -> None:
    """What a child writes is seen neither by its parent nor by its brother; the protection is kept."""
    code = """
import ctypes, mmap, os, struct
from thyme import _fork
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = bytes(range(256)) * (2 * page // 256)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(_fork.share_pages(struct.pack("=QQQ", start, 2 * page, 3)) == 2 * page)
print(memory[:] == bytes(range(256)) * (2 * page // 256))
line = next(l for l in open("/proc/self/maps") if l.startswith(f"{start:x}-"))
print(line.split()[1], "memfd:template" in line)
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        seen = memory[:4]
        memory[:4] = b"mine"
        os._exit(0 if seen == bytes(range(4)) and memory[:4] == b"mine" else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), memory[:4] == bytes(range(4)))
"""
    assert run_alone(code).splitlines() == ["True", "True", "rw-p True", "0 True", "0 True"]


def test_what_cannot_be_shared_stays() -> None:
    """A range that is not mapped: nothing changes, and nothing else is changed either."""
    code = """
import ctypes, mmap, struct
from thyme import _fork
memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:4] = b"kept"
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(_fork.share_pages(struct.pack("=6Q", start, mmap.PAGESIZE, 3, 4096, mmap.PAGESIZE, 3)), memory[:4])
print("memfd:template" in open("/proc/self/maps").read())
"""
    assert run_alone(code).splitlines() == ["0 b'kept'", "False"]


def test_arenas_lie_side_by_side_and_come_back() -> None:
    """Small objects are allocated, freed and allocated again, within the room, beyond it, and after its end."""
    code = """
from thyme import _fork
_fork.gather_arenas(8 << 20)
for _ in range(3):
    kept = [str(i) * 3 for i in range(400_000)]  # some 30 MB
    assert len(set(map(id, kept))) == 400_000 and kept[-1] == "399999" * 3
    del kept
_fork.close_region()
for _ in range(3):
    kept = [str(i) * 3 for i in range(400_000)]
    assert len(set(map(id, kept))) == 400_000 and kept[-1] == "399999" * 3
    del kept
print("served")
"""
    assert run_alone(code) == "served\n"


def memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def faults_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_its_memory_stays_as_it_was(own: Sandbox) -> None:
    """Orders cost it a few pages of its stack, each time the same, and no huge page."""
    for _ in range(5):
        assert own.run("print(1)").stdout == "1\n"
    pid = template_of(own)
    before, faults = memory_of(pid), faults_of(pid)
    for _ in range(20):
        assert own.run("print(1)").stdout == "1\n"
    after = memory_of(pid)
    assert after["AnonHugePages"] == before["AnonHugePages"]
    assert after["Anonymous"] - before["Anonymous"] <= 64  # KiB
    assert faults_of(pid) - faults < 20 * 20
    assert after["Anonymous"] - after["AnonHugePages"] < 4096, "what a fork copies page by page"


def test_the_code_of_a_library_is_one_mapping_with_its_constants(own: Sandbox) -> None:
    """Which is neither writable nor cut in two: an address above the last of its pages is as before."""
    maps = [line.split() for line in Path(f"/proc/{template_of(own)}/maps").read_text().splitlines()]
    code = [fields for fields in maps if fields[1] == "r-xp" and len(fields) == 6 and fields[4] != "0"]
    assert len(code) > 50 and not any("w" in fields[1] and "x" in fields[1] for fields in maps)
    ends = {(fields[0].split("-")[1], fields[4]) for fields in code}
    for fields in maps:  # what follows code in a file without a gap would be part of it
        start = fields[0].split("-")[0]
        assert fields[1] != "r--p" or fields[4] == "0" or (start, fields[4]) not in ends or fields[2] == "00000000"


_SCRIBBLE = """
import ctypes
flag = ctypes.c_int.in_dll(ctypes.pythonapi, 'Py_QuietFlag')
print(flag.value)
flag.value += 77
print(flag.value)
"""


def test_a_snippet_writes_to_a_copy_of_its_own(own: Sandbox) -> None:
    """To the data of a library, which all processes read from one sealed file."""
    for _ in range(3):
        assert own.run(_SCRIBBLE).stdout == "0\n77\n"


def test_without_it_the_fork_server_is_replaced(image) -> None:
    for off in (frozenset(), frozenset({"namespaces"})):
        with Sandbox(SandboxConfig(workers=2, memory_mib=256), _off=off) as sandbox:
            with sandbox.session() as session:
                assert session.run("x = 1").status is Status.OK
                os.kill(template_of(sandbox), signal.SIGKILL)
                assert eventually(lambda sandbox=sandbox: sandbox._client.restarts == 1)
                assert session.run("print('x' in globals())").stdout == "False\n"
            check_crop(sandbox, image)


def test_it_ends_with_the_sandbox() -> None:
    for off in (frozenset(), frozenset({"namespaces"})):
        with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=off) as sandbox:
            pid = template_of(sandbox)
        assert eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def test_a_parked_child_has_its_pages(own: Sandbox) -> None:
    """What any snippet needs: after its order it takes a few faults, where one forked for it takes hundreds."""
    for _ in range(3):
        assert eventually(lambda: any(is_waiting(pid) and faults_of(pid) > 250 for pid in parked(own)))
        (pid,) = parked(own)
        before = faults_of(pid)
        with own.session() as session:
            assert session.run("print(1)").stdout == "1\n"
            assert faults_of(pid) - before < 60


def parked(sandbox: Sandbox) -> set[int]:
    return named(sandbox._client.server.process.pid, "thyme-parked")


def is_waiting(pid: int) -> bool:
    return facts(pid).get("State", "").startswith("S")


def test_pages_in_pieces() -> None:
    """Own ones that lie side by side are one piece; of a file's pages one stands for all that lie around it."""
    page = 4096
    found = [(16 * page, True), (17 * page, True), (19 * page, True), (20 * page, False), (21 * page, False)]
    found += [(32 * page, False), (33 * page, True), (34 * page, False)]
    pieces = [[16 * page, 2 * page], [19 * page, page], [20 * page, 0], [32 * page, 0], [33 * page, page]]
    assert _pieces(found) == pieces
