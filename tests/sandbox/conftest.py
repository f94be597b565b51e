"""What the sandbox tests share: warm sandboxes and a host to protect."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.sandbox.host import Host, picture
from thyme.sandbox import Sandbox, SandboxConfig


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    # Not below /tmp, which means the scratch to a snippet; and open to everybody: permissions must not protect it.
    folder = Path(tempfile.mkdtemp(prefix="thyme-host-", dir="/var/tmp"))
    folder.chmod(0o777)
    (folder / "secret").write_text("a secret")
    (folder / "secret").chmod(0o666)
    (folder / "canary_module.py").write_text("value = 1\n")
    picture(20, 20).save(folder / "secret.png")
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "listener"))
    (folder / "listener").chmod(0o777)
    unix.listen()
    name = f"thyme-test-{os.getpid()}"
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + name)
    abstract.listen()
    with tcp, udp, unix, abstract:
        yield Host(folder, tcp, udp, unix, abstract, name)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return picture()


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(workers=4, timeout_s=20.0, memory_mib=512)) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def hasty() -> Iterator[Sandbox]:
    """A sandbox with a short time limit."""
    with Sandbox(SandboxConfig(workers=2, timeout_s=0.5, memory_mib=512)) as sandbox:
        yield sandbox
