"""Predictions as files: ours, one JSON line for each as it ends, and those that others made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from thyme.data.tables.delimited import Delimited
from thyme.data.tables.opening import open_table


def read_predictions(path: Path) -> dict[str, str]:
    """Predictions by index, of JSON lines or a JSON array of {"index", "prediction"}, or of VLMEvalKit's tables (tsv,
    csv, xlsx), whose other columns are not looked at.

    Raises:
        ValueError: a file that cannot be read, a row without index or prediction, an index that stands twice.
    """
    if not path.is_file():
        raise ValueError(f"predictions {path}: no such file")
    found: dict[str, str] = {}
    for number, row in _rows(path):
        index, prediction = _plain(row.get("index")), row.get("prediction")
        if not index or "prediction" not in row:
            missing = "prediction" if index else "index"
            raise ValueError(f"predictions {path}, row {number}: no {missing!r}: rows are {{'index', 'prediction'}}")
        if index in found:
            raise ValueError(f"predictions {path}, row {number}: index {index} stands twice")
        found[index] = _plain(prediction)
    if not found:
        raise ValueError(f"predictions {path}: is empty")
    return found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix.lower() == ".xlsx":
        yield from _excel_rows(path)
        return
    table = Delimited(path) if path.suffix.lower() in (".tsv", ".csv") else open_table(path)
    for entry in table.scan():
        if entry.refusal is not None or not isinstance(entry.value, Mapping):
            message = entry.refusal.message if entry.refusal is not None else "is no object"
            raise ValueError(f"predictions {path}, row {entry.number}: {message}")
        yield entry.number, entry.value


def _excel_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"predictions {path}: an Excel table needs openpyxl: pip install openpyxl") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # a damaged archive raises what it likes
        raise ValueError(f"predictions {path}: no Excel table: {type(error).__name__}: {error}") from None
    sheet = book.worksheets[0]
    sheet.reset_dimensions()  # some writers state others than there are
    rows = _whole(sheet.iter_rows(values_only=True), path)
    header = [str(name) if name is not None else "" for name in next(rows, ())]
    for number, row in enumerate(rows, 1):
        if any(value is not None for value in row):
            yield number, dict(zip(header, chain(row, repeat(None)), strict=False))  # a row ends at its last cell


def _whole(rows: Iterator[tuple[Any, ...]], path: Path) -> Iterator[tuple[Any, ...]]:
    """The rows, with an error that names the file: a sheet is parsed as it is read."""
    try:
        yield from rows
    except Exception as error:  # a damaged sheet raises what it likes
        raise ValueError(f"predictions {path}: a damaged Excel table: {type(error).__name__}: {error}") from None


def _plain(value: Any) -> str:
    """The text of a cell; a number is written without a needless ".0", a date as Excel's readers write it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)
