"""Rows of any layout written in another: the image files as they are, the text as it is trained on.

A row is read, checked, decoded and written before the next; the file appears under its name once it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from thyme.data.config import Format, Layout
from thyme.data.formats import full_prompt
from thyme.data.layouts.known import LAYOUTS, read_row
from thyme.data.layouts.row import Kind, Row
from thyme.data.problems import kind_of, text_problems
from thyme.data.refusal import BadRow
from thyme.data.resolve import Resolved, resolve
from thyme.data.tables.opening import data_files, open_table
from thyme.data.tables.table import Entry
from thyme.rollout.prompts import SYSTEM_PROMPT

ROW_GROUP_BYTES = 16 * 1024**2
"""Of parquet that is written: little enough that any row is read in no time."""

Keep = Callable[[Resolved], str | None]

_ONLY: dict[str, Kind] = {"verl": "rl", "sharegpt": "sft"}
"""Layouts that hold questions, or demonstrations, alone."""


@dataclass(slots=True)
class ConvertReport:
    """What became of the rows."""

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason: where it is and what is wrong."""


def convert(
    paths: Iterable[str | Path],
    out: str | Path,
    to: Layout,
    *,
    layout: Format = "auto",
    images: str | Path | None = None,
    keep: Keep | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> ConvertReport:
    """Writes the usable rows of files and folders to one file.

    User turns are rebuilt from question, path and size, paths of somebody's disk become paths of the sandbox, and the
    system prompt is ours. Image files are copied byte by byte.

    Args:
        paths: what is read.
        out: a .jsonl or .parquet file that is not there yet.
        to: its layout. "verl" has no place for a response: demonstrations become questions, their answers solutions.
        layout: of what is read; "auto" tells by each row's keys.
        images: the folder that relative paths of pictures start from; None: each file's own.
        keep: what reviewers made of a row: its response, theirs or its own, or None for one that is left out; None
            keeps all as they are.
        on_row: is called for every row that was read.

    Raises:
        ValueError: `out` exists or has another suffix, a file cannot be read, or no row can be used.
    """
    out, report = Path(out), ConvertReport()
    files = data_files(paths)
    if out.exists():
        raise ValueError(f"{out}: exists already: name a new file")
    if out.suffix not in _WRITERS:
        raise ValueError(f"{out}: what is written ends in {' or '.join(_WRITERS)}")
    with _whole(out) as partial, _WRITERS[out.suffix](partial, LAYOUTS[to]) as write:
        for path in files:
            folder = path.parent if images is None else Path(images)
            for entry in open_table(path).scan():
                try:
                    row, kind, pictures = _ready(entry, layout, _ONLY.get(to), folder, path.stem, keep)
                    write(row, kind, pictures)
                    report.written += 1
                except BadRow as error:
                    reason, message = error.refusal
                    report.left_out[reason] += 1
                    report.examples.setdefault(reason, f"{path}: row {entry.number}: {message:.300}")
                on_row()
        if not report.written:
            told = "; ".join(report.examples.values()) or "there are none"
            raise ValueError(f"{out}: no row to write: {told}")
    return report


def _ready(
    entry: Entry, layout: Format, only: Kind | None, folder: Path, source: str, keep: Keep | None
) -> tuple[Row, Kind, list[bytes]]:
    """A row as it is to be written, what it is, and its image files."""
    if entry.refusal is not None:
        raise BadRow(*entry.refusal)
    row = read_row(entry.value, layout)
    kind = only or kind_of(row)
    for refusal in text_problems(row, kind):
        raise BadRow(*refusal)
    ready = resolve(row, kind, name=str(entry.number), source=source, folder=folder)
    question, response = ready.question, ready.response
    if keep is not None:
        response = keep(ready)
        if response is None:
            raise BadRow("not kept", "no reviewer's decision keeps it")
    row = replace(
        row,
        user=full_prompt(question),
        response=response,
        question=question.question,
        solution=row.solution if kind == "sft" else question.solution,
        system=SYSTEM_PROMPT,
        pictures=[],
        source=question.scenario,
    )
    return row, kind, [file.data for file in ready.files]


Write = Callable[[Row, Kind, list[bytes]], None]


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A name to write under, which becomes `out` at the end and is gone where that is not reached."""
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _json_lines(path: Path, layout: ModuleType) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(row: Row, kind: Kind, pictures: list[bytes]) -> None:
            file.write(json.dumps(layout.write(row, pictures, as_json=True), ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path, layout: ModuleType) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install thyme[data]") from None
    held: list[dict[str, Any]] = []
    size = 0
    kinds: list[Kind] = []
    writers: list[Any] = []

    def flush() -> None:
        nonlocal size
        if held:
            writers[0].write_table(pa.Table.from_pylist(held, schema=layout.schema(kinds[0])))
        held.clear()
        size = 0

    def write(row: Row, kind: Kind, pictures: list[bytes]) -> None:
        nonlocal size
        if not kinds:
            kinds.append(kind)
            writers.append(pq.ParquetWriter(path, layout.schema(kind), compression="zstd", use_dictionary=False))
        if kind != kinds[0] and layout.schema(kind) != layout.schema(kinds[0]):
            raise BadRow("another kind", f"an {kind} row, but the first was an {kinds[0]} row: a file each")
        held.append(layout.write(row, pictures, as_json=False))
        size += sum(map(len, pictures)) + len(row.user) + len(row.response or "")
        if size >= ROW_GROUP_BYTES:
            flush()

    try:
        yield write
        flush()
    finally:
        for writer in writers:
            writer.close()


_WRITERS = {".jsonl": _json_lines, ".parquet": _parquet}
