"""Files and folders that are on disk whole or not at all, also after a power cut. Standard library only.

Something new is written under a temporary name, synced, and takes its name in one rename. A folder that replaces
another changes places with it in one system call, so that the name never points at nothing.
"""

import ctypes
import errno
import os
import re
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LEFT = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>new|old)")


def write_text(path: Path, text: str) -> None:
    """Replaces the file at `path`, whose folder must exist."""
    fresh = fresh_name(path)
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    _sync(path.parent)


def put_folder(fresh: Path, folder: Path) -> None:
    """Gives the complete folder `fresh` the name `folder` in the same parent; an earlier one is deleted after that.

    Every file and folder below `fresh` is synced first, the parent after.
    """
    for path, _, files in os.walk(fresh, topdown=False):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if not folder.exists():
        fresh.rename(folder)
    elif _exchange(fresh, folder):
        fresh.rename(stale)
    else:  # a file system without it: `recover` puts the old one back where a crash falls between these two
        folder.rename(stale)
        fresh.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Deletes a folder that under its name is always whole."""
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(stale)
    shutil.rmtree(stale, ignore_errors=True)


def fresh_name(path: Path) -> Path:
    """The temporary name under which what becomes `path` is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def recover(parent: Path) -> None:
    """Clears what a killed process left in the folder; nobody else may be writing there.

    Half written things go. Of a replacement that was cut short the old folder gets its name back.
    """
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if found := _LEFT.fullmatch(path.name):
            whole = path.with_name(found["name"])
            if found["kind"] == "old" and not whole.exists() and (path / "manifest.json").is_file():
                path.rename(whole)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one system call; False where kernel or file system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
