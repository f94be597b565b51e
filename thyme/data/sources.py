"""Own files as a data set: the usable rows of all of them, any by its index, in constant memory.

At opening one pass over the text of every row decides which are usable; of parquet it reads no pictures. What only a
picture can tell is found when a row is asked for: it is left out then, and the next usable one stands in its place. So
item i depends on the files and on i alone, and a stage resumes without a cursor.
"""

from __future__ import annotations

import hashlib
import re
import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from thyme.data.config import DataConfig
from thyme.data.layouts.known import PICTURE_COLUMNS, read_row
from thyme.data.layouts.row import Kind
from thyme.data.problems import is_ours, text_problems
from thyme.data.refusal import BadRow, Refusal
from thyme.data.resolve import resolve
from thyme.data.rows import Demonstration, Question
from thyme.data.streams import Stream, endless
from thyme.data.tables.opening import data_files, open_table
from thyme.data.tables.table import Entry, Table

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T", Demonstration, Question)
Fits = Callable[["Image.Image"], object]

WINDOW_BYTES = 1024**3
"""Rows are shuffled among as many blocks of their files as come to this: what is read at once is then used at once."""

_OTHER_PROMPT = "another system prompt, replaced by ours"
_SHARD = re.compile(r"[-_.]?\d+(?:-of-\d+)?$")


class _File(NamedTuple):
    """The usable rows of one file."""

    table: Table
    name: str
    """Unique among the files; begins the ids of its rows."""
    source: str
    """What its rows are told apart by in metrics, where they say nothing themselves."""
    positions: NDArray[np.int64]
    numbers: NDArray[np.int64]
    blocks: NDArray[np.int64]
    """[n, 2] number and bytes of the block that each row is read with."""


class DataSet(Sequence[T], Generic[T]):
    """Usable rows. May be read from several threads at once."""

    def __init__(self, files: Sequence[Path], config: DataConfig, kind: Kind, fits: Fits | None) -> None:
        self.kind = kind
        self.left_out: Counter[str] = Counter()
        """Rows that are left out, by reason; grows as unreadable pictures are met."""
        self.notes: Counter[str] = Counter()
        """Rows that are used, but not as they are."""
        self._config, self._fits = config, fits
        self._examples: dict[str, str] = {}
        self._bad: set[int] = set()
        self._lock = threading.Lock()
        self._files = [self._opened(path, name) for path, name in zip(files, _names(files), strict=True)]
        self._starts: list[int] = [0, *accumulate(len(file.positions) for file in self._files)]
        self.digest = self._digest()
        """Of names, sizes and usable rows: a checkpoint that says another was trained on other data."""

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at not in self._bad:
                try:
                    return self._read(at)
                except BadRow as error:
                    self._leave_out(at, error.refusal)
        raise ValueError(f"no row can be used: {self.summary()}")

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Every index once, drawn from seed and epoch: blocks at random, and rows at random among those of a window."""
        rng = np.random.default_rng((seed, epoch))
        starts, sizes = self._blocks()
        blocks = rng.permutation(len(starts))
        window_of_block = np.empty(len(starts), dtype=np.int64)
        window_of_block[blocks] = (np.cumsum(sizes[blocks]) - sizes[blocks]) // WINDOW_BYTES
        lengths = np.diff(starts, append=len(self))
        return np.lexsort((rng.permutation(len(self)), np.repeat(window_of_block, lengths)))

    def first(self, count: int) -> list[T]:
        """The first `count` rows that can be used, each once; fewer where there are no more."""
        rows: list[T] = []
        for index in range(len(self)):
            if len(rows) == count:
                break
            try:
                rows.append(self._read(index))
            except BadRow as error:
                self._leave_out(index, error.refusal)
        if not rows and count:
            raise ValueError(f"no row can be used: {self.summary()}")
        return rows

    def stream(self, seed: int = 0) -> Stream[T]:
        """The rows without end, every epoch in an order of its own."""
        return endless(self, seed, order=self.order)

    def summary(self) -> str:
        """How many rows there are, and what was left out and why, in a line."""
        with self._lock:
            left = f"; left out {self.left_out.total()}: {self._reasons()}" if self.left_out else ""
            notes = "".join(f"; {count} with {note}" for note, count in self.notes.most_common())
        return f"{len(self)} rows of {len(self._files)} files{left}{notes}"

    def _opened(self, path: Path, name: str) -> _File:
        table = open_table(path)
        positions, numbers, blocks = array("q"), array("q"), array("q")
        rows = 0
        without = PICTURE_COLUMNS if table.skips else ()
        for entry in table.scan(without):
            rows += 1
            refusal = self._refusal(entry, without)
            if refusal is not None:
                self._count(refusal, path, entry.number)
                continue
            positions.append(entry.position)
            numbers.append(entry.number)
            blocks.extend(table.block(entry.position))
        if not positions:
            told = f": {self._reasons()}" if rows else ""
            raise ValueError(f"data file {path}: none of its {rows} rows can be used for {self.kind}{told}")
        return _File(
            table=table,
            name=name,
            source=_SHARD.sub("", path.stem) or path.stem,
            positions=np.frombuffer(positions, dtype=np.int64),
            numbers=np.frombuffer(numbers, dtype=np.int64),
            blocks=np.frombuffer(blocks, dtype=np.int64).reshape(-1, 2),
        )

    def _reasons(self) -> str:
        """What was left out so far, by reason, with a row for each."""
        return "; ".join(f"{n} {why} ({self._examples[why]})" for why, n in self.left_out.most_common())

    def _refusal(self, entry: Entry, without: Collection[str]) -> Refusal | None:
        """The first thing wrong with a row's text."""
        if entry.refusal is not None:
            return entry.refusal
        try:
            row = read_row(entry.value, self._config.format, without=without)
        except BadRow as error:
            return error.refusal
        refusal = next(text_problems(row, self.kind), None)
        if refusal is None and not is_ours(row.system):
            self.notes[_OTHER_PROMPT] += 1
        return refusal

    def _read(self, index: int) -> T:
        file, at = self._place(index)
        row = read_row(file.table.read(int(file.positions[at])), self._config.format)
        refusal = next(text_problems(row, self.kind), None)  # the number of pictures is known only here
        if refusal is not None:
            raise BadRow(*refusal)
        ready = resolve(
            row,
            self.kind,
            name=f"{file.name}:{file.numbers[at]}",
            source=file.source,
            folder=file.table.path.parent if self._config.images is None else Path(self._config.images),
            fits=self._fits,
        )
        return cast(T, ready.demonstration() if self.kind == "sft" else ready.question)

    def _leave_out(self, index: int, refusal: Refusal) -> None:
        file, at = self._place(index)
        with self._lock:
            if index not in self._bad:
                self._bad.add(index)
                self._count(refusal, file.table.path, int(file.numbers[at]))

    def _count(self, refusal: Refusal, path: Path, number: int) -> None:
        self.left_out[refusal.reason] += 1
        self._examples.setdefault(refusal.reason, f"{path}: row {number}: {refusal.message:.300}")

    def _place(self, index: int) -> tuple[_File, int]:
        """The file of a row, and the row's place among the usable ones of it."""
        which = bisect_right(self._starts, index) - 1
        return self._files[which], index - self._starts[which]

    def _blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each block begins among the indices, and its bytes."""
        starts: list[NDArray[np.int64]] = []
        sizes: list[NDArray[np.int64]] = []
        for first, file in zip(self._starts, self._files, strict=False):
            begins = np.flatnonzero(np.diff(file.blocks[:, 0], prepend=-1))
            starts.append(begins + first)
            sizes.append(file.blocks[begins, 1])
        return np.concatenate(starts), np.concatenate(sizes)

    def _digest(self) -> str:
        said = [(file.name, file.table.path.stat().st_size, len(file.positions)) for file in self._files]
        return hashlib.sha256(repr((self.kind, self._config.format, said)).encode()).hexdigest()


@overload
def open_data(
    paths: Iterable[str | Path],
    config: DataConfig,
    kind: Literal["sft"],
    *,
    fits: Fits | None = None,
) -> DataSet[Demonstration]: ...
@overload
def open_data(
    paths: Iterable[str | Path],
    config: DataConfig,
    kind: Literal["rl"],
    *,
    fits: Fits | None = None,
) -> DataSet[Question]: ...
def open_data(
    paths: Iterable[str | Path],
    config: DataConfig,
    kind: Kind,
    *,
    fits: Fits | None = None,
) -> DataSet[Demonstration] | DataSet[Question]:
    """The usable rows of files and folders, after one pass over their text.

    Args:
        paths: `config.train`, `config.heldout`, or others.
        config: layout and folder of the pictures.
        kind: "sft" gives demonstrations, "rl" questions; a demonstration can be a question, its answer being the
            solution.
        fits: raises ValueError for a picture that the model's processor would refuse; such rows are left out.

    Raises:
        ValueError: a path that is not there, a file of another kind or damaged, one without a usable row.
    """
    files = data_files(paths)
    if not files:
        raise ValueError("data: no files: name files or folders (data.train, data.heldout)")
    if kind == "sft":
        return DataSet[Demonstration](files, config, kind, fits)
    return DataSet[Question](files, config, kind, fits)


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with as many folders before it, or its suffix, as it takes to tell them apart."""
    for has_suffix in (False, True):
        for depth in range(1, max(len(path.resolve().parts) for path in files)):
            resolved = (path.resolve() if has_suffix else path.resolve().with_suffix("") for path in files)
            names = ["/".join(path.parts[-depth:]) for path in resolved]
            if len(set(names)) == len(names):
                return names
    raise AssertionError("data_files gives each file once")
