"""What this machine offers to jail with: found out by doing it, noted layer by layer, the same for every child."""

# Paths here may be in another root.
# ruff: noqa: PTH112, PTH113
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thyme.sandbox import jail, paths
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.preload import anybody_may_read
from thyme.sandbox.protocol import Setup
from thyme.sandbox.result import LIVE_FORK, Layer, holds
from thyme.sandbox.root import IMAGES, INPUT, BaseRoot, Image, base_root

_UID_BASE = 1_900_000_000
_OPEN_FILES = 64
_MOST_SECONDS = 1 << 31
"""Of processor time that a process may be limited to; 68 years."""
_CAP_SETGID_SETUID, _CAP_SYS_ADMIN = 6, 21


@dataclass(frozen=True, slots=True, kw_only=True)
class JailPlan:
    """What the fork-server found possible."""

    abi: int
    """Landlock ABI, 0 without."""
    readable: tuple[bytes, ...]
    """Landlock rules for what every child may read."""
    null: int
    """Descriptor of /dev/null."""
    proc: int
    """Descriptor of the host's /proc."""
    seccomp: jail.SeccompFilter | None
    """None without."""
    root: BaseRoot | None
    """What each child's own root is made of. None where paths are translated by patches, and scratch folders lie on a
    disk."""
    readable_paths: tuple[str, ...]
    """What every child may read, by name."""
    drop: bool
    """Capabilities are emptied."""
    uid_base: int
    """The child becomes uid_base + slot; 0 keeps the identity."""
    limits: tuple[jail.Limit, ...]
    """Without that of the address space, which children inherit from the template."""
    images: str
    """The folder where the stored images lie, for the fork-server."""
    slots: str
    """The folder where the scratch folders lie that are on a disk."""

    forks_live: bool
    """Whether a session can be forked with its memory: its process then reports what that is read through."""

    @property
    def rooted(self) -> bool:
        """Whether every child has a root of its own, and its scratch a quota that the kernel keeps."""
        return self.root is not None

    def ruleset(self) -> int:
        """A Landlock ruleset (a descriptor): what all may read. -1 without Landlock."""
        return jail.landlock_ruleset(self.abi, self.readable) if self.abi else -1

    def allow(self, ruleset: int, path: str, *, writable: bool = False) -> None:
        """Adds one file or folder to a ruleset, if there is one."""
        if ruleset < 0:
            return
        rule = jail.landlock_rule(path, self.abi, writable=writable)
        try:
            jail.landlock_add(ruleset, rule)
        finally:
            jail.landlock_close(rule)

    def allow_image(self, ruleset: int, image: Image) -> None:
        """Lets a child, in whose root the caller is, read its image and write beside it."""
        for path in (image.path, INPUT):
            if os.path.isfile(path):
                self.allow(ruleset, path)
        if image.folder is not None and os.path.isdir(image.folder):
            self.allow(ruleset, image.folder, writable=True)

    def uid_of(self, slot: int) -> int:
        """The user id of the child in a slot, 0 where it keeps the fork-server's."""
        return self.uid_base and self.uid_base + slot

    def folder_of_image(self, image_path: str) -> str | None:
        """The folder of an input image, where a child may write to it beside the rest of its scratch."""
        return paths.folder_of_image(image_path, self.readable_paths)


def enter_namespaces(off: frozenset[str]) -> list[Layer]:
    """Enters every namespace the machine gives but those of control groups and mounts, once, for all children."""
    layers: list[Layer] = []
    if "namespaces" in off:
        return [Layer("namespaces", False, False, "switched off")]
    if not jail.capabilities() >> _CAP_SYS_ADMIN & 1:
        try:
            jail.enter_user_namespace()
        except OSError as error:
            return [Layer("namespaces", False, False, f"{error}; allow unprivileged user namespaces to have them")]
        layers.append(Layer("user namespace", True, False, "keeps the caller's id"))
    return [*layers, *(enter_namespace(name, off) for name in ("pid", "net", "ipc", "uts"))]


def enter_namespace(name: str, off: frozenset[str]) -> Layer:
    """Enters one namespace of jail.NAMESPACES."""
    if name in off:
        return Layer(f"{name} namespace", False, False, "switched off")
    try:
        jail.unshare(jail.NAMESPACES[name])
    except OSError as error:
        return Layer(f"{name} namespace", False, False, str(error))
    return Layer(f"{name} namespace", True, False, "entered")


def make_plan(setup: Setup, layers: list[Layer], readable: Sequence[Path], proc: int) -> JailPlan:
    """Tries what this machine offers beyond namespaces and notes each layer. Changes the root of the process.

    Args:
        setup: the client's wishes.
        layers: what holds so far; what is found here is appended.
        readable: files and folders that every child may read.
        proc: descriptor of /proc.
    """
    isolated, off = setup.config.isolation == "auto", setup.off
    root = _change_root(setup.run_dir, readable, layers) if holds(layers, "mount namespace") else None
    abi = _landlock_abi(layers, root is not None) if isolated and "landlock" not in off else 0
    seccomp = _seccomp_filter(layers) if isolated and "seccomp" not in off else None
    uid_base = 0
    if isolated and os.geteuid() == 0 and "uid" not in off:
        uid_base = _own_user_ids(layers, readable if root is not None else (*readable, setup.run_dir))
    forks_live = _live_forks(layers, root is not None and "fork" not in off)
    return JailPlan(
        abi=abi,
        readable=tuple(jail.landlock_rule(path, abi) for path in (*readable, *jail.DEVICES)) if abi else (),
        null=os.open("/dev/null", os.O_RDWR),
        proc=proc,
        seccomp=seccomp,
        root=root,
        readable_paths=tuple(str(path) for path in (*readable, *jail.DEVICES)),
        drop=isolated and "capabilities" not in off,
        uid_base=uid_base,
        limits=_limits(setup.config, has_quota=holds(layers, "private root")),
        images=IMAGES if root is not None else str(setup.run_dir / "images"),
        slots=str(setup.run_dir / "slots"),
        forks_live=forks_live,
    )


def _change_root(run_dir: Path, readable: Sequence[Path], layers: list[Layer]) -> BaseRoot | None:
    try:
        root = base_root(run_dir, readable)
    except OSError as error:
        detail = f"{error}; the scratch is on a disk, and paths are translated by patched functions"
        layers.append(Layer("private root", False, False, detail))
        return None
    detail = "no /proc, /etc or homes; the scratch, in memory, is at /mnt/data, /tmp and the folder of the image"
    layers.append(Layer("private root", True, False, detail))
    return root


def _landlock_abi(layers: list[Layer], rooted: bool) -> int:
    try:
        abi = jail.landlock_abi()
    except OSError as error:
        detail = f"{error}; needs Linux 5.13 with landlock among CONFIG_LSM"
        layers.append(Layer("landlock", False, not rooted, detail))
        return 0
    layers.append(Layer("landlock", True, True, f"ABI {abi}"))
    return abi


def _seccomp_filter(layers: list[Layer]) -> jail.SeccompFilter | None:
    try:
        program = jail.SeccompFilter()
    except ValueError as error:
        layers.append(Layer("seccomp", False, True, str(error)))
        return None
    layers.append(Layer("seccomp", True, True, f"allow-list of {program.num_instructions} instructions"))
    return program


def _live_forks(layers: list[Layer], possible: bool) -> bool:
    detail = "a session's memory and files are copied into a child jailed anew"
    if not possible:
        detail = "the code of the session's rounds runs again: paths into its scratch on a disk are its own"
    layers.append(Layer(LIVE_FORK, possible, False, detail))
    return possible


def _own_user_ids(layers: list[Layer], needed: Sequence[Path]) -> int:
    """The base of the children's user ids, 0 where they keep root's; `needed` must be open to everybody."""
    base, detail = 0, "no right to change it"
    if any(layer.name == "user namespace" for layer in layers):
        detail = "inside a user namespace of its own"
    elif not all(anybody_may_read(path) for path in needed):
        detail = "Python lies in a folder other users cannot enter: the id is kept, without capabilities"
    elif jail.capabilities() >> _CAP_SETGID_SETUID & 3 == 3:
        base, detail = _UID_BASE, f"from {_UID_BASE}"
    layers.append(Layer("own user id", base > 0, False, detail))
    return base


def _limits(config: SandboxConfig, *, has_quota: bool) -> tuple[jail.Limit, ...]:
    # Without a quota, what is deleted while it is open is not seen: there descriptors bound it, too.
    more_files = config.max_files if has_quota else 0
    return jail.limits(
        cpu_s=min(max(1, round(config.timeout_s + 1) * config.session_timeouts), _MOST_SECONDS),
        # What the machinery itself writes is a file to the kernel as well: printed text.
        file_bytes=max(config.scratch_mib << 20, config.max_stdout_bytes),
        open_files=_OPEN_FILES + more_files,
    )
