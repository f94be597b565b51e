"""Files of lines that a killed run may have left in the middle of one."""

import os
from pathlib import Path

_CHUNK = 1 << 16


def cut_to_whole_lines(path: Path) -> None:
    """Cuts off what stands behind the last line's end, of which alone it reads. No file is no lines."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)
