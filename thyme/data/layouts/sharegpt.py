"""ShareGPT and LLaVA: {conversations: [{from, value}], images}; demonstrations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thyme.data.layouts.row import (
    Kind,
    Row,
    Turn,
    conversation,
    embedded,
    identity,
    listed,
    pictures_type,
    spoken,
    text_of,
    turns_type,
)

PICTURES = ("images", "image")

_ROLES = {"human": "user", "gpt": "assistant"}


def recognizes(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of this layout."""
    return "conversations" in row


def read(row: Mapping[str, Any]) -> Row:
    """The row in the common form.

    Raises:
        BadRow: it is not laid out so.
    """
    turns = conversation(row.get("conversations"), "conversations", role="from", content="value")
    system, user, response = spoken([Turn(_ROLES.get(turn.role, turn.role), turn.content) for turn in turns], "turns")
    key = "images" if "images" in row or "image" not in row else "image"
    pictures = [row[key]] if isinstance(row.get(key), str) else listed(row.get(key), key)
    own = row.get("system")
    return Row(
        user=user,
        response=response,
        solution=text_of(row.get("solution")),
        system=own if system is None and isinstance(own, str) else system,
        pictures=pictures,
        picture_key=key,
        **identity(row),
    )


def write(row: Row, pictures: Sequence[bytes], *, as_json: bool) -> dict[str, Any]:
    """A row of this layout.

    Args:
        row: its text.
        pictures: its image files.
        as_json: data URIs, for JSON lines; else bytes, for parquet.
    """
    said = {"system": row.system, "human": row.user, "gpt": row.response}
    turns = [{"from": role, "value": text} for role, text in said.items() if text is not None]
    return {"conversations": turns, "images": embedded(pictures, as_json=as_json)}


def schema(kind: Kind) -> Any:
    """The columns in parquet."""
    import pyarrow as pa

    return pa.schema([("conversations", turns_type("from", "value")), ("images", pictures_type())])
