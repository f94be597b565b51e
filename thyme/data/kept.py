"""Files of rows without some of them: lines and row groups as they are, in their order."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from thyme.data.tables.opening import open_table
from thyme.data.tables.parquet import Parquet


def write_kept(path: Path, out: Path, dropped: Collection[int]) -> int:
    """Copies a file of JSON lines or parquet without the rows of these numbers (from 1, as `Table.scan` counts them).

    Returns:
        How many rows were written. The file appears once it is complete.

    Raises:
        ValueError: another kind of file, or `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already: name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if isinstance(open_table(path), Parquet):
            written = _parquet(path, partial, dropped)
        elif path.suffix.lower() == ".jsonl":
            written = _lines(path, partial, dropped)
        else:
            raise ValueError(f"data file {path}: only JSON lines and parquet are copied: convert it first")
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
