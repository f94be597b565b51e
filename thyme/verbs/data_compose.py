"""Compose hard high-resolution questions with exact boxes on real photographs: raw rows for data build --rl."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from thyme.config import POSITIONAL, table_to_toml
from thyme.interrupt import goes_on_with
from thyme.progress import progress
from thyme.result import Result

if TYPE_CHECKING:
    from thyme.build.photographs import Photographs

SETTINGS = "composed.toml"
"""What rows depend on: those of a folder are gone on with under the same alone."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many, on what."""

    folder: Path = field(metadata=POSITIONAL)
    """Where rows.jsonl and images/ go; rows that are there already are kept and continued, where they were made of the
    same photographs and settings, which stand in composed.toml."""
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
    from thyme.verbs.folders import held

    photographs = Photographs(config.photos, config.split)
    images, rows = config.folder / "images", config.folder / "rows.jsonl"
    images.mkdir(parents=True, exist_ok=True)
    with (
        goes_on_with("rows that are written are kept; the same command goes on"),
        held(config.folder),
        _continued(rows, config, photographs) as (file, done),
        progress(max(done, config.count), "compose", "question") as line,
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
    total = max(done, config.count)
    print(f"{rows}: {total} rows, {done} of them were there")
    return Result({"path": rows, "rows": total, "were_there": done})


@contextmanager
def _continued(rows: Path, config: Config, photographs: Photographs) -> Iterator[tuple[IO[str], int]]:
    """The file of rows to be added to, and how many it has; one that was not written to its end is cut off.

    Raises:
        ValueError: they were made otherwise, or are no composed questions.
    """
    from thyme.data.tables.opening import count_rows
    from thyme.evals.whole_lines import cut_to_whole_lines
    from thyme.train.durable import write_text

    settings = {
        "seed": config.seed,
        "split": config.split,
        "quality": config.quality,
        "photographs": photographs.identity,
    }
    if rows.is_file() and rows.stat().st_size:
        _require_same(rows, settings)
        cut_to_whole_lines(rows)
    else:
        write_text(rows.with_name(SETTINGS), table_to_toml(settings))
    done = count_rows([rows]) or 0 if rows.is_file() else 0
    with rows.open("a", encoding="utf-8") as file:
        yield file, done


def _require_same(rows: Path, settings: dict[str, Any]) -> None:
    """Raises where the rows that are there were made with other settings, or are no composed questions."""
    path, another = rows.with_name(SETTINGS), "name another folder"
    try:
        before = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{rows}: {SETTINGS}, which says how its rows were made, is missing: {another}") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}): {another}") from None
    if changed := ", ".join(name for name, value in settings.items() if before.get(name) != value):
        raise ValueError(f"{rows}: its rows were made with other {changed}: repeat it as it was, or {another}")
    begins = f'{{"image": "images/{settings["split"]}_{settings["seed"]}_'.encode()
    with rows.open("rb") as file:
        if not begins.startswith(found := file.read(len(begins))):
            raise ValueError(f"{rows}: holds other rows than composed ones ({found!r}): {another}")
