"""A benchmark's files: the text of all rows, and the pictures of any, in constant memory."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.data.pictures import LONGEST_REFERENCE, picture_file
from thyme.data.refusal import BadRow
from thyme.data.tables.delimited import Delimited
from thyme.data.tables.opening import open_table
from thyme.data.tables.table import Table
from thyme.evals.benchmarks.item import PICTURE_COLUMNS, Item, index_of, item_of, literal_list
from thyme.evals.benchmarks.known import BENCHMARKS, Benchmark
from thyme.pictures import read_picture
from thyme.rollout.types import Question

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl", ".json")


class BenchmarkFile:
    """The rows of one benchmark. Rows that cannot be used are left out and counted by reason in `left_out`.

    Args:
        benchmark: how rows are asked and scored.
        path: its file, or a folder with a file, or with files, of its name.

    Raises:
        ValueError: no such file, one that cannot be read, a column that is missing, an index that stands twice, or
            no usable row.
    """

    def __init__(self, benchmark: Benchmark, path: Path) -> None:
        self.benchmark = benchmark
        self.files = files_of(benchmark, path)
        self.items: list[Item] = []
        self.left_out: Counter[str] = Counter()
        self._tables = [_open(file) for file in self.files]
        self._places: list[tuple[int, int]] = []
        self._by_index: dict[tuple[int, str], int] = {}
        """Where the rows of each file stand, also those that are left out: others may share their pictures."""
        self._seen: set[str] = set()
        # Files of several parts (BLINK_depth.tsv, BLINK_jigsaw.tsv) count their rows each for itself.
        self._are_parts = len({_unnumbered(file.stem) for file in self.files}) > 1
        self._refused: set[str] = set()
        self._firsts: dict[str, str] = {}
        """By reason, what was said of the first row that was left out for it."""
        text = hashlib.sha256()
        for which in range(len(self._tables)):
            self._read(which)
        if not self.items:
            raise ValueError(
                f"benchmark file {self.files[0]}: no usable row: {next(iter(self._firsts.values()), 'it is empty')}"
            )
        for item in self.items:
            text.update(repr((item.index, item.question, *item.options.items(), item.answer, item.hint)).encode())
        sizes = [file.stat().st_size for file in self.files]
        self.identity = {"benchmark": benchmark.name, "bytes": sizes, "text": text.hexdigest()}

    @property
    def known(self) -> set[str]:
        """Indices of all rows that can be told apart, usable or not."""
        stems = [f"{table.path.stem}/" if self._are_parts else "" for table in self._tables]
        return {f"{stems[which]}{index}" for which, index in self._by_index}

    def __len__(self) -> int:
        return len(self.items)

    def summary(self) -> str:
        """Rows of the file, and those left out by reason with the first of each."""
        text = f"{len(self)} rows of {', '.join(path.name for path in self.files[:3])}"
        if not self.left_out:
            return text
        counted = (f"{count} {reason} ({self._firsts[reason]})" for reason, count in self.left_out.most_common())
        return f"{text}; left out: {', '.join(counted)}"

    def question(self, number: int) -> Question:
        """Row `number` of `items` with its pictures decoded.

        Raises:
            BadRow: a picture that is missing or cannot be read; names file and row.
        """
        item = self.items[number]
        which, position = self._places[number]
        table = self._tables[which]
        row = table.read(position)
        pictures = []
        try:
            for i, value in enumerate(self._pictures(which, row, {index_of(row)})):
                pictures.append(_decoded(value, f"image {i}", table.path.parent))
        except (ValueError, BadRow) as error:
            raise BadRow("picture", f"{table.path.name}, index {item.index}: {error}") from error
        paths = _paths(row, item.index, len(pictures))
        return Question(
            id=f"{self.benchmark.name}/{item.index}",
            image=pictures[0] if pictures else None,
            image_path=paths[0] if pictures else "",
            question=self.benchmark.prompt(item),
            solution=item.answer,
            scenario=item.category,
            meta={"index": item.index},
            more_images=tuple(zip(paths[1:], pictures[1:], strict=True)),
        )

    def refuse(self, error: BadRow) -> None:
        """Counts a row that turned out to be unusable when it was asked for, once however often it is."""
        reason, message = error.refusal
        if message not in self._refused:
            self._refused.add(message)
            self.left_out[reason] += 1
            self._firsts.setdefault(reason, message)

    def _read(self, which: int) -> None:
        table = self._tables[which]
        for entry in table.scan(PICTURE_COLUMNS):
            if entry.refusal is not None:
                self._leave_out(table, entry.number, *entry.refusal)
                continue
            try:
                if not isinstance(entry.value, Mapping):
                    raise ValueError("is no object by column")
                index = index_of(entry.value)
                if index:
                    self._by_index.setdefault((which, index), entry.position)
                item = item_of(entry.value)
            except ValueError as error:
                self._leave_out(table, entry.number, "incomplete", str(error))
                continue
            if self._are_parts:
                item = replace(item, index=f"{table.path.stem}/{item.index}")
            if item.index in self._seen:
                raise ValueError(
                    f"benchmark file {table.path}, row {entry.number}: index {item.index} stands twice: predictions "
                    "are told apart by it"
                )
            self._seen.add(item.index)
            self.items.append(item)
            self._places.append((which, entry.position))

    def _leave_out(self, table: Table, number: int, reason: str, message: str) -> None:
        self.left_out[reason] += 1
        self._firsts.setdefault(reason, f"{table.path.name}, row {number}: {message}")

    def _pictures(self, which: int, row: Mapping[str, Any], seen: set[str]) -> Sequence[Any]:
        value = row.get("image") or row.get("images") or row.get("image_path")
        if not value:
            if empty := [name for name in PICTURE_COLUMNS if name in row]:  # asked without it, it is another question
                raise ValueError(f"column {empty[0]!r} is empty: its picture is missing")
            return []
        if isinstance(value, str):
            if len(shared := value.strip()) <= LONGEST_REFERENCE and (which, shared) in self._by_index:
                if shared in seen:
                    raise ValueError(f"its picture is that of row {shared}, which has none")
                position = self._by_index[which, shared]
                return self._pictures(which, self._tables[which].read(position), seen | {shared})
            return literal_list(value) or [value]
        return list(value) if isinstance(value, (list, tuple)) else [value]


def files_of(benchmark: Benchmark, path: Path) -> list[Path]:
    """The files of a benchmark: `path` itself, or in and below a folder those that have its name, or the folder's only
    one.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"eval.data: {path}: no such file or folder")
    every = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
    names = {_plain(name) for name in (benchmark.name, *benchmark.also)}
    found = [one for one in every if _plain(_unnumbered(one.stem)) in names]
    found = found or [one for one in every if _plain(one.parent.name) in names and one.parent != path]
    others = {_plain(name) for known in BENCHMARKS for name in (known.name, *known.also)}
    parts = [one for one in every if _plain(one.stem.partition("_")[0]) in names and _plain(one.stem) not in others]
    found = found or parts
    if not found and len(every) == 1:
        found = every
    if not found:
        raise ValueError(
            f"eval.data: {path}: no file of {benchmark.name}: name it like {benchmark.name}.tsv, or give the file "
            "itself"
        )
    suffix = found[0].suffix
    return [one for one in found if one.suffix == suffix and _whole_of(one) not in found]


def _whole_of(path: Path) -> Path | None:
    """The file whose copy without pictures this is: VLMEvalKit keeps one of large files as *_local beside them."""
    return path.with_name(f"{path.stem.removesuffix('_local')}{path.suffix}") if path.stem.endswith("_local") else None


def _unnumbered(stem: str) -> str:
    """A file's name without the number of its shard, or what says that it is a copy."""
    return re.sub(r"([-_.]\d+)+(-of-\d+)?$|_local$", "", stem)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _open(path: Path) -> Table:
    return Delimited(path) if path.suffix.lower() in (".tsv", ".csv") else open_table(path)


def _decoded(value: Any, name: str, folder: Path) -> Image.Image:
    return read_picture(picture_file(value, name, folder).data, name)


def _paths(row: Mapping[str, Any], index: str, count: int) -> list[str]:
    """Under which names the model is told of the pictures: their own where the row has them, else by index."""
    told = row.get("image_path") or ""
    own = list(literal_list(told) or [told]) if isinstance(told, str) else [str(one) for one in told]
    names = [re.sub(r".*[/\\]", "", one) for one in own if one]
    if len(names) == count and len(set(names)) == count and all("." in name for name in names):
        return names
    safe = re.sub(r"[^\w.-]", "_", index)
    return [f"{safe}.png"] if count == 1 else [f"{safe}_{i + 1}.png" for i in range(count)]
