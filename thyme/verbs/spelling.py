"""What the tokens of a run spell: the tokenizer of its checkpoints, or of the model that it started from."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from thyme.verbs.config import EMBEDDED

if TYPE_CHECKING:
    from thyme.report.run_folder import RunFolder


class RunSpelling:
    """What a token id adds to the text. The tokenizer is loaded when the first is asked for.

    Args:
        source: a model's folder, or "tiny" for the embedded one.
    """

    def __init__(self, source: Path | str) -> None:
        self._source = source
        self._table: list[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, token: int) -> bytes:
        """
        Raises:
            ValueError: an id outside of the vocabulary, or a tokenizer that cannot be read.
        """
        with self._lock:
            if self._table is None:
                self._table = self._load()
        if not 0 <= token < len(self._table):
            raise ValueError(f"token id {token} is outside the vocabulary of {len(self._table)}")
        return self._table[token]

    def _load(self) -> list[bytes]:
        from tokenizers import Tokenizer

        from thyme.model.token_table import token_table
        from thyme.toy.tokenizer import toy_backend

        if self._source == EMBEDDED:
            return token_table(toy_backend())
        file = Path(self._source) / "tokenizer.json"
        try:
            return token_table(Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{file}: {error}") from error


def open_run(folder: Path, model: Path | None = None) -> RunFolder:
    """The run, its tokens spelled where a tokenizer is found.

    Args:
        folder: `runs/<name>`.
        model: whose tokenizer drew the tokens; None: a checkpoint of the run, else the model that its config names.

    Raises:
        FileNotFoundError, ValueError: no run, or no model.
    """
    from thyme.report.run_folder import RunFolder

    if model is not None and not (model / "tokenizer.json").is_file():
        raise FileNotFoundError(f"model {model}: no tokenizer.json: give the folder of the model that drew the tokens")
    source = model or _source(folder)
    if source is None:
        why = "the run has no checkpoint, and its config names no model that is there (--model names one)"
        return RunFolder(folder, why_unspelled=why)
    return RunFolder(folder, spelling=RunSpelling(source))


def _source(folder: Path) -> Path | str | None:
    saved = sorted(path.parent for path in (folder / "checkpoints").glob("*/tokenizer.json"))
    if saved:
        return saved[-1]
    try:
        named = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        return None
    if named == EMBEDDED:
        return EMBEDDED
    return Path(named) if isinstance(named, str) and (Path(named) / "tokenizer.json").is_file() else None
