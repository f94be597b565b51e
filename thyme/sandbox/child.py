"""The process a snippet runs in: jailed before this begins (birth.py), it reads code, has it run, and answers.

It lives as long as its session, and is never used for another. All of it is untrusted: the client believes nothing of
what this process says about itself beyond its own snippet.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH112, PTH113
from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import warnings
from typing import NoReturn

import numpy as np

from thyme.sandbox import checkpoint, paths
from thyme.sandbox.birth import CODE, SOCKET, STDOUT, make_places, places_of
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.errand import Errand, decode
from thyme.sandbox.interpreter import Interpreter, Job
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.repair import repair
from thyme.sandbox.root import INPUT
from thyme.sandbox.stdout import make_ahead

_FRAME_BYTES = 24 * 1024
_REHEARSALS = 20
"""The interpreter specialises a function at its eighth call, and what that calls in turn some calls later."""

_USUAL = """\
import io, os, numpy as np
picture = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
for kind in ("BMP", "JPEG", "PNG"):
    picture.save(file := io.BytesIO(), kind)
    opened = Image.open(io.BytesIO(file.getvalue()))
    turned = opened.crop((8, 8, 40, 40)).resize((64, 64), Image.LANCZOS).rotate(7, expand=True)
    turned.convert("RGB").save(io.BytesIO(), kind)
    np.asarray(turned).mean(axis=(0, 1))
print(1)
"""
"""What snippets do. An input image is stored as BMP."""
_REHEARSED = Errand(image_path="image.png", place="/image.png").encode()

# What runs between snippets must not depend on names a snippet can replace by accident (`os._exit = ...` and the like).
_exit, _read, _write, _pread = os._exit, os.read, os.write, os.pread
_encode = json.JSONEncoder(ensure_ascii=False).encode


def live(note: bytes, message: bytes, *, plan: JailPlan, config: SandboxConfig) -> NoReturn:
    """A child's life in Python, which begins once it is jailed and has its order (birth.py).

    Args:
        note: the folder of the scratch, where it is on a disk; else empty.
        message: its errand.
        plan: what the machine offers.
        config: the limits.
    """
    serve(_job(decode(message), note.decode() or None, plan), config)


def _job(errand: Errand, scratch: str | None, plan: JailPlan) -> Job:
    image_path, place, folder, file, image_format, more_images, seed = errand
    places, more = places_of(scratch), {}
    if file is not None:
        if scratch is None:
            file = place if os.path.isfile(place) else INPUT
            more = {path: there for path, there, _ in more_images}
        else:
            file = f"{plan.images}/{file}"
            more = {path: f"{plan.images}/{stored}" for path, _, stored in more_images}
        if folder is not None and (scratch is not None or os.path.isdir(folder)):
            places[folder] = folder if scratch is None else scratch + "/input"
    return Job(places, image_path, file, image_format, seed, more)


def rehearse(scratch: str | None, plan: JailPlan, config: SandboxConfig) -> None:
    """Runs a snippet of ours as if it had been ordered, in a namespace and with an output that are thrown away. Leaves
    nothing behind that a snippet could tell."""
    names = ("stdin", "stdout", "stderr", "__stdout__", "__stderr__")
    streams, main = [getattr(sys, name) for name in names], sys.modules["__main__"]
    frame = Interpreter(_job(decode(_REHEARSED), scratch, plan), config).run(_USUAL)
    _encode(frame)
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
            if order == checkpoint.ORDER:
                if not checkpoint.fork(interpreter):
                    break
                continue
            frame = interpreter.run(_pread(CODE, int(order), 0).decode("utf-8", "replace"))
            sent = _encode(frame).encode("utf-8", "replace")
            if len(sent) > _FRAME_BYTES:
                frame["fixes"] = []
                sent = _encode(frame).encode("utf-8", "replace")
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


def warm_up(scratch: str | None, plan: JailPlan, config: SandboxConfig) -> None:
    """Rehearses in the fork-server until the interpreter has specialised the code around a snippet and filled its free
    lists: every child is born with that, instead of doing it over on pages copied for the purpose."""
    if scratch is not None:
        make_places(scratch)
    for _ in range(_REHEARSALS):
        rehearse(scratch, plan, config)
    make_ahead(config.max_stdout_bytes)
