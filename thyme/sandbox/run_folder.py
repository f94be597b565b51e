"""The folder of one client: stored images, scratch folders where they lie on a disk, a canary for the probe."""

# Imports in functions: `shutil` and `tempfile` load compressors, which `preload` keeps out of the fork-server.
from __future__ import annotations

import contextlib
from pathlib import Path

from thyme.sandbox.scratch import wipe


def make_run_folder() -> Path:
    """A new temporary folder with what is in it from the start."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="thyme-sandbox-"))
    try:
        folder.chmod(0o711)
        for name in ("images", "root"):
            (folder / name).mkdir()
            (folder / name).chmod(0o711)
        (folder / "canary").write_text("canary")
    except BaseException:
        remove_run_folder(folder)
        raise
    return folder


def remove_run_folder(folder: Path) -> None:
    """Deletes it as far as that is possible. What snippets made in it is deleted without recursion; never raises."""
    import shutil

    with contextlib.suppress(OSError):
        for slot in (folder / "slots").iterdir():
            for _ in wipe(str(slot)):
                pass
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # still there where no descriptor was left to look into it
        (folder / "canary").unlink(missing_ok=True)
        for place in (folder / "images", folder / "root", folder):
            place.rmdir()
