"""Runs attacks as somebody else: `python -m tests.sandbox.inmode MODE` becomes that somebody, starts itself again,
reads [[[name, code, expected statuses, hangs], ...], n] as JSON, runs them and every n-th story of a fork, and prints
what isolates and what went wrong.

Modes: "user", an ordinary user; "bare-user", one without namespaces; "container", what a container gets by default: 14
capabilities and a filter against unshare, setns and mounts; "nothing", neither namespaces nor Landlock.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

from thyme.sandbox import jail

ROOT = Path(__file__).parents[2]
_CONTAINER_CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
_DENIED = {
    "x86_64": (272, 308, 165, 166, 155),
    "aarch64": (97, 268, 40, 39, 41),
}  # unshare setns mount umount2 pivot_root
_PR_CAPBSET_DROP = 24


def _reachable(path: Path) -> bool:
    return all(p.stat().st_mode & 1 for p in (path, *path.parents))


def open_up(paths: list[Path]) -> None:
    """Shows folders that lie below a closed home folder at the same place, in a mount namespace of our own."""
    closed = [p for p in paths if not _reachable(p)]
    if not closed:
        return
    jail.unshare(jail.CLONE_NEWNS)
    jail.mount("none", "/", None, jail.MS_REC | jail.MS_PRIVATE)
    aside = Path(tempfile.mkdtemp(dir="/var/tmp"))
    jail.mount("tmpfs", aside, "tmpfs", 0, "mode=755")
    for number, path in enumerate(closed):
        jail.bind(path, aside / str(number), read_only=False)
    home = next(p for p in reversed(closed[0].parents) if not p.stat().st_mode & 1)
    jail.mount("tmpfs", home, "tmpfs", 0, "mode=755")
    for number, path in enumerate(closed):
        jail.bind(aside / str(number), path, read_only=False)
    jail.unmount(aside)
    aside.rmdir()


def deny_namespaces(*more: int) -> None:
    """A filter like the one containers come with."""
    instructions = [(0x20, 0, 0, 0)]
    for number in (*_DENIED[os.uname().machine], *more):
        instructions += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1)]
    instructions.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0:
        jail.no_new_privs()
    if libc.prctl(22, 2, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def become(mode: str) -> None:
    if os.geteuid() == 0 and mode in ("user", "bare-user"):
        open_up([Path(sys.base_prefix), ROOT])
    if mode in ("container", "bare-user"):
        deny_namespaces()
    if mode == "nothing":
        deny_namespaces(444)  # landlock_create_ruleset
        os.execv(sys.executable, [sys.executable, "-m", "tests.sandbox.inmode", "--run"])
    if os.geteuid() == 0:
        if mode == "container":
            libc = ctypes.CDLL(None)
            for capability in set(range(41)) - _CONTAINER_CAPABILITIES:
                libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        else:
            jail.become(65534)
    os.execv(sys.executable, [sys.executable, "-m", "tests.sandbox.inmode", "--run"])


def run() -> None:
    import numpy as np

    from tests.sandbox.forks import STORIES, differences
    from tests.sandbox.host import picture
    from thyme.sandbox import Sandbox, SandboxConfig

    (cases, step), failures, image = json.load(sys.stdin), [], picture()
    config = {"workers": 2, "memory_mib": 512}
    with (
        Sandbox(SandboxConfig(timeout_s=20.0, **config)) as sandbox,
        Sandbox(SandboxConfig(timeout_s=0.5, **config)) as hasty,
    ):
        for name, code, expected, hangs in cases:
            result = (hasty if hangs else sandbox).run(code, image, "/data/photo.jpg")
            if result.status.name not in expected or "ESCAPED" in result.stdout or "a secret" in result.stdout:
                failures.append((name, str(result)[:500]))
        with sandbox.session(image) as session:
            session.run("im = Image.open(image_path).crop((10, 20, 40, 50))")
            images = session.run("im.save('a.png')").images
        works = len(images) == 1 and np.array_equal(np.asarray(images[0]), np.asarray(image)[20:50, 10:40])
        with Sandbox(SandboxConfig(timeout_s=20.0, **config), _off=frozenset({"fork"})) as again:
            forks = {s.name: found for s in STORIES[::step] if (found := [*differences(s, sandbox, again, image)])}
        layers = {layer.name: layer.ok for layer in sandbox.layers()}
        restarts = sandbox._client.restarts + hasty._client.restarts
    print(
        json.dumps(
            {
                "isolation": sandbox.isolation,
                "layers": layers,
                "failures": failures,
                "works": works,
                "forks": forks,
                "restarts": restarts,
                "uid": os.getuid(),
            }
        )
    )


if __name__ == "__main__":
    run() if sys.argv[1] == "--run" else become(sys.argv[1])
