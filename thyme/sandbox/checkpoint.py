"""What a session takes along when it is forked, beside its memory: its files, and what the kernel keeps of a process.

Both sides run in the child. The original notes all that into its own memory and holds still; that memory is then put
into a fresh child with a jail, a scratch and descriptors of its own (memory_plan.py), which wakes up here and makes of
the note what it needs. Nothing of this is trusted: a snippet that tampers with it harms its own copy.
"""

# Paths here are the snippet's strings, or descriptors.
from __future__ import annotations

import fcntl
import gc
import io
import os
import re
import resource
import stat
from collections.abc import Iterator
from typing import NamedTuple

from thyme import _fork
from thyme.sandbox import paths
from thyme.sandbox.birth import CODE, SOCKET
from thyme.sandbox.interpreter import Interpreter
from thyme.sandbox.result_images import Seen

ORDER = b"fork"
"""What the client sends in place of the length of a snippet."""
READY = b'{"held":null}'
"""What the original answers where it holds still, and what each copy says first."""
_MOST_BYTES = 64 << 20
"""Of files that are taken along: they pass through memory."""
_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK
_ALL, _READ = stat.S_IRWXU, stat.S_IRUSR | stat.S_IXUSR
_LIMITS = range(16)
_HOME = paths.HOME.rstrip("/")
_UNSAFE = re.compile(r"[^\w ,:/.-]", re.ASCII)

# The snippet can replace these names where they come from.
_open, _close, _read, _write, _fstat, _stat = os.open, os.close, os.read, os.write, os.fstat, os.stat
_scandir, _mkdir, _rmdir, _umask, _chdir, _getcwd = os.scandir, os.mkdir, os.rmdir, os.umask, os.chdir, os.getcwd
_dup2, _lseek, _fcntl = os.dup2, os.lseek, fcntl.fcntl
_get_objects = gc.get_objects
_getrlimit, _setrlimit = resource.getrlimit, resource.setrlimit
_hold, _open_descriptors = _fork.hold, _fork.open_descriptors


class CannotFork(Exception):
    """The session has something that cannot be taken along."""


class _File(NamedTuple):
    path: str
    mode: int
    content: bytes | None
    """None for a folder."""


class _Open(NamedTuple):
    descriptor: int
    path: str | int
    """Or the descriptor of which it is a duplicate."""
    flags: int
    offset: int


class _Note(NamedTuple):
    files: list[_File]
    open_files: list[_Open]
    folder: str
    umask: int
    limits: list[tuple[int, int]]
    seen: Seen
    cpu_s: float


def fork(interpreter: Interpreter) -> bool:
    """Holds still while copies of this process are made, and returns in each of them as well. Returns whether to go
    on: not where the client is gone."""
    try:
        note = _noted(interpreter)
    except Exception as problem:  # whatever a snippet left of what this stands on
        _write(SOCKET, b'{"held":"%s"}' % _UNSAFE.sub(" ", str(problem))[:200].encode("ascii", "replace"))
        return True
    is_copy = _hold(SOCKET, READY)
    if is_copy:
        _settle(interpreter, note)
        _write(SOCKET, READY)
    return is_copy is not None


def _noted(interpreter: Interpreter) -> _Note:
    umask = _umask(0o077)
    _umask(umask)
    files, places = _files(interpreter)
    limits = [_getrlimit(which) for which in _LIMITS]
    open_files = list(_opened(places))
    return _Note(files, open_files, _getcwd(), umask, limits, interpreter.images.seen(), interpreter.cpu_used())


def _files(interpreter: Interpreter) -> tuple[list[_File], dict[tuple[int, int], str]]:
    """What lies in the scratch, folders first and files by age; and where each file lies that a descriptor may lead
    to."""
    folders: list[_File] = []
    files: list[tuple[int, _File]] = []
    places: dict[tuple[int, int], str] = {}
    total, device = 0, interpreter.images.device
    pending = list(interpreter.map.places.values())
    while pending:
        folder = pending.pop()
        with _scandir(folder) as entries:
            for entry in entries:
                path, facts = folder + "/" + entry.name, entry.stat(follow_symlinks=False)
                if facts.st_dev != device:  # the input image, installed packages: mounted there
                    continue
                mode, is_folder = stat.S_IMODE(facts.st_mode), stat.S_ISDIR(facts.st_mode)
                total += 0 if is_folder else facts.st_size
                if total > _MOST_BYTES:
                    raise CannotFork(f"there is more than {_MOST_BYTES >> 20} MiB in its files")
                if is_folder:
                    if mode & _ALL != _ALL:
                        if mode & _READ == _READ and _leads_to_mounts(path, device):
                            continue
                        raise CannotFork("a folder in its scratch is locked")
                    folders.append(_File(path, mode, None))
                    pending.append(path)
                elif stat.S_ISREG(facts.st_mode):
                    files.append((facts.st_mtime_ns, _File(path, mode, _content(path, facts.st_size))))
                    places[facts.st_dev, facts.st_ino] = path
    for path in interpreter.map.files:
        facts = _stat(path)
        places[facts.st_dev, facts.st_ino] = path
    return folders + [file for _, file in sorted(files, key=_age)], places


def _leads_to_mounts(folder: str, device: int) -> bool:
    """Whether all that is in a folder is mounted there, or leads to what is: every child begins with it, as where
    installed packages lie below /tmp."""
    with _scandir(folder) as entries:
        found = [(folder + "/" + entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return bool(found) and all(
        facts.st_dev != device or (stat.S_ISDIR(facts.st_mode) and _leads_to_mounts(path, device))
        for path, facts in found
    )


def _age(file: tuple[int, _File]) -> int:
    return file[0]


def _content(path: str, size: int) -> bytes:
    descriptor = _open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := _read(descriptor, max(1, size)):
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        _close(descriptor)


def _opened(places: dict[tuple[int, int], str]) -> Iterator[_Open]:
    """What the snippet has open, as it can be opened again."""
    own = {(facts.st_dev, facts.st_ino): fd for fd in range(CODE, -1, -1) for facts in [_fstat(fd)]}
    for descriptor in _open_descriptors(CODE + 1):
        facts = _fstat(descriptor)
        key = facts.st_dev, facts.st_ino
        if key in own:
            yield _Open(descriptor, own[key], 0, 0)
            continue
        path = places[key] if key in places and facts.st_nlink else _name_of(descriptor, key)
        flags = _fcntl(descriptor, fcntl.F_GETFL) & _FLAGS
        yield _Open(descriptor, path, flags, _lseek(descriptor, 0, os.SEEK_CUR))


def _name_of(descriptor: int, key: tuple[int, int]) -> str:
    """The path of a file outside of the scratch, a font say, by the object that has it open."""
    for found in _get_objects():
        if type(found) is io.FileIO and not found.closed and found.fileno() == descriptor:
            path = found.name
            if isinstance(path, str) and path.startswith("/"):
                facts = _stat(path)
                if (facts.st_dev, facts.st_ino) == key:
                    return path
    raise CannotFork("a file is open whose path is not known")


def _settle(interpreter: Interpreter, note: _Note) -> None:
    """In the copy: files, open files, working folder and limits as the original had them."""
    _umask(0)
    folders = {file.path for file in note.files if file.content is None}
    if _HOME not in folders:
        _rmdir(_HOME)
    for file in note.files:
        _put(file)
    for opened in note.open_files:
        _reopen(opened)
    _umask(note.umask)
    _chdir(note.folder)
    for which, limits in zip(_LIMITS, note.limits, strict=True):
        if _getrlimit(which) != limits:
            _setrlimit(which, limits)
    interpreter.moved(note.seen, note.cpu_s)


def _put(file: _File) -> None:
    if file.content is None:
        try:  # noqa: SIM105
            _mkdir(file.path, file.mode)
        except FileExistsError:  # every child begins with it
            pass
        return
    descriptor = _open(file.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, file.mode | stat.S_IWUSR)
    view = memoryview(file.content)
    while view:
        view = view[_write(descriptor, view) :]
    _close(descriptor)


def _reopen(opened: _Open) -> None:
    if isinstance(opened.path, int):
        _dup2(opened.path, opened.descriptor, False)
        return
    descriptor = _open(opened.path, opened.flags | os.O_CLOEXEC)
    if descriptor != opened.descriptor:
        _dup2(descriptor, opened.descriptor, False)
        _close(descriptor)
    _lseek(opened.descriptor, opened.offset, os.SEEK_SET)
