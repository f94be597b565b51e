"""Which files rows are read from, and which kind each is."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

from thyme.data.tables.json_array import JsonArray
from thyme.data.tables.json_lines import JsonLines
from thyme.data.tables.parquet import Parquet
from thyme.data.tables.table import Table

_HEAD_BYTES = 4096

SUFFIXES = (".parquet", ".jsonl", ".json")

_FILES = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def data_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files, with folders replaced by the *.parquet, *.jsonl and *.json in and below them, and patterns such as
    data/2round-*.parquet by what they match, each sorted.

    Raises:
        ValueError: a path that is not there, a pattern that matches nothing, a folder without such files, a file named
            twice.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists() and any(mark in str(path) for mark in "*?["):
            matching = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matching:
                raise ValueError(f"data file {path}: no file matches the pattern")
            found += matching
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and _is_shown(p, path))
            if not inside:
                raise ValueError(f"data folder {path}: holds no {', '.join('*' + suffix for suffix in SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"data file {path}: no such file")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise ValueError(f"data file {path}: named twice: its rows would count double")
        seen.add(path.resolve())
    return found


def open_table(path: Path) -> Table:
    """A file as a table; what it is, its first bytes tell.

    Raises:
        ValueError: it is neither parquet nor JSON lines nor one JSON array, or damaged; or it is parquet and pyarrow is
            not installed.
    """
    if not path.is_file():
        raise ValueError(f"data file {path}: no such file" if not path.is_dir() else f"data file {path}: is a folder")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return Parquet(path)
    for magic, name in _FILES.items():
        if head.startswith(magic):
            raise ValueError(f"data file {path}: is a {name} file: give parquet, or one JSON object a line in UTF-8")
    if path.suffix.lower() in (".tsv", ".csv"):
        raise ValueError(f"data file {path}: is a table of text: give parquet, or one JSON object a line")
    if path.suffix.lower() == ".parquet":
        raise ValueError(f"data file {path}: is no parquet file: download it again")
    return JsonArray(path) if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[") else JsonLines(path)


def count_rows(paths: Iterable[Path]) -> int | None:
    """How many rows files have, told by the end of each parquet and the line ends of the others, without reading rows;
    None where one of them is a JSON array or no file of rows."""
    total = 0
    for path in paths:
        try:
            table = open_table(path)
        except ValueError:
            return None
        if isinstance(table, Parquet):
            total += table.num_rows
        elif isinstance(table, JsonLines):
            with path.open("rb") as file:
                total += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        else:
            return None
    return total


def _is_shown(path: Path, below: Path) -> bool:
    """Not hidden, nor in a hidden folder, such as a download's .cache."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(below).parts)
