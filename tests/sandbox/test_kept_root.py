"""A root is used again only where nobody can tell, and by nobody but the next child: what a snippet did to its scratch,
whatever it undid of it, has the root thrown away."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.sandbox.host import eventually, server_of, snippets_of
from tests.sandbox.test_root import is_mounted
from thyme.sandbox import Sandbox, SandboxConfig, Status

# Names, rights, numbers, room, mounts' flags: all that a root has beside the times at which it was made.
_LOOK = """
import os
for folder in ('/mnt/data', '/mnt/data/temp_processed_images', '/tmp'):
    facts = os.stat(folder)
    print(folder, sorted(os.listdir(folder)), facts.st_atime_ns, facts.st_mtime_ns, oct(facts.st_mode))
    print(facts.st_uid == os.getuid(), facts.st_gid == os.getgid(), facts.st_nlink, facts.st_ino, facts.st_size)
room = os.statvfs('/')
print(room.f_bfree, room.f_ffree, room.f_files, room.f_flag)
"""
_NUMBER = "import os; print(os.stat('/tmp').st_dev, os.stat('/mnt').st_ctime_ns)"
"""By which two roots differ."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Sandbox]:
    """No child is forked ahead, and one snippet runs at a time: each takes the root that the one before it left."""
    with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=frozenset({"parking"})) as sandbox:
        if not is_mounted(sandbox):
            pytest.skip("this machine gives no mount namespace")
        yield sandbox


def is_idle(sandbox: Sandbox) -> bool:
    """Waits until no child is left, so that the fork-server has seen to what it left."""
    return eventually(lambda: not snippets_of(server_of(sandbox)))


def root_after(sandbox: Sandbox, code: str, image: Image.Image | None = None) -> tuple[str, str]:
    """The root in which `code` runs, and that of the snippet behind it."""
    assert is_idle(sandbox)
    run = sandbox.run(f"{_NUMBER}\n{code}", image, "/data/in/photo.jpg")
    assert run.error is None, run
    assert is_idle(sandbox)
    return run.stdout.splitlines()[0], sandbox.run(_NUMBER).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "import glob; glob.glob('/tmp/*'), os.listdir('/mnt/data'), os.stat('.')",
        "try: open('/mnt/no', 'w')\nexcept OSError: pass",
        "os.chmod('/tmp', 0o777), os.utime('/tmp', (5, 5)), os.umask(0)",
        "os.chdir('/tmp')",
    ],
)
def test_a_root_as_it_was_made_is_used_again(code: str, alone: Sandbox) -> None:
    one, next_one = root_after(alone, code)
    assert one == next_one


@pytest.mark.parametrize(
    "code",
    [
        "open('/tmp/x', 'w').close()",
        "open('x', 'w').close(); os.remove('x')",
        "open('/mnt/data/x', 'w').close(); os.remove('/mnt/data/x')",
        "os.rmdir('/mnt/data/temp_processed_images'); os.mkdir('/mnt/data/temp_processed_images')",
        "home = os.getcwd(); os.rename(home, '/tmp/x'); os.rename('/tmp/x', home)",
        "os.mkdir('/tmp/x'); os.rmdir('/tmp/x')",
        "import tempfile; tempfile.NamedTemporaryFile().close()",
        "import tempfile; tempfile.TemporaryFile().close()",
        "os.close(os.open('/mnt/data', os.O_TMPFILE | os.O_WRONLY))",
        "Image.new('RGB', (4, 4)).save('x.png'); os.remove('x.png')",
    ],
)
def test_a_root_in_which_anything_was_is_not(code: str, alone: Sandbox) -> None:
    one, next_one = root_after(alone, code)
    assert one != next_one


def test_a_root_with_an_image_is_not(alone: Sandbox, image: Image.Image) -> None:
    for before in ("1", "2"):
        assert alone.run(f"print({before})").stdout == f"{before}\n"  # so that one is kept, and the image comes into it
        one, next_one = root_after(alone, "assert os.path.isfile(image_path)", image)
        assert one != next_one
        assert alone.run("import os; print(os.path.exists('/data'))").stdout == "False\n"


def test_the_next_snippet_cannot_tell(alone: Sandbox) -> None:
    with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=frozenset({"parking"})) as other:
        first = other.run(_LOOK)
    assert first.error is None
    for code in ("print(1)", "[os.listdir(f) for f in ('/tmp', '/mnt/data', '.')]", "open('/tmp/x', 'w').write('x')"):
        root_after(alone, code)
        assert is_idle(alone)
        assert alone.run(_LOOK).stdout == first.stdout


def test_a_root_that_cannot_be_entered_is_not_tried_again(alone: Sandbox) -> None:
    """What a child says that could not: it ends with a status that is none of success."""
    roots = []
    for code, status in ((_NUMBER, Status.OK), (f"{_NUMBER}; os._exit(3)", Status.CRASHED), (_NUMBER, Status.OK)):
        assert is_idle(alone)
        run = alone.run(code)
        assert run.status is status
        roots.append(run.stdout)
    assert roots[0] == roots[1] != roots[2]


def test_without_the_filter_none_is_used_again() -> None:
    """A snippet that may set times could hide what it did."""
    with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=frozenset({"parking", "seccomp"})) as sandbox:
        if not is_mounted(sandbox):
            pytest.skip("this machine gives no mount namespace")
        hides = "open('/tmp/x', 'w').close(); os.remove('/tmp/x'); os.utime('/tmp', (0, 0))"
        one, next_one = root_after(sandbox, hides)
        assert one != next_one


def test_the_server_keeps_no_more_than_can_run(alone: Sandbox) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{server_of(alone)}/fd"))  # noqa: PTH208

    def many(code: str) -> None:
        sessions = [alone.session() for _ in range(12)]
        for session in sessions:
            session.run(code)
        for session in sessions:
            session.close()
        assert is_idle(alone)
        alone.run("print(1)")

    alone.run("print(1)")
    assert is_idle(alone)
    before = held() + 3  # of one root: a worker may take one while another comes back
    for code in ("print(1)", "open('/tmp/x', 'w').close()", "import os; os._exit(3)"):
        many(code)
        assert eventually(lambda: held() <= before), (held(), before, code)
