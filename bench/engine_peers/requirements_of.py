"""Prints what a wheel declares for this Python, one requirement a line, less what is left out (see install.sh)."""

import sys
from zipfile import ZipFile

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

with ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
for line in lines:
    if not line.startswith("Requires-Dist: "):
        continue
    wanted = Requirement(line.removeprefix("Requires-Dist: "))
    if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        # An index serves the CPU build of torch under its plain version.
        print(f"{wanted.name}{extras}{wanted.specifier}".removesuffix("+cpu"))
