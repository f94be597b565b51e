"""What this machine offers to jail with: found out by doing it, noted layer by layer, the same for every child."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thyme.sandbox import jail
from thyme.sandbox.config import BYTES_PER_PIXEL, SandboxConfig
from thyme.sandbox.preload import anybody_may_read
from thyme.sandbox.protocol import Setup
from thyme.sandbox.result import Layer

_UID_BASE = 1_900_000_000
_OPEN_FILES = 64
_DEVICES = (Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom"))
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
    seccomp: jail.SeccompFilter | None
    """None without."""
    rooted: bool
    """The fork-server lives in a read-only root of its own, and scratch folders have a quota."""
    private_mounts: bool
    """Each child gets a mount namespace with a tmpfs of its own at /mnt/data. Only where Landlock does not keep the
    slots apart: taking mounts down waits for the kernel's RCU, about 10 ms a snippet."""
    drop: bool
    """Capabilities are emptied."""
    uid_base: int
    """The child becomes uid_base + slot; 0 keeps the identity."""
    limits: tuple[jail.Limit, ...]
    images: str
    """The folder where the stored images lie."""
    slots: str
    """The folder where the scratch folders lie."""

    def ruleset(self, scratch: str) -> int:
        """The Landlock ruleset of one child (a descriptor): what all may read, and its scratch. -1 without Landlock."""
        if not self.abi:
            return -1
        own = jail.landlock_rule(scratch, self.abi, writable=True)
        try:
            return jail.landlock_ruleset(self.abi, (*self.readable, own))
        finally:
            jail.landlock_close(own)

    def allow(self, ruleset: int, file: str) -> None:
        """Lets a child read one file more: its image."""
        rule = jail.landlock_rule(file, self.abi)
        try:
            jail.landlock_add(ruleset, rule)
        finally:
            jail.landlock_close(rule)


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


def holds(layers: Sequence[Layer], name: str) -> bool:
    """Whether the layer of this name is there and in place."""
    return any(layer.name == name and layer.ok for layer in layers)


def make_plan(setup: Setup, layers: list[Layer], readable: Sequence[Path], mapped_bytes: int) -> JailPlan:
    """Tries what this machine offers beyond namespaces and notes each layer. Changes the root of the process.

    Args:
        setup: the client's wishes.
        layers: what holds so far; what is found here is appended.
        readable: files and folders that every child may read.
        mapped_bytes: address space of the warm interpreter, which a child's memory limit comes on top of.
    """
    isolated, off = setup.config.isolation == "auto", setup.off
    rooted = holds(layers, "mount namespace") and _change_root(setup.run_dir, readable, layers)
    abi = _landlock_abi(layers, rooted) if isolated and "landlock" not in off else 0
    seccomp = _seccomp_filter(layers) if isolated and "seccomp" not in off else None
    uid_base = 0
    if isolated and os.geteuid() == 0 and "uid" not in off:
        uid_base = _own_user_ids(layers, readable if rooted else (*readable, setup.run_dir))
    return JailPlan(
        abi=abi,
        readable=tuple(jail.landlock_rule(path, abi) for path in (*readable, *_DEVICES)) if abi else (),
        null=os.open("/dev/null", os.O_RDWR),
        seccomp=seccomp,
        rooted=rooted,
        private_mounts=rooted and not abi,
        drop=isolated and "capabilities" not in off,
        uid_base=uid_base,
        limits=_limits(
            setup.config, None if "limits" in off else mapped_bytes, has_quota=holds(layers, "private root")
        ),
        images="/images" if rooted else str(setup.run_dir / "images"),
        slots="/slots" if rooted else str(setup.run_dir / "slots"),
    )


def _change_root(run_dir: Path, readable: Sequence[Path], layers: list[Layer]) -> bool:
    before = os.umask(0o022)
    try:
        jail.change_root(run_dir / "root", readable, [(run_dir / "images", "/images")])
    except OSError as error:
        layers.append(Layer("private root", False, False, str(error)))
        return False
    finally:
        os.umask(before)
    detail = "read-only root without /proc, /etc or homes; scratch in memory"
    layers.append(Layer("private root", True, False, detail))
    return True


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


def _limits(config: SandboxConfig, mapped_bytes: int | None, *, has_quota: bool) -> tuple[jail.Limit, ...]:
    # Without a quota, what is deleted while it is open is not seen: there descriptors bound it, too.
    more_files = config.max_files if has_quota else 0
    return jail.limits(
        address_space=resource.RLIM_INFINITY if mapped_bytes is None else mapped_bytes + (config.memory_mib << 20),
        cpu_s=max(1, round(config.timeout_s + 1) * config.session_timeouts),
        # What the machinery itself writes is a file to the kernel as well: printed text, and the pixels of results.
        file_bytes=max(config.scratch_mib << 20, config.max_stdout_bytes, config.max_pixels * BYTES_PER_PIXEL),
        open_files=_OPEN_FILES + more_files,
    )
