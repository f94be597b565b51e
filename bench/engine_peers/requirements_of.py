"""Prints what a wheel declares for this Python, one requirement a line, less what is left out (see install.sh)."""

import sys
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def requirements(path: Path) -> list[str]:
    """Of the wheel at `path`, without its extras'; an index serves the CPU build of torch under its plain version."""
    with ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(name).decode().splitlines()
    found = []
    for line in lines:
        if not line.startswith("Requires-Dist: "):
            continue
        wanted = Requirement(line.removeprefix("Requires-Dist: "))
        if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            found.append(f"{wanted.name}{extras}{wanted.specifier}".removesuffix("+cpu"))
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]))))
