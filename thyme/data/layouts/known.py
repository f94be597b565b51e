"""Which layout a row has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from thyme.data.config import Format
from thyme.data.layouts import messages, openai, sharegpt, thyme, verl
from thyme.data.layouts.row import UNREAD, Row
from thyme.data.refusal import BadRow

LAYOUTS: dict[str, ModuleType] = {
    "thyme": thyme,
    "messages": messages,
    "openai": openai,
    "verl": verl,
    "sharegpt": sharegpt,
}
KEYS = (
    "thyme: image, question, response, or messages, images, solution, question; messages: messages, images; openai: "
    "messages with parts; verl: prompt, reward_model, images; sharegpt: conversations, images"
)
"""The layouts by their keys."""
PICTURE_COLUMNS = frozenset(name for layout in LAYOUTS.values() for name in layout.PICTURES)
"""Columns that hold nothing but pictures, in any layout."""


def read_row(value: Any, layout: Format = "auto", *, without: Collection[str] = ()) -> Row:
    """A row of a file in the common form.

    Args:
        value: what the file holds.
        layout: "auto" tells by the row's keys.
        without: columns that were not read.

    Raises:
        BadRow: it has no layout that is known, or more than one, or is not laid out as its keys say.
    """
    if not isinstance(value, Mapping):
        raise BadRow("layout", f"a {type(value).__name__}, not an object: {KEYS}")
    value = {key: column for key, column in value.items() if column is not None}
    name = layout_of(value) if layout == "auto" else layout
    row: Row = LAYOUTS[name].read(value | dict.fromkeys(without, UNREAD))
    return row


def layout_of(row: Mapping[str, Any]) -> str:
    """The layout whose keys a row has.

    Raises:
        BadRow: none, or more than one.
    """
    fits = [name for name, layout in LAYOUTS.items() if layout.recognizes(row)]
    if len(fits) == 1:
        return fits[0]
    seen = ", ".join(map(repr, list(row)[:8])) or "no key"
    if fits:
        raise BadRow("layout", f"{seen} fit {' and '.join(fits)}: say which (data.format)")
    raise BadRow("layout", f"{seen} are the keys of no layout ({KEYS})")
