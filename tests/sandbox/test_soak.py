"""The long form: thousands of snippets among attacks, and random system calls."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.sandbox.attacks import ATTACKS
from tests.sandbox.host import (
    Host,
    check_crop,
    eventually,
    open_descriptors,
    resident_kib,
    server_of,
    snippets_of,
)
from thyme.sandbox import Sandbox, SandboxConfig, Status

pytestmark = pytest.mark.soak

# Attacks that only end by a limit take turns at whole seconds of two cores; the rest of the list is what storms.
_QUICK = [
    a for a in ATTACKS if not a.hangs and a.category not in ("memory", "disk", "parser") and "while True" not in a.code
]


def test_five_thousand_snippets(host: Host, image) -> None:
    """5,000 snippets, a tenth of them attacks, 32 callers: nothing wrong, nothing grown, nobody left."""
    pixels = np.asarray(image)
    before = host.facts()
    with Sandbox(SandboxConfig(workers=4, memory_mib=512, timeout_s=30.0)) as sandbox:
        check_crop(sandbox, image)
        server = server_of(sandbox)
        descriptors, threads, memory = open_descriptors(), threading.active_count(), resident_kib(server)

        def one(number: int) -> str:
            draw = random.Random(number)
            if draw.random() < 0.1:
                attack = draw.choice(_QUICK)
                result = sandbox.run(host.fill(attack.code), image, "/data/photo.jpg")
                wrong = result.status.name not in attack.expected or "ESCAPED" in result.stdout
                return f"{attack.name}: {result}"[:300] if wrong else ""
            x, y = draw.randrange(60), draw.randrange(40)
            with sandbox.session(image) as session:
                session.run(f"x, y = {x}, {y}\nprint({number})")
                result = session.run("Image.open(image_path).crop((x, y, x + 50, y + 30)).save('a.png'); print(x, y)")
            right = result.stdout == f"{x} {y}\n" and len(result.images) == 1
            right = right and np.array_equal(np.asarray(result.images[0]), pixels[y : y + 30, x : x + 50])
            return "" if right else f"{number}: {result}"[:300]

        with ThreadPoolExecutor(32) as callers:
            wrong = [w for w in callers.map(one, range(5000)) if w]
        assert wrong == []
        assert sandbox._client.restarts == 0
        assert sandbox._client.rounds.num_running == 0 and not sandbox._client.rounds.waiting
        assert eventually(lambda: not sandbox._client.rounds.live)
        assert eventually(lambda: open_descriptors() <= descriptors)
        assert eventually(lambda: threading.active_count() <= threads)
        assert resident_kib(server) < memory + 8192
        assert eventually(lambda: len(snippets_of(sandbox._client.server.process.pid)) <= 1)
        left = sandbox.run("import os\nprint(sum(len(f) for _, _, f in os.walk('/mnt/data')))")
        assert left.stdout == "0\n"
    assert host.facts() == before
    assert not host.was_called()


_FUZZ = """
import ctypes, random, time
libc = ctypes.CDLL(None)
rng = random.Random({seed})
buffers = [ctypes.create_string_buffer(4096) for _ in range(4)]
values = [0, 1, 2, 3, 4, 5, 6, -1, -100, 4096, 1 << 20, 1 << 31, 1 << 40] + [ctypes.addressof(b) for b in buffers]
until = time.monotonic() + {seconds}
skip = {{1, 18, 20, 296, 328, 40, 326, 32, 33, 292, 60, 231, 35, 230, 23, 7, 270, 271, 34, 0, 19, 17, 202, 3, 436}}
skip |= {{11, 10, 25, 12, 13, 14, 131, 15}}  # what ends or blocks the child at once
while time.monotonic() < until:
    for _ in range(200):
        number = rng.randrange(470)
        if number in skip:
            continue
        libc.syscall(*[ctypes.c_long(x) for x in (number, *(rng.choice(values) for _ in range(6)))])
"""


def test_random_system_calls(host: Host, image) -> None:
    """Thirty seconds of random numbers and arguments: whatever becomes of the child, the sandbox answers."""
    before = host.facts()
    with Sandbox(SandboxConfig(workers=2, memory_mib=512, timeout_s=8.0)) as sandbox:
        until, seed = time.monotonic() + 30.0, 0
        while time.monotonic() < until:
            seed += 1
            result = sandbox.run(_FUZZ.format(seed=seed, seconds=3), image)
            assert result.status is not Status.REFUSED, result
            check_crop(sandbox, image)
        assert sandbox._client.restarts == 0
    assert host.facts() == before
    assert not host.was_called()
