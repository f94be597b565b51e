"""Raw rows: a question, an answer, pictures, and where the target is; in any layout that training reads, or plain.

    {"image": "street.jpg", "question": "What does the sign say?", "answer": "MICHIGAN", "box": [x1, y1, x2, y2]}

is plain: `image` or `images` as in any layout (path, base64, bytes), `answer` or `solution`, and, where known, `box`
(pixels of the upright picture, from the top left), `category`, `source`, `id`. In other layouts the last four are read
from the same columns.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from thyme.build.boxes import Box
from thyme.data.config import Format
from thyme.data.layouts.known import PICTURE_COLUMNS, read_row
from thyme.data.layouts.row import MARK, UNREAD, Row, from_json, identity, listed, text_of
from thyme.data.pictures import picture_file
from thyme.data.problems import asked, solution_of
from thyme.data.refusal import BadRow
from thyme.data.tables.opening import data_files, open_table
from thyme.data.turns import portable, taken_apart
from thyme.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

    from thyme.data.tables.table import Table

_HAS_PICTURE, _HAS_BOX, _IS_MATH = 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """One raw row, decoded."""

    id: str
    """File and row."""
    question: str
    answer: str
    """The reference answer, "" where the row says none."""
    image: Image.Image | None
    """Upright RGB; None for a row of text."""
    data: bytes
    """The picture's file, as it was."""
    image_path: str
    """As the model is told it."""
    box: Box | None
    """Of the target, in pixels of the picture."""
    category: str
    source: str


class Traits(NamedTuple):
    """What a raw row is fit for, told without its pictures."""

    has_picture: bool
    has_box: bool
    is_math: bool


class RawRows:
    """The raw rows of files and folders, any by its index; memory is some 17 bytes a row.

    Args:
        paths: files, folders, patterns.
        layout: of the rows; "auto" takes plain rows too.
        images: the folder that relative paths of pictures start from; None: each file's own.

    Raises:
        ValueError: a path that is not there, a file that cannot be read, no row at all.
    """

    def __init__(self, paths: Iterable[str | Path], *, layout: Format = "auto", images: str | Path | None = None):
        self._layout, self._images = layout, None if images is None else Path(images)
        files = data_files(paths)
        self.left_out: Counter[str] = Counter()
        """Rows without a question, or that no layout reads, by reason."""
        self._tables: list[Table] = [open_table(path) for path in files]
        self._names = _names(files)
        self._positions, self._numbers, self._traits = array("q"), array("q"), array("B")
        counts = []
        for table in self._tables:
            before = len(self._positions)
            self._scan(table)
            counts.append(len(self._positions) - before)
        self._starts = [0, *accumulate(counts)]
        if not len(self):
            told = ", ".join(f"{n} {why}" for why, n in self.left_out.items()) or "there are none"
            raise ValueError(f"data.train: no raw row that can be used: {told}")

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def files(self) -> list[tuple[str, int]]:
        """Name and bytes of each file: what a build is of."""
        return [(name, table.path.stat().st_size) for name, table in zip(self._names, self._tables, strict=True)]

    def traits(self, index: int) -> Traits:
        """What row `index` is fit for."""
        bits = self._traits[index]
        return Traits(bool(bits & _HAS_PICTURE), bool(bits & _HAS_BOX), bool(bits & _IS_MATH))

    def name(self, index: int) -> str:
        """What row `index` is called: its file and its line."""
        return f"{self._names[self._file(index)]}:{self._numbers[index]}"

    def read(self, index: int) -> Raw:
        """Row `index`, decoded.

        Raises:
            BadRow: it cannot be read; says why.
        """
        table = self._tables[self._file(index)]
        value = table.read(self._positions[index])
        folder = table.path.parent if self._images is None else self._images
        return read_raw(value, self.name(index), folder, self._layout)

    def _file(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    def _scan(self, table: Table) -> None:
        without = PICTURE_COLUMNS if table.skips else frozenset[str]()
        for entry in table.scan(without):
            try:
                if entry.refusal is not None:
                    raise BadRow(*entry.refusal)
                row = common_row(entry.value, self._layout, dict.fromkeys(without, UNREAD))
                if not asked(row):
                    raise BadRow("no question", "asks nothing: give it a question")
                box = box_of(entry.value)
            except BadRow as error:
                self.left_out[error.refusal.reason] += 1
                continue
            has_picture = bool(row.pictures) if row.pictures is not None else True
            bits = _HAS_PICTURE * has_picture + _HAS_BOX * (box is not None)
            is_math = not has_picture or str(entry.value.get("category", "")).casefold() == "math"
            self._positions.append(entry.position)
            self._numbers.append(entry.number)
            self._traits.append(bits + _IS_MATH * is_math)


def read_raw(value: Any, name: str, folder: Path | None, layout: Format = "auto") -> Raw:
    """A row of a file as a raw row; of several pictures the first.

    Raises:
        BadRow: no layout, no question, a picture that cannot be read, a box that is none or lies outside.
    """
    row = common_row(value, layout, {})
    image, data, told = None, b"", taken_apart(row.user).paths
    if row.pictures:
        try:
            file = picture_file(row.pictures[0], "image 0", folder)
            data, image = file.data, read_picture(file.data, "image 0")
        except ValueError as error:
            raise BadRow("picture", f"cannot be read: {error}") from error
        told = told or [file.path]
    path = portable(told[0] if told else "")
    if "/" not in path:
        path = f"/mnt/data/{path}"
    box = box_of(value)
    if box is not None and (image is None or not box.inside(image.size)):
        size = "no picture" if image is None else f"a picture of {image.width}x{image.height}"
        raise BadRow("box", f"box {list(box)} lies outside of {size}: give x1, y1, x2, y2 in its pixels")
    question, answer = asked(row), solution_of(row).strip()
    if not question:
        raise BadRow("no question", "asks nothing: give it a question")
    try:
        f"{question}{answer}{path}".encode()
    except UnicodeEncodeError as error:
        raise BadRow("encoding", f"half a character at {error.start}: mend its encoding") from None
    category = value.get("category")
    return Raw(
        id=name,
        question=question,
        answer=answer,
        image=image,
        data=data,
        image_path=path if image is not None else "",
        box=box,
        category=category if isinstance(category, str) else "",
        source=row.source,
    )


def common_row(value: Any, layout: Format, unread: Mapping[str, Any]) -> Row:
    """A row in the common form: of a layout that training reads, or plain.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, Mapping) and layout == "auto" and _is_plain(value):
        key = "images" if "images" in value else "image"
        pictures = listed(unread[key] if key in unread else _one(value.get(key)), key)
        answer = text_of(value.get("answer", value.get("solution")))
        marks = MARK * len(pictures or ())
        question = value["question"].replace(MARK, "").strip()
        return Row(user=marks + question, solution=answer, pictures=pictures, picture_key=key, **identity(value))
    return read_row(value, layout, without=unread)


def box_of(value: Mapping[str, Any]) -> Box | None:
    """The target's box of a row, from its column `box` or `bbox`; None without one.

    Raises:
        BadRow: it is no box.
    """
    said = from_json(value.get("box", value.get("bbox")))
    if said is None or said == []:
        return None
    is_four = isinstance(said, (list, tuple)) and len(said) == 4
    if not is_four or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in said):
        raise BadRow("box", f"box {said!r:.80} is none: give x1, y1, x2, y2 in pixels")
    box = Box(*(float(n) for n in said))
    if not (box.x1 < box.x2 and box.y1 < box.y2):
        raise BadRow("box", f"box {said!r:.80} holds nothing: x1 < x2 and y1 < y2")
    return box


def _is_plain(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("question"), str) and not {"response", "messages", "conversations", "prompt"} & set(
        value
    )


def _one(value: Any) -> Any:
    """A lone picture as a list of one."""
    return [value] if isinstance(value, (str, bytes)) and value else value or None


def _names(files: list[Path]) -> list[str]:
    """A name for each file: its stem, with its folder where two share it."""
    stems = Counter(path.stem for path in files)
    names = [path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}" for path in files]
    return [
        re.sub(r"\s", "_", name if names.count(name) == 1 else str(PurePosixPath(path)))
        for name, path in zip(names, files, strict=True)
    ]
