"""One question of a benchmark, as its file has it, without its pictures."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PICTURE_COLUMNS = ("image", "image_path", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """The text of a row. What is missing is ""."""

    index: str
    question: str
    options: Mapping[str, str]
    """Texts by letter, "A" first; none for an open question."""
    answer: str
    """As the file has it: a letter, a word, a number, or the literal of a list of accepted ones."""
    hint: str = ""
    category: str = ""
    more: Mapping[str, str]
    """Every other column of text."""

    def accepted(self) -> tuple[str, ...]:
        """The answers that are accepted: the list whose literal `answer` is, else itself; never an empty one, which
        any prediction would hold."""
        return tuple(one for one in literal_list(self.answer) or (self.answer,) if one.strip())


def index_of(row: Mapping[str, Any]) -> str:
    """What a row is called; "" where it says nothing."""
    return _text(row.get("index"))


def item_of(row: Mapping[str, Any]) -> Item:
    """The item of a row: a dictionary by column name.

    Options are columns of one capital letter, or the list of `multi-choice options` ("(A) red") or `choices`, as JSON,
    as the literal of Python, or line by line.

    Raises:
        ValueError: no index, no question, or no answer, or one that is an object by name.
    """
    texts = {name: _text(value) for name, value in row.items() if name not in PICTURE_COLUMNS}
    for name in ("index", "question"):
        if not texts.get(name):
            raise ValueError(f"column {name!r} is {'empty' if name in texts else 'missing'}")
    if "answer" not in texts:
        raise ValueError("column 'answer' is missing: a benchmark without answers cannot be scored")
    if isinstance(row["answer"], dict):
        raise ValueError("column 'answer' is an object: a text, a number or a list of them is needed")
    options = {letter: texts[letter] for letter in string.ascii_uppercase if texts.get(letter)}
    if not options:
        listed = (texts.get(name) for name in ("multi-choice options", "options", "choices"))
        options = _listed_options(next(filter(None, listed), ""))
    taken = {"index", "question", "answer", "hint", "category", *string.ascii_uppercase}
    item = Item(
        index=texts["index"],
        question=texts["question"],
        options=options,
        answer=texts["answer"],
        hint=texts.get("hint", ""),
        category=texts.get("category", ""),
        more={name: value for name, value in texts.items() if name not in taken},
    )
    if not item.accepted():
        raise ValueError("column 'answer' is empty: a row without an answer cannot be scored")
    return item


def literal_list(text: str) -> tuple[str, ...]:
    """The items of a list written as JSON or as Python writes it; () where `text` is none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return ()
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return tuple(str(one) for one in found)
    return ()


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, (list, dict, tuple)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer():  # an index that a table of numbers turned into 3.0
        return str(int(value))
    return str(value)


def _listed_options(text: str) -> dict[str, str]:
    found = literal_list(text)
    if not found:
        found = tuple(line for line in text.splitlines() if re.match(r"\s*\(?[A-Z][).:]", line))
    options = {}
    for letter, option in zip(string.ascii_uppercase, found, strict=False):
        options[letter] = re.sub(rf"^\s*(?:\({letter}\)|{letter}[).:])\s*", "", option).strip()
    return options
