"""What a file of rows holds, in figures: tokens, pictures, tags, scenarios; a row is read, counted and forgotten."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thyme.data.config import Format
from thyme.data.layouts.known import read_row
from thyme.data.pictures import picture_file
from thyme.data.problems import kind_of, solution_of
from thyme.data.refusal import BadRow
from thyme.data.tables.opening import open_table
from thyme.data.tags import PAIRED_TAGS
from thyme.pictures import read_picture

if TYPE_CHECKING:
    from thyme.model.processor import Processor

PERCENTILES = (0, 5, 50, 95, 100)

_OPENS = re.compile(rf"<({'|'.join(PAIRED_TAGS)})>")


@dataclass(slots=True)
class Stats:
    """Figures of one file, or of several."""

    rows: Counter[str] = field(default_factory=Counter)
    """By kind: "sft", "rl"."""
    scenarios: Counter[str] = field(default_factory=Counter)
    """By what the row says it comes from, "-" where it says nothing."""
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Of each row, by name: tokens of question, response, pictures and all; pictures; pixels of a picture's longer
    side; code blocks."""
    tags: Counter[str] = field(default_factory=Counter)
    """Tags that are opened in responses."""
    solutions: int = 0
    """Different solutions."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Rows that are not in the figures, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason."""

    def table(self) -> list[str]:
        """The figures as they are printed."""
        total = self.rows.total()
        lines = [f"{total} rows: {', '.join(f'{n} {kind}' for kind, n in self.rows.most_common())}"]
        heads = "".join(f"{'p' + str(p):>9}" for p in PERCENTILES)
        lines.append(f"{'a row has':<22}{'mean':>9}{heads}")
        for name, values in self.lengths.items():
            if values:
                at = np.percentile(values, PERCENTILES, method="nearest")
                lines.append(f"{name:<22}{np.mean(values):>9.1f}" + "".join(f"{int(value):>9}" for value in at))
        if self.tags:
            lines.append("tags: " + ", ".join(f"{n} <{tag}>" for tag, n in self.tags.most_common()))
        lines.append(
            "scenarios: " + ", ".join(f"{name} {n} ({n / total:.1%})" for name, n in self.scenarios.most_common())
        )
        if self.solutions:
            lines.append(f"solutions: {self.solutions} different ones")
        for reason, n in self.unreadable.most_common():
            lines.append(f"not in the figures: {n} rows, {reason}: the first is {self.examples[reason]}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The same as data, lengths as percentiles."""
        lengths = {
            name: {"mean": float(np.mean(values))}
            | {
                f"p{p}": int(v)
                for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES, method="nearest"), strict=True)
            }
            for name, values in self.lengths.items()
            if values
        }
        return {
            "rows": dict(self.rows),
            "scenarios": dict(self.scenarios),
            "lengths": lengths,
            "tags": dict(self.tags),
            "solutions": self.solutions,
            "unreadable": dict(self.unreadable),
        }


def gather(
    paths: list[Path],
    processor: Processor,
    *,
    layout: Format = "auto",
    images: str | Path | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> Stats:
    """The figures of files together.

    Args:
        paths: files.
        processor: counts the tokens of text and of pictures.
        layout: of the rows; "auto" tells by each row's keys.
        images: the folder that relative paths of pictures start from; None: each file's own.
        on_row: is called for every row.

    Raises:
        ValueError: a file that cannot be read, or no row at all.
    """
    stats, solutions = Stats(), set[str]()
    for path in paths:
        folder = path.parent if images is None else Path(images)
        for entry in open_table(path).scan():
            try:
                if entry.refusal is not None:
                    raise BadRow(*entry.refusal)
                solutions.add(_count(stats, entry.value, layout, folder, processor))
            except BadRow as error:
                reason, message = error.refusal
                stats.unreadable[reason] += 1
                stats.examples.setdefault(reason, f"{path}: row {entry.number}: {message:.200}")
            on_row()
    if not stats.rows:
        told = "; ".join(stats.examples.values()) or "there are none"
        raise ValueError(f"no row to count: {told}")
    stats.solutions = len(solutions - {""})
    return stats


def _count(stats: Stats, value: Any, layout: Format, folder: Path, processor: Processor) -> str:
    """Takes a row in; its solution."""
    row = read_row(value, layout)
    kind = kind_of(row)
    sizes, tokens = [], 0
    for number, picture in enumerate(row.pictures or ()):
        try:
            image = read_picture(picture_file(picture, f"image {number}", folder).data, f"image {number}")
            height, width = processor.size_of(image)
        except ValueError as error:
            raise BadRow("picture", str(error)) from error
        side = processor.image_config.patch_size * processor.image_config.merge_size if processor.image_config else 1
        tokens += height * width // side**2
        sizes.append(max(image.size))
    try:
        asked = len(processor.encode_untrusted(row.user))
        said = 0 if row.response is None else len(processor.encode_untrusted(row.response))
    except (ValueError, UnicodeEncodeError) as error:
        raise BadRow("encoding", f"its text cannot be tokenized: {error}") from error
    opened = Counter(match[1] for match in _OPENS.finditer(row.response or ""))
    stats.rows[kind] += 1
    stats.scenarios[row.source or "-"] += 1
    stats.tags.update(opened)
    figures = {
        "tokens of the question": asked,
        "tokens of the response": said,
        "tokens of pictures": tokens,
        "tokens in all": asked + said + tokens,
        "pictures": len(sizes),
        "code blocks": opened["code"],
    }
    for name, figure in figures.items():
        if kind == "sft" or name not in ("tokens of the response", "code blocks"):
            stats.lengths.setdefault(name, []).append(figure)
    stats.lengths.setdefault("longer side (pixels)", []).extend(sizes)
    return solution_of(row)
