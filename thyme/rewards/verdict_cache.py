"""What a judge said, in a folder, by what it was asked: nothing is asked twice, over runs and processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)

VERSION = 1
"""Of what is written; another one's files are not found."""


class VerdictCache:
    """One small JSON file for each question that was answered. Several processes may share the folder.

    A file is written whole under another name and then renamed, so that no reader sees a part of one; what cannot be
    read is as if it were not there, and is asked and written again.

    Args:
        folder: is made if it is not there.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._said_full = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"judge.cache {str(folder)!r}: cannot be written to: {error.strerror}") from error

    @staticmethod
    def key(**asked: object) -> str:
        """The name of what was asked, a SHA-256 of all that the answer depends on; values are JSON-able."""
        return hashlib.sha256(json.dumps({"version": VERSION} | asked, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """What the judge said, None where nothing is kept."""
        try:
            kept = json.loads(self._path(key).read_text())["said"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return kept if isinstance(kept, str) else None

    def put(self, key: str, said: str) -> None:
        """Keeps what the judge said; where that fails (a full disk) the log says so once."""
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"said": said}, file)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._said_full:
                _log.warning("judge.cache %s: a verdict is not kept: %s", self._folder, error)
            self._said_full = True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.json"
