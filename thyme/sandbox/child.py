"""The process a snippet runs in: puts the jail on, then reads code, has it run, and answers.

It is forked from the fork-server, lives as long as its session, and is never used for another. Everything after
`confine` is untrusted: the client believes nothing of what this process says about itself beyond its own snippet.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH102, PTH112, PTH113
from __future__ import annotations

import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from thyme.sandbox import jail, paths
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.interpreter import Interpreter, Job
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.protocol import MESSAGE_BYTES, Order
from thyme.sandbox.repair import repair
from thyme.sandbox.result_images import PIXELS
from thyme.sandbox.root import INPUT, Image
from thyme.sandbox.slots import Place
from thyme.sandbox.stdout import STDOUT
from thyme.sandbox.template import Birth

SOCKET, CODE = 3, 5
"""Where the session socket and the code lie once the order is there; STDOUT is 1, PIXELS is 4."""
CHANNEL = 3
"""Where the socket to the fork-server lies until then."""
_FRAME_BYTES = 24 * 1024
_MAX_FD = 1 << 16
_REHEARSALS = 20
"""The interpreter specialises a function at its eighth call, and what that calls in turn some calls later."""

# What runs between snippets must not depend on names a snippet can replace by accident (`os._exit = ...` and the like).
_exit, _read, _write, _pread = os._exit, os.read, os.write, os.pread
_dumps = json.dumps


def prepare(
    place: Place,
    plan: JailPlan,
    config: SandboxConfig,
    *,
    kept: Sequence[int],
    ruleset: int,
    image: Image | None = None,
    more: Sequence[Image] = (),
    report_to: int = -1,
) -> None:
    """Puts on the layers that need no order, so that a child may do it while it waits for one.

    Args:
        place: its slot and scratch folder.
        plan: what the machine offers.
        config: the limits.
        kept: descriptors that stay, as 3, 4, ...; 0, 1 and 2 become /dev/null, all others are closed.
        ruleset: what Landlock allows all children; the child's own scratch is added. -1 without Landlock.
        image: the input image, where the child gets a root of its own and knows of the image.
        more: further images, likewise.
        report_to: a socket, which gets the mount namespace of a child that has a root of its own; -1 without.

    Raises:
        OSError: a layer cannot be put on.
    """
    jail.set_name("thyme-parked")
    uid = plan.uid_of(place.slot)
    if plan.root is not None:
        plan.root.build(config, uid, image, more)
        plan.allow(ruleset, paths.DATA, writable=True)
        plan.allow(ruleset, paths.TMP, writable=True)
        for shown in (*more, *filter(None, [image])):
            plan.allow_image(ruleset, shown)
        if report_to >= 0:
            namespace = plan.root.own_namespace()
            with socket.socket(fileno=os.dup(report_to)) as server:
                socket.send_fds(server, [b"ready"], [namespace])
    # first out of the way, then into place: a source may sit where another belongs
    sources = [os.dup(fd) for fd in (plan.null, plan.null, plan.null, *kept)]
    for number, source in enumerate(sources):
        os.dup2(source, number, inheritable=False)
    os.closerange(3 + len(kept), _MAX_FD)
    jail.limit(plan.limits)
    if uid:
        jail.become(uid)
    jail.die_with_parent()
    jail.no_new_privs()
    jail.not_dumpable()
    if plan.drop:
        jail.drop_capabilities()
    if place.scratch is not None:
        make_places(place.scratch)
    os.chdir(_places(place)[paths.DATA] + paths.HOME_BELOW)


def make_places(scratch: str) -> None:
    """Makes the folders of a scratch on a disk."""
    for name in ("/data", "/data" + paths.HOME_BELOW, "/tmp", "/input"):
        os.mkdir(scratch + name, 0o700)


def _places(place: Place) -> dict[str, str]:
    """The folders of the scratch as snippets know them -> where they are, but the folder of the image."""
    if place.scratch is None:
        return {paths.DATA: paths.DATA, paths.TMP: paths.TMP}
    return {paths.DATA: place.scratch + "/data", paths.TMP: place.scratch + "/tmp"}


def confine(plan: JailPlan, ruleset: int) -> None:
    """Puts on the layers that come last: which files (-1: without Landlock), then which system calls."""
    if ruleset >= 0:
        jail.landlock_restrict(ruleset)
    if plan.seccomp is not None:
        plan.seccomp.install()


def live(birth: Birth, descriptors: Sequence[int], *, plan: JailPlan, config: SandboxConfig) -> NoReturn:
    """A child's life: half of the jail, the wait for an order, the other half, the snippets.

    Nothing untrusted is read before `confine`: up to the order the child has seen only what the fork-server made, and
    the order, which the fork-server hands on, brings the first descriptor that leads to code.

    Args:
        birth: its place, and the image where that is known.
        descriptors: the socket to the fork-server and, with Landlock, the ruleset, which the fork-server has as well
            and sends again. One message comes over the socket: the client's order, with stdout, session socket, pixels,
            code and the ruleset. Its end without a message is the fork-server's.
        plan: what the machine offers.
        config: the limits.
    """
    place, (channel, *rest) = birth.place, descriptors
    ruleset = rest[0] if rest else -1
    report_to = channel if birth.early else -1
    prepare(
        place, plan, config, kept=[channel], ruleset=ruleset, image=birth.image, more=birth.more, report_to=report_to
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, CHANNEL) as server:
        if birth.early and not select.select([server], [], [], 0)[0]:
            rehearse(_places(place), config)
        message, received, _, _ = socket.recv_fds(server, MESSAGE_BYTES, 5)
    if len(received) < 4:
        _exit(0)
    jail.set_name("thyme-snippet")
    confine(plan, received[4] if len(received) > 4 else -1)
    for number, source in zip((STDOUT, SOCKET, PIXELS, CODE), received[:4], strict=True):
        os.dup2(source, number, inheritable=False)
    os.closerange(CODE + 1, _MAX_FD)
    serve(_job(json.loads(message), place, plan), config)


def _job(order: Order, place: Place, plan: JailPlan) -> Job:
    places, file = _places(place), order["image_file"]
    more = dict(order["more_images"])
    folder = plan.folder_of_image(order["image_path"]) if file else None
    if place.scratch is None:
        told = paths.place_of(order["image_path"])
        file = file and (told if os.path.isfile(told) else INPUT)
        if folder is not None and os.path.isdir(folder):
            places[folder] = folder
        more = {path: paths.place_of(path) for path in more}
    else:
        file = file and f"{plan.images}/{file}"
        more = {path: f"{plan.images}/{stored}" for path, stored in more.items()}
        if folder is not None:
            places[folder] = place.scratch + "/input"
    return Job(
        places=places,
        image_path=order["image_path"],
        image_file=file,
        image_format=order["image_format"],
        more_images=more,
        seed=order["seed"],
    )


def rehearse(places: Mapping[str, str], config: SandboxConfig) -> None:
    """Runs a snippet of ours as if it had been ordered, in a namespace and with an output that are thrown away. In a
    parked child the pages it writes to are copied now and not while somebody waits. Leaves nothing behind that a
    snippet could tell."""
    names = ("stdin", "stdout", "stderr", "__stdout__", "__stderr__")
    streams, main = [getattr(sys, name) for name in names], sys.modules["__main__"]
    job = Job(places=places, image_path="image.png", image_file=None, image_format=None, seed=0)
    frame = Interpreter(job, config).run("print(1)")
    _dumps(frame, ensure_ascii=False)
    paths.use(None)
    sys.modules["__main__"] = main
    for name, stream in zip(names, streams, strict=True):
        setattr(sys, name, stream)
    assert frame["status"] == "ok", frame


def serve(job: Job, config: SandboxConfig) -> NoReturn:
    """Runs snippets until the client hangs up. Never returns."""
    code = 0
    try:
        if job.seed:
            seed(job.seed)
        interpreter = Interpreter(job, config)
        while order := _read(SOCKET, 32):
            frame = interpreter.run(_pread(CODE, int(order), 0).decode("utf-8", "replace"))
            sent = _dumps(frame, ensure_ascii=False).encode("utf-8", "replace")
            if len(sent) > _FRAME_BYTES:
                frame["fixes"] = []
                sent = _dumps(frame, ensure_ascii=False).encode("utf-8", "replace")
            _write(SOCKET, sent)
    except BaseException as problem:  # what is left of a process whose snippet broke the machinery
        code = 3
        _write(STDOUT, f"[the sandbox process failed: {problem!r:.500}]".encode())
    finally:
        _exit(code)


def seed(number: int) -> None:
    """Seeds what snippets draw from."""
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)


def set_up() -> None:
    """Sets up in the fork-server what every snippet starts from, and loads what the first would otherwise pay for."""
    importlib.import_module("autopep8")
    repair("if True:\nprint(np.zeros(3))", image_path="image.png", image_size=(8, 8))
    sys.argv = ["snippet.py"]
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    seed(0)


def warm_up(place: Place, plan: JailPlan, config: SandboxConfig) -> None:
    """Rehearses in the fork-server until the interpreter has specialised the code around a snippet and filled its free
    lists: every child is born with that, instead of doing it over on pages copied for the purpose."""
    if place.scratch is not None:
        make_places(place.scratch)
    for _ in range(_REHEARSALS):
        if plan.root is not None:
            plan.root.rehearse(config, plan.uid_of(place.slot))
        rehearse(_places(place), config)
