"""Lists of system calls: what each kind of argument comes to, and that a list ends at the first that fails."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from thyme import _fork
from thyme.sandbox import jail
from thyme.sandbox.call_list import CallList, Data, Given, Parameter, Result


def test_every_kind_of_argument(tmp_path: Path) -> None:
    """Numbers, bytes, what calls return, descriptors and the parameter."""
    (tmp_path / "there").write_text("there")
    calls = CallList()
    calls.add("mkdir", _fork.SYS_mkdirat, jail.AT_FDCWD, os.fsencode(tmp_path / "made"), 0o750)
    opened = calls.add("open", _fork.SYS_openat, jail.AT_FDCWD, os.fsencode(tmp_path / "there"), os.O_RDONLY)
    calls.add("dup3", _fork.SYS_dup3, opened, Given(1), os.O_CLOEXEC)
    calls.add("dup3", _fork.SYS_dup3, opened, Parameter(), os.O_CLOEXEC)
    calls.add("close", _fork.SYS_close, opened)
    one, other, third = os.pipe()[0], os.pipe()[0], os.pipe()[0]
    calls.make([one, other], parameter=third)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750
    assert os.read(other, 10) == b"there"
    assert os.lseek(third, 0, os.SEEK_CUR) == 5
    for fd in (one, other, third):
        os.close(fd)


def test_a_result_inside_of_bytes(tmp_path: Path) -> None:
    """As the kernel wants the descriptor of a Landlock rule."""
    if not (abi := _abi()):
        pytest.skip("no landlock here")
    ruleset = jail.landlock_ruleset(abi, [])
    calls = CallList()
    jail.landlock_allow_own(calls, Given(0), str(tmp_path), abi)
    calls.make([ruleset])
    missing = CallList()
    jail.landlock_allow_own(missing, Given(0), str(tmp_path / "missing"), abi)
    with pytest.raises(FileNotFoundError, match=r"open .*missing"):
        missing.make([ruleset])
    os.close(ruleset)
    calls = CallList()
    result = calls.add("umask", _fork.SYS_umask, 0o22)
    calls.add("setrlimit", _fork.SYS_prlimit64, 0, 7, None, Data(bytes(16)))
    calls.add("umask", _fork.SYS_umask, result)
    calls.add("umask", _fork.SYS_umask, 0o22, Data(struct.pack("=ii", 1, 2), result, 4))
    before = os.umask(0o22)
    calls.make()
    assert os.umask(before) == 0o22


def _abi() -> int:
    try:
        return jail.landlock_abi()
    except OSError:
        return 0


def test_it_ends_at_the_first_that_fails(tmp_path: Path) -> None:
    calls = CallList()
    calls.add("one that may", _fork.SYS_chdir, b"/no/such/folder", may_fail=True)
    calls.add("mkdir", _fork.SYS_mkdirat, jail.AT_FDCWD, os.fsencode(tmp_path / "a"), 0o700)
    calls.add("the second", _fork.SYS_mkdirat, jail.AT_FDCWD, os.fsencode(tmp_path / "a"), 0o700)
    calls.add("mkdir", _fork.SYS_mkdirat, jail.AT_FDCWD, os.fsencode(tmp_path / "b"), 0o700)
    with pytest.raises(FileExistsError, match="the second: File exists"):
        calls.make()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("argument", [Given(0), Given(-1), Result(1), Result(-1)])
def test_what_is_not_there_is_not_used(argument: Given | Result) -> None:
    calls = CallList()
    calls.add("close", _fork.SYS_close, argument)
    with pytest.raises(OSError, match="close") as caught:
        calls.make()
    assert caught.value.errno == errno.EINVAL


def test_nonsense_is_refused() -> None:
    for content in (b"", b"1234567", struct.pack("=q", 1), struct.pack("=q", -1), struct.pack("=q", 1 << 62)):
        assert _fork.make_calls(bytearray(content), (), 0) == (0, errno.EINVAL)
    past = struct.pack("=6qi5sB6x", _fork.SYS_chdir, 8, *[0] * 4, -1, bytes([1, 0, 0, 0, 0]), 0)
    assert _fork.make_calls(bytearray(struct.pack("=q", 1) + past + bytes(8)), (), 0) == (0, errno.EINVAL)
    calls = CallList()
    for _ in range(_fork.MOST_CALLS + 1):
        calls.add("umask", _fork.SYS_umask, 0o22)
    with pytest.raises(OSError, match="513 system calls"):
        calls.encode()
