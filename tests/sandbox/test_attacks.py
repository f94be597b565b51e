"""Each attack once, in the machine's own mode. After each: is the host unharmed, is everything gone, does it work?"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.host import (
    PYTHON_BELOW_TMP,
    Host,
    check_crop,
    children_of,
    eventually,
    open_descriptors,
    resident_kib,
    server_of,
    snippets_of,
)
from thyme.sandbox import Sandbox

_IDS = [f"{a.category}: {a.name}" for a in ATTACKS]


def assault(sandbox: Sandbox, attack: Attack, host: Host, image, *, crop: bool = True) -> None:
    """Runs one attack and checks, from the host's side, that nothing came of it."""
    host_before, image_before = host.facts(), image.tobytes()
    forks = server_of(sandbox)
    descriptors, threads, memory = open_descriptors(), threading.active_count(), resident_kib(forks)
    code = host.fill(attack.code)
    result = sandbox.run(code, image, "/data/photo.jpg")
    assert result.status.name in attack.expected_under(result.isolation), result
    assert "ESCAPED" not in result.stdout, result.stdout
    assert "a secret" not in result.stdout
    assert len(result.stdout.encode()) <= sandbox.config.max_stdout_bytes
    assert result.error is None or len(result.error.message.encode()) <= sandbox.config.max_error_bytes
    assert all(max(i.size) < 20 or i.size != (20, 20) for i in result.images), "the host's picture came back"
    assert host.facts() == host_before
    assert not host.was_called()
    assert image.tobytes() == image_before
    server = {sandbox._client.server.process.pid}
    assert eventually(lambda: len(snippets_of(os.getpid()) & (server | children_of(next(iter(server))))) <= 2)
    assert eventually(lambda: open_descriptors() <= descriptors and threading.active_count() <= threads)
    assert resident_kib(forks) < memory + 4096
    if crop:
        check_crop(sandbox, image)


@pytest.mark.parametrize("attack", ATTACKS, ids=_IDS)
def test_contained(attack: Attack, sandbox: Sandbox, hasty: Sandbox, host: Host, image) -> None:
    assault(hasty if attack.hangs else sandbox, attack, host, image)


def test_no_restart_was_needed(sandbox: Sandbox, hasty: Sandbox) -> None:
    """Runs after the attacks: none of them brought the fork-server down."""
    assert sandbox._client.restarts == 0
    assert hasty._client.restarts == 0


def test_scratch_is_empty_afterwards(sandbox: Sandbox, image) -> None:
    code = (
        "import os\nprint([f for top in ('/mnt/data', '/tmp', '/data') for folder, _, files in os.walk(top) "
        f"if not folder.startswith({PYTHON_BELOW_TMP}) for f in files])"
    )
    assert sandbox.run(code, image, "/data/photo.jpg").stdout in ("['photo.jpg']\n", "[]\n")


def test_list_is_what_it_claims() -> None:
    assert len(set(_IDS)) == len(_IDS)
    assert len({a.category for a in ATTACKS}) >= 12
    assert len(ATTACKS) >= 120


def test_never_imports_torch() -> None:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    code = (
        "import sys; import thyme.sandbox as s; s.Sandbox, s.SandboxConfig; import thyme.sandbox.repair, "
        "thyme.sandbox.doctor\nassert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
