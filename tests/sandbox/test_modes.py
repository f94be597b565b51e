"""The same jail as root, as root without namespaces, as an ordinary user, in a container; and with one layer missing.

Each mode runs a few attacks by default and all of them in the soak. A mutation switches a layer off and names attacks
that must then succeed: were they still refused, the list would not be testing that layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.host import Host, check_crop, picture, without_python
from tests.sandbox.test_attacks import assault
from thyme.sandbox import Sandbox, SandboxConfig, Status

ROOT = Path(__file__).parents[2]
BY_NAME = {f"{a.category}: {a.name}": a for a in ATTACKS}
# one per mechanism that a mode could lose
SMOKE = [
    "read: open a host file",
    "read: passwd",
    "read: list a host folder",
    "write: overwrite a host file",
    "write: truncate while opening to read",
    "write: overwrite the input image",
    "network: tcp",
    "network: udp",
    "network: unix socket",
    "network: abstract socket",
    "process: fork",
    "process: thread",
    "process: kill the owner",
    "process: kill everybody",
    "kernel: unshare",
    "kernel: mount",
    "kernel: io_uring",
    "native: writable and executable memory",
    "memory: bytes",
    "time: busy loop",
    "disk: many big files",
    "disk: deep tree",
    "protocol: early exit",
    "protocol: shrinks the shared memory",
]
# under the emulations the listed folder is open to everybody on purpose
MODES = {"user": "full", "bare-user": "strong", "container": "strong"}


def storm(mode: str, attacks: list[Attack], host: Host, *, every: int) -> dict:
    cases = [
        (
            f"{a.category}: {a.name}",
            host.fill(a.code) if "{" in a.code else a.code,
            a.expected_under(MODES[mode]),
            a.hangs,
        )
        for a in attacks
    ]
    before = host.facts()
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandbox.inmode", mode],
        input=json.dumps([cases, every]),
        text=True,
        capture_output=True,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert host.facts() == before
    assert not host.was_called()
    return json.loads(done.stdout)


def judge(report: dict, mode: str) -> None:
    assert report["failures"] == []
    assert report["works"]
    assert report["forks"] == {}
    assert report["layers"]["live fork"] == (MODES[mode] == "full")
    assert report["restarts"] == 0
    assert report["isolation"] == MODES[mode]
    assert all(ok for name, ok in report["layers"].items() if name.startswith("probe"))


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, host: Host) -> None:
    judge(storm(mode, [BY_NAME[name] for name in SMOKE], host, every=5), mode)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_mode_with_every_attack(mode: str, host: Host) -> None:
    judge(storm(mode, ATTACKS, host, every=1), mode)


@pytest.fixture(scope="module")
def plain() -> Iterator[Sandbox]:
    """Landlock, seccomp and limits only."""
    config = SandboxConfig(workers=2, timeout_s=2.0, memory_mib=512, scratch_mib=32)
    with Sandbox(config, _off=frozenset({"namespaces"})) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", SMOKE)
def test_plain(name: str, plain: Sandbox, host: Host, image) -> None:
    assert plain.isolation == "strong"
    assault(plain, BY_NAME[name], host, image)


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS, ids=list(BY_NAME))
def test_plain_with_every_attack(attack: Attack, plain: Sandbox, host: Host, image) -> None:
    assault(plain, attack, host, image)


def test_plain_is_the_same_to_the_snippet(plain: Sandbox, sandbox: Sandbox, image) -> None:
    """Paths, folders and messages do not show how a snippet is jailed: rollouts stay reproducible across machines."""
    code = (
        "print(os.getcwd(), temp_output_dir, sorted(os.listdir('/mnt/data')))\nprint(os.path.abspath('x'))\n"
        "open('/tmp/a', 'w').close(); print(os.listdir('/tmp'), os.path.exists('/tmp/a'))\n"
        "Image.open(image_path).save('/mnt/data/b.png'); print('/mnt/data/b.png')\nopen('missing')"
    )
    one, other = (s.run(code, image, "/data/photo.jpg") for s in (sandbox, plain))
    assert (without_python(one.stdout), one.error, one.fixes) == (other.stdout, other.error, other.fixes)
    assert one.images == other.images and len(one.images) == 1


def test_plain_keeps_to_its_disk_quota(plain: Sandbox) -> None:
    result = plain.run("for i in range(60): open(f'{i}', 'wb').write(b'x' * (4 << 20))\nimport time\ntime.sleep(1.5)")
    assert result.status is Status.OUTPUT_LIMIT, result


# --- mutations -------------------------------------------------------------------------------------------------------

# what is off -> attacks that must then succeed
MUTATIONS = {
    frozenset({"seccomp"}): [
        "network: vsock",
        "network: netlink",
        "process: thread",
        "process: fork",
        "kernel: inotify",
        "memory: memfd outside the limit",
        "native: writable and executable memory",
    ],
    frozenset({"seccomp", "namespaces"}): ["network: udp", "network: ipv6"],
    frozenset({"landlock"}): ["read: walk up from the working folder"],
    frozenset({"landlock", "namespaces"}): [
        "read: passwd",
        "read: open a host file",
        "read: list a host folder",
        "read: own memory map",
        "read: import from a host folder",
    ],
}


def escapes(result) -> bool:
    return "ESCAPED" in result.stdout


@pytest.mark.parametrize(("off", "names"), MUTATIONS.items(), ids=["+".join(sorted(off)) for off in MUTATIONS])
def test_each_layer_is_needed(off: frozenset[str], names: list[str], host: Host) -> None:
    with Sandbox(SandboxConfig(workers=1, timeout_s=5.0, memory_mib=512), _off=off) as sandbox:
        held = [n for n in names if not escapes(sandbox.run(host.fill(BY_NAME[n].code), picture()))]
        failed = [layer.name for layer in sandbox.layers() if layer.name.startswith("probe") and not layer.ok]
    while host.was_called():  # what got through this time
        host.udp.recv(100)
    assert held == []
    assert failed or off == {"landlock"}, "probing must notice the missing layer, too"


def test_limits_are_needed() -> None:
    code = "import numpy as np\nx = np.empty(1 << 30, 'u1')\nprint('ESCAPED')"
    config = SandboxConfig(workers=1, memory_mib=512)
    with Sandbox(config) as sandbox:
        assert sandbox.run(code).status is Status.MEMORY
    with Sandbox(config, _off=frozenset({"limits"})) as sandbox:
        assert escapes(sandbox.run(code))


def test_capabilities_are_needed() -> None:
    with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=frozenset({"capabilities", "uid"})) as sandbox:
        assert not next(layer for layer in sandbox.layers() if layer.name == "probe: hold a capability").ok


def test_refuses_without_the_core() -> None:
    """What a machine without Landlock and namespaces gets: a refusal that names each probe, its errno and a remedy."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandbox.inmode", "nothing"],
        input="[[], 1]",
        text=True,
        capture_output=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode != 0
    assert "SandboxUnavailable: this machine cannot isolate model-written code (landlock" in done.stderr
    assert "FAIL landlock: [Errno 1]" in done.stderr and "CONFIG_LSM" in done.stderr
    assert "FAIL probe: read /etc/passwd: NOT refused" in done.stderr
    assert "isolation='none'" in done.stderr


def test_isolation_none_only_by_name_and_stamped(image) -> None:
    with (
        pytest.warns(RuntimeWarning, match="isolation is 'none'"),
        Sandbox(SandboxConfig(workers=1, memory_mib=512, timeout_s=1.0, isolation="none")) as sandbox,
    ):
        assert sandbox.run("print(1)").isolation == sandbox.isolation == "none"
        assert sandbox.run("while True: pass").status is Status.TIMEOUT
        assert sandbox.run("b'x' * (1 << 36)").status is Status.MEMORY
        check_crop(sandbox, image)
