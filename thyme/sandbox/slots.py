"""Slots: numbers of children that live at the same time, each with a scratch folder that is empty when it is taken."""

# Paths here are strings that may be in another root.
# ruff: noqa: PTH102
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thyme.sandbox import jail
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.scratch import usage, wipe

_CLEANING_S = 0.002
_OWN_FOLDERS = 3
"""In a scratch folder before a snippet runs, itself included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a child lives: known before there is work for it."""

    slot: int
    scratch: str
    image_file: str | None = None
    """Only with private mounts, which must show it before the right to mount is given up."""


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

    def take(self, image_file: str | None = None) -> Place:
        """A free slot with an empty scratch folder.

        Raises:
            OSError: its folder cannot be made; the number is not used again.
        """
        slot = next(i for i in range(1, 1 << 20) if i not in self._taken)
        self._taken.add(slot)
        place = Place(slot=slot, scratch=self._scratch(slot), image_file=image_file)
        if not self._plan.private_mounts and slot not in self._folders:
            self._make(place)
        return place

    def release(self, place: Place) -> None:
        """Takes a place back from a child that has ended."""
        if self._plan.private_mounts:
            self._taken.discard(place.slot)  # its mount went with its mount namespace
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
        most = self._config.max_files + _OWN_FOLDERS
        used, files = usage(place.scratch, most)
        return used > self._config.scratch_mib << 20 or files > most

    def _scratch(self, slot: int) -> str:
        return "/mnt/data" if self._plan.private_mounts else f"{self._plan.slots}/{slot}"

    def _make(self, place: Place) -> None:
        uid = self._plan.uid_base and self._plan.uid_base + place.slot
        os.mkdir(place.scratch, 0o700)
        if self._plan.rooted:
            jail.mount_scratch(place.scratch, self._config.scratch_mib, self._config.max_files + _OWN_FOLDERS, uid)
        elif uid:
            os.chown(place.scratch, uid, uid)
        self._folders.add(place.slot)
