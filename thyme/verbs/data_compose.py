"""Compose hard high-resolution questions with exact boxes on real photographs: raw rows for data build --rl."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thyme.config import POSITIONAL
from thyme.interrupt import goes_on_with
from thyme.progress import progress
from thyme.result import Result


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many, on what."""

    folder: Path = field(metadata=POSITIONAL)
    """Where rows.jsonl and images/ go; rows that are there already are kept and continued."""
    count: int = 100
    """Questions in all."""
    seed: int = 0
    """Draws photographs, things, colors, words and places."""
    split: Literal["train", "heldout"] = "train"
    """Of the photographs that packages ship, those to train on or the others; the draws differ too."""
    photos: Path | None = None
    """A folder of photographs; none: those of scikit-image and scikit-learn."""
    quality: int = 92
    """Of the JPEG files."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: {self.count} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: {self.quality} must be from 1 to 100")


def run(config: Config) -> Result:
    """Writes what is missing, a row and its picture at a time, and says how many there are."""
    from thyme.build.compose import compose
    from thyme.build.photographs import Photographs

    photographs = Photographs(config.photos, config.split)
    images, rows = config.folder / "images", config.folder / "rows.jsonl"
    images.mkdir(parents=True, exist_ok=True)
    done = _whole_rows(rows, config)
    total = max(done, config.count)
    with (
        goes_on_with("rows that are written are kept; the same command goes on"),
        rows.open("a", encoding="utf-8") as file,
        progress(total, "compose", "question") as line,
    ):
        line.begin(done)
        for index in range(done, config.count):
            made = compose(photographs, config.seed, index, config.split)
            name = f"{config.split}_{config.seed}_{index:06d}.jpg"
            made.image.save(images / name, quality=config.quality, subsampling=0)
            row = {
                "image": f"images/{name}",
                "question": made.question,
                "answer": made.answer,
                "box": [int(value) for value in made.box],
                "category": made.category,
                "source": f"composed_{made.kind}",
                "id": name.removesuffix(".jpg"),
                "photo": made.photo,
                **made.facts,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            line.advance()
    print(f"{rows}: {total} rows, {done} of them were there")
    return Result({"path": rows, "rows": total, "were_there": done})


def _whole_rows(rows: Path, config: Config) -> int:
    """How many rows are there; one that was not written to its end is cut off.

    Raises:
        ValueError: they are of another seed or split, or no composed questions at all.
    """
    from thyme.evals.whole_lines import cut_to_whole_lines

    if not rows.is_file():
        return 0
    found, begins = rows.read_bytes(), f'{{"image": "images/{config.split}_{config.seed}_'.encode()
    if not found.startswith(begins[: len(found)]):
        raise ValueError(f"{rows}: holds other rows than those of this seed and split: name another folder")
    cut_to_whole_lines(rows)
    return found.count(b"\n")
