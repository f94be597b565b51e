"""Files of rows without some of them: lines and row groups as they are, in their order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from thyme.data.tables.json_lines import JsonLines
from thyme.data.tables.opening import open_table
from thyme.data.tables.parquet import Parquet


def copies(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where in a folder the copy of each file goes: under its own name.

    Raises:
        ValueError: two files have one name, a copy is there already, or a file is of a kind that is not copied.
    """
    places = {path: folder / path.name for path in paths}
    owners: dict[Path, Path] = {}
    for path, place in places.items():
        if (other := owners.setdefault(place, path)) != path:
            raise ValueError(f"{place}: {other} and {path} have one name: rename one, or take one folder after another")
        if place.exists():
            raise ValueError(f"{place}: exists already: name a new folder")
        if not isinstance(open_table(path), Parquet | JsonLines):
            raise ValueError(f"data file {path}: only JSON lines and parquet are copied: convert it first")
    return places


def write_kept(path: Path, out: Path, dropped: Collection[int]) -> int:
    """Copies a file of JSON lines or parquet without the rows of these numbers (from 1, as `Table.scan` counts them).

    Args:
        path: the file.
        out: its copy (`copies`).
        dropped: numbers of rows.

    Returns:
        How many rows were written. The file appears once it is complete.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        written = (_parquet if isinstance(open_table(path), Parquet) else _lines)(path, partial, dropped)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return written


def _lines(path: Path, out: Path, dropped: Collection[int]) -> int:
    written = 0
    with path.open("rb") as read, out.open("wb") as write:
        for number, line in enumerate(read, 1):
            if number not in dropped and line.strip():
                write.write(line)
                written += 1
    return written


def _parquet(path: Path, out: Path, dropped: Collection[int]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, first, written = pq.ParquetFile(path), 1, 0
    with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            keep = [i for i in range(table.num_rows) if first + i not in dropped]
            writer.write_table(table.take(pa.array(keep, type=pa.int64())))
            first, written = first + table.num_rows, written + len(keep)
    return written
