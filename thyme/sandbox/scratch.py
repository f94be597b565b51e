"""Scratch folders on an ordinary disk, where the jail cannot mount one in memory: bounded looking, bounded wiping.

What lies in them was made by snippets: trees may be thousands of levels deep and folders unreadable, so nothing here
recurses, follows links, or does more than a given number of steps at a time.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH106, PTH208
from __future__ import annotations

import os
import stat
from collections.abc import Iterator


def usage(folder: str, max_files: int) -> tuple[int, int]:
    """(bytes, entries) below `folder`; stops counting past `max_files` entries, and counts what it cannot see as too
    many."""
    total = entries = 0
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as inside:
                for entry in inside:
                    entries += 1
                    if entries > max_files:
                        return total, entries
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(facts.st_mode):
                        pending.append(entry.path)
                    else:
                        total += facts.st_blocks * 512
        except FileNotFoundError:
            continue
        except OSError:
            return total, max_files + 1
    return total, entries


def wipe(folder: str, *, keep: bool = False) -> Iterator[None]:
    """Deletes `folder` (or only what is in it) step by step, yielding between steps. Deep trees are flattened: children
    move up to the top.

    Raises:
        OSError: something cannot be deleted; the caller abandons the folder.
    """
    moved = 0
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while names := os.listdir(top):
            for name in names:
                yield
                try:
                    os.rmdir(name, dir_fd=top)
                    continue
                except NotADirectoryError:
                    os.unlink(name, dir_fd=top)
                    continue
                except OSError:  # not empty
                    pass
                os.chmod(name, 0o700, dir_fd=top)
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for child in os.listdir(inner):
                        yield
                        moved += 1
                        os.rename(child, f".wipe{moved}", src_dir_fd=inner, dst_dir_fd=top)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    if not keep:
        os.rmdir(folder)
