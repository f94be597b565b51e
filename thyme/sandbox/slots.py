"""Slots: numbers of children that live at the same time, each with a scratch folder that is empty when it is taken."""

# Paths here are strings that may be in another root.
# ruff: noqa: PTH102
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.kept_root import KeptRoot
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.scratch import usage, wipe

_CLEANING_S = 0.002
_OWN_FOLDERS = 4
"""What a scratch folder on a disk holds before a snippet runs: its places, and the working folder in one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a child lives: known before there is work for it."""

    slot: int
    scratch: str | None
    """Its folder on a disk; None where it is in the child's own root."""
    root: KeptRoot | None = None
    """The root that the last child there has left as it was made; None where the next one makes its own."""


class Slots:
    """Gives out places and cleans those that come back, a little at a time.

    Args:
        plan: where scratch folders lie and whose they are.
        config: how much a scratch folder may hold.
    """

    def __init__(self, plan: JailPlan, config: SandboxConfig) -> None:
        self._plan, self._config = plan, config
        self._taken: set[int] = set()
        self._folders: set[int] = set()
        """Slots that have a folder."""
        self._wiping: list[tuple[int, Iterator[None]]] = []
        self._kept: list[tuple[int, KeptRoot]] = []
        """Slots that have a root and no child."""
        if not plan.rooted:
            slots = Path(plan.slots)
            slots.mkdir(exist_ok=True)
            slots.chmod(0o711)
            for left in slots.iterdir():  # by children of a fork-server that was killed
                self._taken.add(int(left.name))
                self._folders.add(int(left.name))
                self._wiping.append((int(left.name), wipe(str(left), keep=True)))

    @property
    def need_cleaning(self) -> bool:
        """Whether `clean_a_little` has something to do."""
        return bool(self._wiping)

    def take(self, *, kept: bool = False) -> Place:
        """A free slot with an empty scratch folder.

        Args:
            kept: whether it may be one with a root.

        Raises:
            OSError: its folder cannot be made; the number is not used again.
        """
        if kept and self._kept:
            slot, root = self._kept.pop()
            return Place(slot=slot, scratch=None, root=root)
        slot = next(i for i in range(1, 1 << 20) if i not in self._taken)
        self._taken.add(slot)
        if self._plan.rooted:
            return Place(slot=slot, scratch=None)
        scratch = f"{self._plan.slots}/{slot}"
        if slot not in self._folders:
            os.mkdir(scratch, 0o700)
            if uid := self._plan.uid_of(slot):
                os.chown(scratch, uid, uid)
            self._folders.add(slot)
        return Place(slot=slot, scratch=scratch)

    def release(self, place: Place, root: KeptRoot | None = None) -> None:
        """Takes a place back from a child that has ended, with the root that it has left as it was made."""
        if root is not None and len(self._kept) <= self._config.workers:  # one more than can be taken at once
            self._kept.append((place.slot, root))
        elif place.scratch is None:
            for gone in (root, place.root):
                if gone is not None:
                    gone.close()
            self._taken.discard(place.slot)  # it went with the child's mount namespace
        else:
            self._wiping.append((place.slot, wipe(place.scratch, keep=True)))

    def clean_a_little(self) -> None:
        """Two milliseconds of cleaning; a folder that resists is abandoned, and its number with it."""
        until = time.monotonic() + _CLEANING_S
        while self._wiping and time.monotonic() < until:
            slot, steps = self._wiping[0]
            try:
                next(steps)
            except StopIteration:
                self._wiping.pop(0)
                self._taken.discard(slot)
            except OSError:
                self._wiping.pop(0)

    def is_over_quota(self, place: Place) -> bool:
        """Whether more lies in a scratch folder than is allowed. To be asked where the kernel keeps no quota."""
        if place.scratch is None:
            return False
        most = self._config.max_files + _OWN_FOLDERS
        used, files = usage(place.scratch, most)
        return used > self._config.scratch_mib << 20 or files > most
