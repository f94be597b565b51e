"""The structural check of a JSONL file of SFT or RL rows: every problem with its row; nothing is repaired or dropped.

The released SFT set has hundreds of rows with unbalanced tags; a row whose `<image>` count differs from its images
would crash a training step hours later.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAIRED_TAGS = ("think", "code", "sandbox_output", "answer")

_TAG = re.compile(rf"<(/?)({'|'.join(PAIRED_TAGS)})>")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row."""

    row: int
    """Line in the file, from 1."""
    message: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.message}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a file holds."""

    sft_rows: int
    rl_rows: int
    images: int
    problems: tuple[Problem, ...]

    @property
    def rows(self) -> int:
        return self.sft_rows + self.rl_rows

    @property
    def bad_rows(self) -> int:
        return len({problem.row for problem in self.problems})


def check_file(path: str | Path, *, decode_images: bool = True) -> CheckReport:
    """Checks every row of a JSONL file; kinds may be mixed and are told apart by "response" and "messages".

    Args:
        decode_images: also decode every picture, which takes most of the time.

    Raises:
        ValueError: the file is missing or holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path}: no such file")
    kinds = {"sft": 0, "rl": 0}
    images = 0
    problems: list[Problem] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                problems.append(Problem(number, f"not JSON: {error}"))
                continue
            kind = _kind(row)
            if kind is None:
                problems.append(Problem(number, "neither an SFT row ('response') nor an RL row ('messages')"))
                continue
            kinds[kind] += 1
            pictures = row.get("image" if kind == "sft" else "images")
            images += len(pictures) if isinstance(pictures, list) else 0
            found = _sft_problems(row) if kind == "sft" else _rl_problems(row)
            problems += [Problem(number, message) for message in found]
            if decode_images and isinstance(pictures, list):
                problems += [Problem(number, message) for message in _image_problems(pictures)]
    if not any(kinds.values()) and not problems:
        raise ValueError(f"data file {path}: no rows")
    return CheckReport(kinds["sft"], kinds["rl"], images, tuple(problems))


def tag_problems(response: str) -> Iterator[str]:
    """Tags that are not closed, closed without being open, or nested in themselves; in order of appearance."""
    is_open = dict.fromkeys(PAIRED_TAGS, False)
    for match in _TAG.finditer(response):
        closes, tag = match.group(1) == "/", match.group(2)
        if closes and not is_open[tag]:
            yield f"</{tag}> at character {match.start()} closes nothing"
        elif not closes and is_open[tag]:
            yield f"<{tag}> at character {match.start()} opens inside <{tag}>"
        is_open[tag] = not closes
    for tag, still_open in is_open.items():
        if still_open:
            yield f"<{tag}> is never closed"


def _kind(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    return "sft" if "response" in row else "rl" if "messages" in row else None


def _sft_problems(row: dict[str, Any]) -> Iterator[str]:
    missing = [key for key in ("question", "response") if not isinstance(row.get(key), str) or not row[key].strip()]
    if missing:
        yield f"{' and '.join(missing)} must be text"
        return
    yield from _count_problems(row["question"] + row["response"], row.get("image"), "image")
    yield from tag_problems(row["response"])
    if "<answer>" not in row["response"]:
        yield "no <answer>"


def _rl_problems(row: dict[str, Any]) -> Iterator[str]:
    for key in ("question", "solution"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            yield f"{key} must be text"
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    ):
        yield "messages must be a list of {role, content} with text"
        return
    users = [message["content"] for message in messages if message.get("role") == "user"]
    if len(users) != 1:
        yield f"messages must hold one user turn, found {len(users)}"
    yield from _count_problems("".join(users), row.get("images"), "images")


def _count_problems(text: str, images: Any, key: str) -> Iterator[str]:
    if images is None:
        images = []
    if not isinstance(images, list):
        yield f"{key} must be a list of base64 strings"
        return
    marks = text.count("<image>")
    if marks != len(images):
        yield f"{marks} <image> in the text, {len(images)} in {key}"


def _image_problems(images: list[Any]) -> Iterator[str]:
    from PIL import Image

    for index, encoded in enumerate(images):
        try:
            with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
                image.load()
        except (binascii.Error, TypeError, ValueError, OSError, SyntaxError) as error:
            yield f"image {index} cannot be read: {type(error).__name__}: {error}"
