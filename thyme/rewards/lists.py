"""Lists of answers: taken apart, and compared item by item, in order where order means something."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from thyme.rewards.quantities import quantity

MAX_ITEMS = 32
"""A list of more is compared as text."""

Equal = Callable[[str, str], bool]

_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_NAMED_LIST = re.compile(r"^(?:\"?[A-Za-z_][\w ]{0,15}\"?\s*[=:]\s*|[A-Z]'?\s*)(?=[(\[{])")
_BETWEEN = re.compile(
    r"[()\[\]{}]|[,;](?!\d{3}(?!\d))|(?<=\d),(?=\d{3},)|\s(?:and|or)\s|\s*[和与及]\s*|(?<=[^\W\d_]{2})\s*/\s*(?=[^\W\d_]{3})"
)
_LABEL = re.compile(r"^\"?([A-Za-z]\w{0,11})\"?\s*[=:]\s*(?=\S)(.+)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _List:
    """A text taken apart at its commas."""

    items: tuple[str, ...]
    brackets: str
    """The opening and the closing one, "" for none."""
    is_set: bool
    """Whether the order means nothing: braces, or "and" and "or" between the items."""


def same_list(answer: str, reference: str, equal: Equal) -> bool | None:
    """The verdict on two lists: boxes, points, labelled values, enumerations; None if mathematics has to decide.

    Args:
        answer, reference: normal texts.
        equal: whether an item of the answer says the same as one of the reference.
    """
    given, wanted = _list(answer), _list(reference)
    if given is None or wanted is None:
        return None
    labels, wanted_labels = _labelled(given.items), _labelled(wanted.items)
    if labels and wanted_labels:
        if labels.keys() != wanted_labels.keys():
            return None
        return all(equal(labels[name], value) for name, value in wanted_labels.items())
    mine, one_name = (_in_order(labels), False) if labels else _under_one_name(given.items)
    theirs, one_name_wanted = (_in_order(wanted_labels), False) if wanted_labels else _under_one_name(wanted.items)
    is_set = given.is_set or wanted.is_set or one_name or one_name_wanted
    if len(mine) != len(theirs):
        return False
    kinds = {given.brackets, wanted.brackets}
    # Two numbers in brackets may be a point or an interval; three and more are a list, however they are set.
    if len(mine) == 2 and len(kinds) == 2 and kinds != {"", "()"} and "{}" not in kinds:
        return None
    if all(map(equal, mine, theirs)):
        return True
    if is_set and not kinds.intersection({"()", "[]"}):
        return _same_members(mine, theirs, equal)
    plain = all(quantity(item) for item in (*mine, *theirs))
    return False if plain else None


def _list(text: str) -> _List | None:
    text = _lines_joined(text.strip()).rstrip(".;").replace("\\{", "{").replace("\\}", "}")
    if text.startswith("{") and re.match(r"\{\s*\"", text):
        text = text.strip("{}")  # {"x1": 10, ...} or {"box": [...]}
    text = _NAMED_LIST.sub("", text)
    brackets = ""
    if text[:1] in _BRACKETS and text[-1:] in _BRACKETS.values() and _encloses(text):
        brackets, text = text[0] + text[-1], text[1:-1].strip()
    parts, joined = _parts(text)
    if len(parts) > 1 and all(part[:1] in "([" and part[-1:] in ")]" for part in parts if part):
        parts = [inner for part in parts for inner in _parts(part[1:-1])[0]]  # (1, 2), (3, 4)
    elif (
        len(parts) == 1
        and re.fullmatch(r"(?:-?\d+(?:\.\d+)?\s+){1,}-?\d+(?:\.\d+)?", text)
        and (brackets or " " in text)
    ):
        parts = text.split()
    if not 2 <= len(parts) <= MAX_ITEMS or not all(parts):
        return None
    return _List(tuple(parts), brackets, joined or brackets == "{}")


def _lines_joined(text: str) -> str:
    """Items on lines of their own, bulleted or numbered or neither, with commas between them."""
    lines = [line.strip().rstrip(",;.") for line in text.split("\n")]
    bare = [re.sub(rf"^(?:[-*•+]\s+|\(?{number}[.):]\s*)", "", line) for number, line in enumerate(lines, 1)]
    return ", ".join(bare) if len(lines) > 1 and all(bare) and not any("," in line for line in bare) else text


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth = 0
    for index, character in enumerate(text):
        depth += 1 if character in "([{" else -1 if character in ")]}" else 0
        if depth == 0 and index < len(text) - 1:
            return text[0] == "<"
    return True


def _parts(text: str) -> tuple[list[str], bool]:
    """A text cut at its commas, and at "and" and "or", outside of brackets; whether it was cut at one of the words."""
    parts, start, depth, joined = [], 0, 0, False
    for mark in _BETWEEN.finditer(text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            joined |= mark[0][0] not in ",;"
            parts.append(text[start : mark.start()].strip())
            start = mark.end()
    parts.append(text[start:].strip())
    if len(parts) > 2 and not parts[-2]:  # "red, blue, and green"
        del parts[-2]
    return parts, joined


def _labelled(items: Sequence[str]) -> dict[str, str]:
    """Values by label of "x = 3, y = 4"; nothing unless each has a label of its own."""
    found = [_LABEL.match(item) for item in items]
    labels = {match[1].casefold(): match[2] for match in found if match is not None}
    return labels if len(labels) == len(items) else {}


def _in_order(labels: Mapping[str, str]) -> list[str]:
    """Values as a tuple without labels lists them: "y = 2, x = 3" is (3, 2)."""
    return [labels[name] for name in (sorted(labels) if all(len(name) == 1 for name in labels) else labels)]


def _under_one_name(items: Sequence[str]) -> tuple[Sequence[str], bool]:
    """The values of "x = 2 or x = 3", and that all have one name; the items as they are otherwise."""
    found = [_LABEL.match(item) for item in items]
    values = [match[2] for match in found if match is not None]
    names = {match[1].casefold() for match in found if match is not None}
    return (values, True) if len(values) == len(items) and len(names) == 1 else (items, False)


def _same_members(mine: Sequence[str], theirs: Sequence[str], equal: Equal) -> bool:
    left = list(mine)
    for wanted in theirs:
        index = next((i for i, item in enumerate(left) if equal(item, wanted)), None)
        if index is None:
            return False
        del left[index]
    return not left
