"""Run one snippet in the sandbox and show what came back: repairs, output, images, limits, isolation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.result import Result
from thyme.sandbox.config import SandboxConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """A snippet and the sandbox it runs in."""

    file: Path = field(metadata=POSITIONAL)
    """Python as a model would write it."""
    image: Path | None = None
    """The input picture, which the snippet opens as `image_path`."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


def run(config: Config) -> Result:
    """Runs and prints; the exit code says whether the snippet ended well."""
    from thyme.sandbox.doctor import run_file

    came_back = run_file(config.file, config.image, config.sandbox)
    return Result(came_back, 0 if came_back["status"] == "ok" else 1)
