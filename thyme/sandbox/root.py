"""The file system of one child: a root of its own, in memory, with the scratch at the paths that the model was told.

The fork-server lives in a small read-only root (`change_root`). A child copies its mounts and moves them into a file
system in memory that is the child's alone. /mnt/data, /tmp and the folder of the input image are plain folders of it
that the child may write to: the kernel translates every path, one quota holds for all of them, and a file moves from
one to another by a rename. The input image is a read-only mount at its own path.
"""

# Paths here may be in another root.
# ruff: noqa: PTH102, PTH110, PTH113, PTH123
from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from thyme import _fork
from thyme.sandbox import jail, paths
from thyme.sandbox.call_list import Argument, CallList, Parameter
from thyme.sandbox.config import SandboxConfig

IMAGES = "/images"
"""Where the fork-server's root has the stored images. No child's root has them."""
INPUT = "/mnt/input"
"""Where a child has its input image if it cannot be at its own path."""
_NEW = "/new"
_TIME_0 = bytes(32)
"""Two struct timespec."""
_DEEPEST = 64
"""Folders that are made for one image."""
_NEW_FILE, _FILE_MODE = os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444
SCRATCH = (paths.DATA, paths.HOME.rstrip("/"), paths.TMP)
"""The folders that every child may write to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An input image."""

    file: str
    """Its name among the stored images."""
    path: str
    """Where it belongs in the root of a child."""
    folder: str | None
    """The folder of it that the child may write to, where that is one more than the scratch has anyway."""


class Layout(NamedTuple):
    """What a child's root is made of."""

    folders: tuple[str, ...]
    """Parents first."""
    files: tuple[str, ...]
    moves: tuple[str, ...]
    """Mounts of the fork-server's root that are moved to the folder or file of their name."""


class BaseRoot:
    """The root of the fork-server, from which those of the children are made.

    Args:
        tops: folders right below the root that are mounts of their own.
        readable: the mounts in it that every child sees, and which of them are folders.
        namespace: descriptor of the mount namespace it is in.
        proc: descriptor of the host's /proc, in which a process finds its own mount namespace.
    """

    def __init__(self, *, tops: Sequence[str], readable: Sequence[tuple[str, bool]], namespace: int, proc: int) -> None:
        self._tops, self._readable = tops, readable
        self._namespace, self._proc = namespace, proc
        self._usual = self.layout()
        self.num_inodes = 1 + len(self._usual.folders) + len(self._usual.files)
        """Of the usual root of a child, its own included."""

    def layout(self, *images: Image) -> Layout:
        """What to make a root of: whole tops are moved, except where an image needs folders of its own in one."""
        tops = [top for top in self._tops if top not in {_top(image.path) for image in images}]
        single = [(path, is_folder) for path, is_folder in self._readable if _top(path) not in tops]
        folders = {"/mnt", *SCRATCH, *tops, *(path for path, is_folder in single if is_folder)}
        folders |= {parent for path, _ in single for parent in _parents(path)}
        files = (INPUT, *(path for path, is_folder in single if not is_folder))
        return Layout(tuple(sorted(folders)), files, (*tops, *(path for path, _ in single)))

    def has_room_for(self, image: Image) -> bool:
        """Whether it can be put into a root that was made without knowing of it."""
        return _top(image.path) not in self._tops

    def build(self, calls: CallList, config: SandboxConfig, layout: Layout | None = None, *, owned: bool) -> None:
        """Has a list of calls make a root and move its process there, into a mount namespace of its own.

        Args:
            calls: the list; its parameter is the user id of who may write to the scratch, where `owned`.
            config: how much it may hold.
            layout: what it is made of; the usual, where None.
            owned: whether the scratch gets an owner of its own.
        """
        layout = self._usual if layout is None else layout
        mode = _mode(owned)
        umask = calls.add("umask", _fork.SYS_umask, 0)
        jail.unshare(jail.CLONE_NEWNS, calls.add)
        inodes = 1 + len(layout.folders) + len(layout.files) + config.max_files
        jail.mount_memory(_NEW, mib=config.scratch_mib, inodes=inodes, mode=mode, make=calls.add)
        for folder in layout.folders:
            path, writable = os.fsencode(_NEW + folder), folder in SCRATCH
            calls.add(f"mkdir {folder}", _fork.SYS_mkdirat, jail.AT_FDCWD, path, 0o700 if writable else mode)
            if writable and owned:
                calls.add(f"chown {folder}", _fork.SYS_fchownat, jail.AT_FDCWD, path, Parameter(), Parameter(), 0)
        for file in layout.files:
            path = os.fsencode(_NEW + file)
            made = calls.add(f"open {file}", _fork.SYS_openat, jail.AT_FDCWD, path, _NEW_FILE, _FILE_MODE)
            calls.add("close", _fork.SYS_close, made)
        for place in layout.moves:
            jail.mount(place, _NEW + place, None, jail.MS_MOVE, make=calls.add)
        for folder in SCRATCH:  # the time by which kept_root.py knows that nothing was ever in it
            calls.add(f"utimensat {folder}", _fork.SYS_utimensat, jail.AT_FDCWD, os.fsencode(_NEW + folder), _TIME_0, 0)
        calls.add("chdir", _fork.SYS_chdir, _NEW.encode())
        jail.mount(".", "/", None, jail.MS_MOVE, make=calls.add)  # on top of the old root, which nothing can reach
        calls.add("chroot", _fork.SYS_chroot, b".")
        calls.add("chdir", _fork.SYS_chdir, b"/")
        calls.add("umask", _fork.SYS_umask, umask)

    def enter(self, calls: CallList, namespace: Argument) -> None:
        """Has a list of calls move its process into a root that was made before, to which no other process moves."""
        calls.add("setns", _fork.SYS_setns, namespace, jail.CLONE_NEWNS)

    def report(self, calls: CallList, channel: Argument) -> None:
        """Has a list of calls send the mount namespace of its process over a socket, if anybody listens."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        namespace = calls.add("open self/ns/mnt", _fork.SYS_openat, self._proc, b"self/ns/mnt", flags)
        calls.add("send", _fork.SEND_DESCRIPTORS, channel, namespace, may_fail=True)
        calls.add("close", _fork.SYS_close, namespace)

    def detached(self, image: Image) -> int:
        """A mount of the image that is nowhere yet (a descriptor). Only in the fork-server's root."""
        return jail.detached(f"{IMAGES}/{image.file}")

    @contextlib.contextmanager
    def inside(self, namespace: int) -> Iterator[None]:
        """Takes the fork-server into the mount namespace of a child of its own, and back.

        Raises:
            RuntimeError: it cannot get back, and must not go on.
        """
        jail.enter_mount_namespace(namespace)
        try:
            yield
        finally:
            try:
                jail.enter_mount_namespace(self._namespace)
            except OSError as error:
                raise RuntimeError(f"the fork-server cannot get back into its own root: {error}") from error


def base_root(run_dir: Path, readable: Sequence[Path]) -> BaseRoot:
    """Makes the fork-server's root and moves the process there. Needs a mount namespace of its own.

    Raises:
        OSError: the machine does not let it, or would not let a child have a root of its own.
    """
    shown = (*readable, *jail.DEVICES)
    with_mounts = {_top(str(path)) for path in shown if len(path.parts) > 2}
    tops = tuple(sorted(with_mounts - {"/mnt", "/tmp"} - {str(path) for path in shown}))
    base = BaseRoot(
        tops=tops,
        readable=tuple((str(path), path.is_dir()) for path in shown),
        namespace=os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC),
        proc=os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
    )
    binds = [(run_dir / "images", IMAGES)]
    folders = (_NEW, *SCRATCH)  # the scratch for rehearsals

    def change() -> None:
        umask = os.umask(0o022)
        try:
            jail.change_root(run_dir / "root", readable, binds, folders, tops)
        finally:
            os.umask(umask)

    def rehearse() -> None:
        jail.unshare(jail.CLONE_NEWNS)
        change()
        calls = CallList()
        base.build(calls, SandboxConfig(workers=1), owned=False)
        calls.make()
        for folder in SCRATCH:
            with open(f"{folder}/written", "x"):
                pass

    _in_a_child(rehearse)
    change()
    return base


def put_image(mount_fd: int, image: Image, config: SandboxConfig, uid: int, *, is_first: bool = True) -> None:
    """Puts the input image at its path in the root of a child, before anything in it is the child's.

    Args:
        mount_fd: what jail.detached gave for the image.
        image: where it belongs.
        config: how much the root may hold beside the image.
        uid: whose the folders are that it may write to; 0 for the caller.
        is_first: whether there is a place for it where its path cannot be had; a further image is not there then.
    """
    umask = os.umask(0)
    in_scratch = image.path.startswith((paths.DATA + "/", paths.TMP + "/"))
    try:
        missing = [path for path in reversed(_parents(image.path)) if not os.path.exists(path)]
        is_there = os.path.isfile(image.path)
        if len(missing) > _DEEPEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), image.path)
        if missing or not is_there:  # the snippet may make as many files as without them
            inodes = os.statvfs("/").f_files + len(missing) + (not is_there)
            jail.mount_memory("/", mib=config.scratch_mib, inodes=inodes, mode=_mode(uid != 0), again=True)
        for path in missing:
            _make_folder(path, uid, writable=in_scratch or path == image.folder)
        if not is_there:
            _make_file(image.path)
        jail.attach(mount_fd, image.path)
    except (OSError, ValueError):  # it is among what all children read, is a folder, or no path at all
        if is_first:
            jail.attach(mount_fd, INPUT)
    finally:
        os.umask(umask)


def _make_folder(path: str, uid: int, *, writable: bool) -> None:
    os.mkdir(path, 0o700 if writable else _mode(uid != 0))
    if writable and uid:
        os.chown(path, uid, uid)


def _make_file(path: str) -> None:
    os.close(os.open(path, _NEW_FILE, _FILE_MODE))


def _mode(owned: bool) -> int:
    """Of what is not the child's to change: it may be the owner, but has no capabilities."""
    return 0o755 if owned else 0o555


def _top(path: str) -> str:
    return "/" + path.split("/", 2)[1]


def _parents(path: str) -> list[str]:
    """The folders above, innermost first, without the root."""
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _in_a_child(step: Callable[[], None]) -> None:
    """Runs `step` in a process of its own and raises the OSError that it raised."""
    read_end, write_end = os.pipe()
    pid = jail.fork()
    if pid == 0:
        try:
            step()
            os.write(write_end, b"0")
        except OSError as error:
            os.write(write_end, f"{error.errno or 1} {error.strerror or error}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    code, _, reason = os.read(read_end, 4096).decode("utf-8", "replace").partition(" ")
    os.close(read_end)
    if code != "0":
        raise OSError(int(code or 1), reason or "a child could not make a root of its own")
