"""For people: what isolates on this machine, and one snippet run with everything about it shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.result import Layer, SandboxUnavailable


def report() -> list[Layer]:
    """Every layer and probe, tried out. The last entry is the verdict; its `ok` says whether the sandbox would run."""
    from thyme.sandbox.pool import Sandbox

    try:
        with Sandbox(SandboxConfig(workers=1, memory_mib=256)) as sandbox:
            return [*sandbox.layers(), Layer("sandbox", True, True, f"isolation is {sandbox.isolation!r}")]
    except SandboxUnavailable as error:
        return [*error.layers, Layer("sandbox", False, True, str(error).splitlines()[0])]


def run_file(
    path: str | os.PathLike[str], image: str | os.PathLike[str] | None = None, config: SandboxConfig | None = None
) -> dict[str, Any]:
    """Runs the snippet in a file and prints fixes, output, images, limits used and isolation.

    Images are saved beside the snippet, as <name>.out<n>.png.

    Returns:
        The same for programs.

    Raises:
        ValueError: the snippet or the image cannot be read.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from thyme.sandbox.pool import Sandbox

    source = Path(path)
    try:
        code = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"snippet {str(source)!r} cannot be read: {error}") from error
    console = Console(highlight=False)
    with Sandbox(config) as sandbox:
        limits = sandbox.config
        result = sandbox.run(code, image)
    for fix in result.fixes:
        console.print(Text(f"fixed    {fix}", style="yellow"))
    if result.stdout:
        console.print(Text(result.stdout.rstrip("\n")))
    if result.error is not None:
        where = f" (line {result.error.line})" if result.error.line else ""
        console.print(Text(f"{result.error.type}: {result.error.message}{where}", style="red"))
    targets = [source.with_suffix(f".out{number}.png") for number in range(1, len(result.images) + 1)]
    for target, picture in zip(targets, result.images, strict=True):
        picture.save(target)
        console.print(Text(f"image    {target} ({picture.width}x{picture.height})", style="green"))
    table = Table("status", "wall", "cpu", "peak memory", "isolation")
    table.add_row(
        result.status.name,
        f"{result.wall_s:.3f} of {limits.timeout_s:g} s",
        f"{result.cpu_s:.3f} s",
        f"{f'{result.peak_mib:.0f} MiB' if result.peak_mib else 'not known'} "
        f"(limit {limits.memory_mib} MiB more than the warm interpreter)",
        result.isolation,
    )
    console.print(table)
    return {
        "status": result.status.value,
        "stdout": result.stdout,
        "error": None if result.error is None else result.error._asdict(),
        "repairs": [str(fix) for fix in result.fixes],
        "images": targets,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "peak_mib": result.peak_mib,
        "isolation": result.isolation,
    }
