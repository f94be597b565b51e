"""Pictures that show the same: within the rows that are trained on, and against what a model is measured by.

A picture is hashed by what it looks like: 64 signs of its coarse cosine transform (pHash), which change in few bits
when it is scaled, compressed, or made somewhat lighter. Pictures whose hashes differ in at most `distance` bits count
as the same. Evaluation pictures are hashed in their eight turned and mirrored forms, so that a turned copy leaks too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thyme.data.config import Format
from thyme.data.layouts.known import read_row
from thyme.data.pictures import LONGEST_REFERENCE, picture_file
from thyme.data.problems import asked
from thyme.data.refusal import BadRow
from thyme.data.tables.delimited import Delimited
from thyme.data.tables.opening import SUFFIXES, data_files, open_table
from thyme.data.tables.table import Entry, Table
from thyme.pictures import read_picture

SIDE = 32
"""Pixels of a side that a picture is reduced to before its transform."""
LOW = 8
"""Frequencies of a side that are kept."""
DISTANCE = 6
"""Bits of 64 that the same picture may differ in (docs/build_data.md has the error rates)."""
FLAT = 4.0
"""Spread of brightness, of 255, below which a picture has nothing to tell it by; it is compared by its bytes alone."""

_BANDS = 4
_MOST_DISTANCE = 2 * _BANDS - 1


class Place(NamedTuple):
    """Where a picture stands."""

    path: Path
    row: int
    picture: int


class Match(NamedTuple):
    """Two places that show the same picture."""

    row: Place
    like: Place
    """An earlier row, or an evaluation row."""
    bits: int
    """That their hashes differ in."""
    leaks: bool
    """Whether `like` is of the evaluation files."""
    same_question: bool
    """Whether it asks the same; of a row of these files, of all the row's pictures."""


@dataclass(slots=True)
class DedupReport:
    """What was found."""

    rows: int = 0
    pictures: int = 0
    evaluation_pictures: int = 0
    repeated: set[tuple[Path, int]] = field(default_factory=set)
    """Rows that ask the same of the same pictures as an earlier one."""
    leaked: set[tuple[Path, int]] = field(default_factory=set)
    """Rows with a picture of the evaluation files."""
    shared: int = 0
    """Pictures that an earlier row has too, with another question or beside other pictures: no fault."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Rows that could not be compared, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason."""

    def count(self, match: Match) -> None:
        """Takes a match in."""
        row = match.row[:2]
        if match.leaks:
            self.leaked.add(row)
        elif match.same_question:
            self.repeated.add(row)
        else:
            self.shared += 1


def dedup(
    paths: Iterable[str | Path],
    against: Iterable[str | Path] = (),
    *,
    layout: Format = "auto",
    images: str | Path | None = None,
    distance: int = DISTANCE,
    on_match: Callable[[Match], object] | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> DedupReport:
    """Compares the rows of files with each other and with evaluation files.

    Args:
        paths: files and folders of rows, in any layout, or benchmarks' tables.
        against: evaluation files: the same, and TSV as VLMEvalKit has them.
        layout: of the rows; "auto" tells by their keys.
        images: the folder that relative paths of pictures start from; None: each file's own.
        distance: bits that hashes of the same picture may differ in, 0 to 7.
        on_match: gets each match as it is found.
        on_row: is called for every row of `paths` that is looked at.

    Raises:
        ValueError: a file that cannot be read, or a distance out of range.
    """
    if not 0 <= distance <= _MOST_DISTANCE:
        raise ValueError(f"distance: {distance} must be from 0 to {_MOST_DISTANCE} bits")
    report, evaluation = DedupReport(), DedupReport()
    folder = None if images is None else Path(images)
    known, held = _Index(distance), _Index(distance)
    for place, _, image, data in _pictures(against, layout, folder, evaluation, lambda: None):
        report.evaluation_pictures += 1
        for code in _positions(image, data):
            held.add(code, place, "")
    several: dict[tuple[Path, int], int] = {}
    """Pictures of the rows that have more than one."""
    for row, group in groupby(_pictures(paths, layout, folder, report, on_row), lambda one: one[0][:2]):
        pictures = [(place, question, _key(image, data)) for place, question, image, data in group]
        report.pictures += len(pictures)
        near = [known.near(code) for _, _, code in pictures]
        asked_before = [known.rows(found, one[1], one[0].picture) for found, one in zip(near, pictures, strict=True)]
        repeats = any(several.get(one, 1) == len(pictures) for one in set.intersection(*asked_before))
        for (place, question, code), seen in zip(pictures, near, strict=True):
            for index, found in ((held, held.near(code)), (known, seen)):
                nearest = index.nearest(found, question)
                if nearest is None:
                    continue
                bits, like, asks = nearest
                match = Match(place, like, bits, index is held, asks == question and (index is held or repeats))
                report.count(match)
                if on_match is not None:
                    on_match(match)
        for place, question, code in pictures:
            known.add(code, place, question)
        if len(pictures) > 1:
            several[row] = len(pictures)
    for reason, count in evaluation.unreadable.items():
        report.unreadable[f"evaluation: {reason}"] += count
        report.examples[f"evaluation: {reason}"] = evaluation.examples[reason]
    return report


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that pictures which look alike share most of.

    The picture in 32 x 32 levels of brightness, its two-dimensional cosine transform, and of the 8 x 8 lowest
    frequencies (those without any change along an axis left out) the bits that say which are above their median.
    """
    levels = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_cosines() @ levels @ _cosines().T).ravel()
    return int("".join("1" if bit else "0" for bit in low > np.median(low)), 2)


@cache
def _cosines() -> NDArray[np.float64]:
    """[LOW, SIDE]: the rows of the cosine transform for frequencies 1 to LOW."""
    at = np.arange(SIDE) + 0.5
    return np.cos(np.pi / SIDE * np.arange(1, LOW + 1)[:, None] * at[None, :])


def _key(image: Image.Image, data: bytes) -> int | bytes:
    """A picture's hash, or its bytes where it has nothing to tell it by."""
    small = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    return data if float(small.std()) < FLAT else perceptual_hash(image)


def _positions(image: Image.Image, data: bytes) -> Iterator[int | bytes]:
    """A picture's keys in its eight turned and mirrored positions."""
    code = _key(image, data)
    yield code
    if not isinstance(code, bytes):
        small = image.convert("L").resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS)
        yield from (perceptual_hash(small.transpose(way)) for way in Image.Transpose)


class _Index:
    """Hashes by four bands of sixteen bits: of two that differ in at most seven bits, one band differs in at most one.

    So a hash is looked for under each band and each of its sixteen neighbours.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._codes: list[int] = []
        self._places: list[tuple[Place, str]] = []
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(_BANDS)]
        self._bytes: dict[bytes, list[int]] = {}

    def add(self, code: int | bytes, place: Place, question: str) -> None:
        number = len(self._places)
        self._places.append((place, question))
        if isinstance(code, bytes):
            self._codes.append(0)
            self._bytes.setdefault(hashlib.sha256(code).digest(), []).append(number)
            return
        self._codes.append(code)
        for band, rows in enumerate(self._bands):
            rows.setdefault(code >> 16 * band & 65535, []).append(number)

    def near(self, code: int | bytes) -> list[tuple[int, int]]:
        """(bits, number) of every picture that is alike."""
        if isinstance(code, bytes):
            return [(0, number) for number in self._bytes.get(hashlib.sha256(code).digest(), ())]
        near = {
            number
            for band, rows in enumerate(self._bands)
            for value in _neighbours(code >> 16 * band & 65535)
            for number in rows.get(value, ())
        }
        return [(bits, n) for n in near if (bits := (self._codes[n] ^ code).bit_count()) <= self._distance]

    def nearest(self, near: Sequence[tuple[int, int]], question: str) -> tuple[int, Place, str] | None:
        """(bits, place, question) of the one that is most alike, of those the first that asks the same."""
        if not near:
            return None
        _, bits, number = min((self._places[n][1] != question, bits, n) for bits, n in near)
        return bits, *self._places[number]

    def rows(self, near: Sequence[tuple[int, int]], question: str, number: int) -> set[tuple[Path, int]]:
        """The rows that ask that question and have one of them as their picture of that number."""
        found = (self._places[n] for _, n in near)
        return {place[:2] for place, asks in found if asks == question and place.picture == number}


def _neighbours(value: int) -> Iterator[int]:
    yield value
    yield from (value ^ 1 << bit for bit in range(16))


def _pictures(
    paths: Iterable[str | Path],
    layout: Format,
    folder: Path | None,
    report: DedupReport,
    on_row: Callable[[], object],
) -> Iterator[tuple[Place, str, Image.Image, bytes]]:
    """Every question's pictures; what cannot be read is counted."""

    def refuse(table: Table, number: int, error: BadRow) -> None:
        reason, message = error.refusal
        report.unreadable[reason] += 1
        report.examples.setdefault(reason, f"{table.path}: row {number}: {message:.200}")

    for table in _tables(paths):
        indices: set[str] = set()
        shared: list[tuple[int, str, str]] = []
        for entry in table.scan():
            report.rows += 1
            on_row()
            try:
                question, values = _asked(entry, layout)
                if isinstance(entry.value, Mapping) and "index" in entry.value:
                    indices.add(str(entry.value["index"]))
                    if len(values) == 1 and isinstance(values[0], str) and len(values[0]) <= LONGEST_REFERENCE:
                        shared.append((entry.number, question, values[0].strip()))
                        continue
                yield from _decoded(table, entry.number, question, values, folder)
            except BadRow as error:
                refuse(table, entry.number, error)
        for number, question, value in shared:
            if value not in indices:  # one that shares a row's picture is compared there
                try:
                    yield from _decoded(table, number, question, [value], folder)
                except BadRow as error:
                    refuse(table, number, error)


def _decoded(
    table: Table, row: int, question: str, values: Sequence[Any], folder: Path | None
) -> Iterator[tuple[Place, str, Image.Image, bytes]]:
    base = table.path.parent if folder is None else folder
    for number, value in enumerate(values):
        name = f"picture {number}"
        try:
            data = picture_file(value, name, base).data
            image = read_picture(data, name)
        except ValueError as error:
            raise BadRow("picture", str(error)) from error
        yield Place(table.path, row, number), question, image, data


def _tables(paths: Iterable[str | Path]) -> Iterator[Table]:
    """Files of rows; tables of text by name, or in folders."""
    for path in map(Path, paths):
        text = (
            sorted(path.rglob("*.tsv")) if path.is_dir() else [path] if path.suffix.lower() in (".tsv", ".csv") else []
        )
        for file in text:
            if not file.is_file():
                raise ValueError(f"data file {file}: no such file")
            yield Delimited(file)
        has_rows = not path.is_dir() or any(p.suffix.lower() in SUFFIXES for p in path.rglob("*"))
        if not text or (path.is_dir() and has_rows):
            yield from (open_table(file) for file in data_files([path]))


def _asked(entry: Entry, layout: Format) -> tuple[str, list[Any]]:
    """What a row asks, without case and spacing, and its question's pictures as they lie in the file."""
    if entry.refusal is not None:
        raise BadRow(*entry.refusal)
    value = entry.value
    if isinstance(value, Mapping) and layout == "auto" and _is_table_row(value):
        pictures = value.get("images") or value.get("image")
        return _folded(str(value.get("question", ""))), _listed(pictures)
    row = read_row(value, layout)
    count = row.user.count("<image>") or len(row.pictures or ())
    return _folded(asked(row)), list(row.pictures or ())[:count]


def _is_table_row(value: Mapping[str, Any]) -> bool:
    """Of a benchmark, or plain: a question and its picture side by side."""
    return "question" in value and not {"response", "messages", "conversations", "prompt"} & set(value)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value.replace("'", '"'))
        except ValueError:
            raise BadRow("pictures", "a list of pictures that cannot be read") from None
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
