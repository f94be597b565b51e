"""Starts ranks as a user does, with torchrun on this machine, and by hand where a test must see one of them die."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(ranks: int, *command: str, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs `torchrun ... command` to its end; its output is in the result."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, *command], cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=timeout
    )


def start(rank: int, ranks: int, port: int, *command: str) -> subprocess.Popen[str]:
    """One rank, which no launcher looks after."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=_environment() | {name: str(value) for name, value in place.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(paths)}
