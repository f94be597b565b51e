"""What the user's turn of a row says: the bare question and the paths of its pictures; and paths that name no machine.

The turns of the released sets are whole prompts with a path of their authors' disk, which their responses open too. A
model is to learn what it will be told in a rollout, so the question is taken out of the prompt, and every path becomes
one that a sandbox has: what was at PLACE/name.png is /mnt/data/name.png, and what is written beside it goes to
/mnt/data/temp_processed_images/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from thyme.data.layouts.row import MARK

DATA = "/mnt/data/"
WRITTEN = "/mnt/data/temp_processed_images"
UNNAMED = "image.png"
"""A picture whose path nobody says."""

_PATH = re.compile(r'^### User Image Path:(?:\*\*)? *"(.*)" *$', re.MULTILINE)
_FRAME = re.compile(r"^### (?:User Image (?:Path|Size):|\*\*Output Format)", re.MULTILINE)
_ABSOLUTE = re.compile(r"/|~|\\|[A-Za-z]:[\\/]")
_UNFIT = re.compile(r"[^\w.,+=@()\[\] -]")
_LONGEST_NAME = 120


class Asked(NamedTuple):
    """A user's turn, taken apart."""

    question: str
    """Without marks and without the template's lines."""
    paths: list[str]
    """Of the pictures, as the template says them."""
    in_template: bool
    """Whether the turn is in the template of `thyme.rollout.prompts`."""


def taken_apart(turn: str) -> Asked:
    """The question and the paths of a user's turn, in the template of `thyme.rollout.prompts` or in none."""
    frame = _FRAME.search(turn)
    question = turn if frame is None else turn[: frame.start()]
    paths = [] if frame is None else _PATH.findall(turn, frame.start())
    return Asked(question.replace(MARK, "").strip(), paths, frame is not None)


def portable_paths(told: Sequence[str], count: int) -> list[str]:
    """The paths that a model is told for `count` pictures.

    Args:
        told: the paths that the row says, "" for one it does not say; too few are filled up.

    Returns:
        For each picture the path it has in a sandbox; no two are the same.
    """
    paths: list[str] = []
    for index in range(count):
        path = portable(told[index] if index < len(told) else "")
        if path in paths:
            stem, dot, suffix = path.rpartition(".")
            path = f"{stem}_{index + 1}.{suffix}" if dot else f"{path}_{index + 1}"
        paths.append(path)
    return paths


def portable(path: str) -> str:
    """The path that stands for a path of somebody's disk; a relative one, and one of the sandbox, stay as they are."""
    if not path.strip():
        return UNNAMED
    inside = path.startswith(DATA) and ".." not in path
    relative = not _ABSOLUTE.match(path) and ".." not in path.split("/")
    if (inside or relative) and len(path) <= 2 * _LONGEST_NAME and not re.search(r'["\\\n\r]', path):
        return path
    name = _UNFIT.sub("_", re.split(r"[/\\]", path.rstrip("/\\"))[-1])[-_LONGEST_NAME:]
    return DATA + (name if name.strip(". ") else UNNAMED)


def rewritten(response: str, told: Sequence[str], paths: Sequence[str]) -> str:
    """A response that opens its pictures where a sandbox has them.

    Args:
        response: the assistant's turn.
        told: the paths the row said.
        paths: what they became, in the same order.
    """
    changed = [(old, new) for old, new in zip(told, paths, strict=False) if old and old != new]
    for old, new in sorted(changed, key=lambda pair: -len(pair[0])):
        # A longer name that begins alike is another file.
        response = re.sub(rf"{re.escape(old)}(?![\w/\\-]|\.\w)", _literal(new), response)
    for old, new in changed:
        *folder, name = re.split(r"[/\\]", old)
        elsewhere = rf"""(["'])(?!{DATA})(?:/|~/|[A-Za-z]:)[^"'\n]*[/\\]{re.escape(name)}(?=\1)"""
        response = re.sub(elsewhere, rf"\g<1>{_literal(new)}", response)
        if len(folder) > 2 and not old.startswith(DATA):
            beside = re.escape(old[: -len(name) - 1])
            response = re.sub(rf"""{beside}(?=[/\\"'\s])""", _literal(WRITTEN), response)
    return response


def _literal(text: str) -> str:
    """A replacement in which nothing is an escape."""
    return text.replace("\\", r"\\")
