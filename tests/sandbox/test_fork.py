"""A session that is forked: the fork is what a session would be in which all was run again, and from then on nothing of
one reaches the other."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.sandbox.forks import STORIES, Story, differences
from thyme.sandbox import Sandbox, SandboxConfig, SandboxSession, checkpoint
from thyme.sandbox.child_handle import pid_of

_FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 2)); ax.plot([1, 2], [3, 4])"


@pytest.fixture(scope="module")
def again() -> Iterator[Sandbox]:
    """Runs code again in place of copying."""
    with Sandbox(SandboxConfig(workers=2, timeout_s=20.0, memory_mib=512), _off=frozenset({"fork"})) as sandbox:
        yield sandbox


@pytest.mark.parametrize("story", STORIES, ids=[story.name for story in STORIES])
def test_a_fork_gives_what_a_replay_gives(story: Story, sandbox: Sandbox, again: Sandbox, image) -> None:
    assert list(differences(story, sandbox, again, image)) == []
    assert sandbox._client.restarts == 0


FIGURES = [
    Story("a figure", (_FIGURE,), ("ax.set_title('later'); fig.savefig('f.png')", "plt.show()")),
    Story("a figure that was drawn", (_FIGURE, "fig.savefig('a.png')"), ("ax.plot([3, 1]); fig.savefig('f.png')",)),
]


@pytest.mark.soak
def test_figures(image) -> None:
    pytest.importorskip("matplotlib")
    config = SandboxConfig(workers=2, timeout_s=20.0, memory_mib=512, preload=("matplotlib",))
    with Sandbox(config) as live, Sandbox(config, _off=frozenset({"fork"})) as again:
        for story in FIGURES:
            assert list(differences(story, live, again, image)) == []


def test_what_is_free_is_not_copied(sandbox: Sandbox) -> None:
    """What malloc keeps behind its last block, in huge pages where the machine has them, is given back."""
    with sandbox.session() as session:
        session.run("blocks = [bytes(60_000) for _ in range(500)]")
        assert _empty_pages(session) > 5_000
        session.run("del blocks")
        (copy,) = session.fork()
        with copy:
            if not copy.fork_detail:
                assert _empty_pages(session) < 40 and _empty_pages(copy) < 40


def _empty_pages(session: SandboxSession) -> int:
    """Pages of the heap of a session's process that are there and hold nothing but zeros."""
    child = session._state.child
    assert child is not None and child.pidfd is not None
    folder = Path(f"/proc/{pid_of(child.pidfd)}")
    heaps = [line.split()[0] for line in (folder / "maps").read_text().splitlines() if line.endswith("[heap]")]
    page, num_empty = mmap.PAGESIZE, 0
    try:
        with (
            (folder / "pagemap").open("rb", buffering=0) as pagemap,
            (folder / "mem").open("rb", buffering=0) as memory,
        ):
            for start, end in ([int(edge, 16) for edge in heap.split("-")] for heap in heaps):
                found = os.pread(pagemap.fileno(), (end - start) // page * 8, start // page * 8)
                entries = np.frombuffer(found, np.uint64)
                for number in np.flatnonzero(
                    (entries >> np.uint64(63)) & (entries >> np.uint64(56))
                ):  # there, not shared
                    num_empty += not any(os.pread(memory.fileno(), page, start + int(number) * page))
    except PermissionError as error:
        pytest.skip(f"another process's memory may not be read: {error}")
    return num_empty


class _Entry:
    """Of a folder, with what is called "mounted" on another device."""

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.name, self._entry = entry.name, entry

    def stat(self, *, follow_symlinks: bool) -> Any:
        facts = self._entry.stat(follow_symlinks=follow_symlinks)
        values = {name: getattr(facts, name) for name in ("st_mode", "st_size", "st_mtime_ns", "st_dev", "st_ino")}
        return SimpleNamespace(**values | {"st_dev": facts.st_dev + (self.name == "mounted")})


def test_folders_on_the_way_to_what_is_mounted_lock_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python lies below /tmp and its parents cannot be written to."""

    @contextmanager
    def scandir(folder: str) -> Iterator[Iterator[_Entry]]:
        with os.scandir(folder) as entries:
            yield map(_Entry, entries)

    monkeypatch.setattr(checkpoint, "_scandir", scandir)
    libraries = tmp_path / "venv" / "lib"
    (libraries / "mounted").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for folder in (libraries, libraries.parent):
        folder.chmod(0o555)
    device = tmp_path.stat().st_dev
    interpreter: Any = SimpleNamespace(
        map=SimpleNamespace(places={"/tmp": str(tmp_path)}, files=()), images=SimpleNamespace(device=device)
    )
    taken, _ = checkpoint._files(interpreter)
    assert [file.path for file in taken] == [str(tmp_path / "mine")]
    (tmp_path / "mine" / "locked").mkdir(mode=0o555)
    with pytest.raises(checkpoint.CannotFork, match="a folder in its scratch is locked"):
        checkpoint._files(interpreter)
    for folder in (libraries.parent, libraries):
        folder.chmod(0o755)
