"""ms-swift and LLaMA-Factory: {messages, images}, text with marks. An assistant's turn is a demonstration; "solution"
beside the messages makes a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thyme.data.layouts.row import (
    Kind,
    Row,
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


def recognizes(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of this layout, and text for content."""
    if "messages" not in row or "response" in row or {"question", "solution"} <= set(row):
        return False
    return not _in_parts(row["messages"])


def read(row: Mapping[str, Any]) -> Row:
    """The row in the common form.

    Raises:
        BadRow: it is not laid out so.
    """
    system, user, response = spoken(conversation(row.get("messages"), "messages"), "messages")
    key = "images" if "images" in row or "image" not in row else "image"
    question = row.get("question")
    return Row(
        user=user,
        response=response,
        question=question if isinstance(question, str) and question.strip() else None,
        solution=text_of(row.get("solution")),
        system=system,
        pictures=listed(row.get(key), key),
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
    said = {"system": row.system, "user": row.user, "assistant": row.response}
    messages = [{"role": role, "content": text} for role, text in said.items() if text is not None]
    written = {"messages": messages, "images": embedded(pictures, as_json=as_json)}
    return written if row.solution is None else written | {"solution": row.solution}


def schema(kind: Kind) -> Any:
    """The columns in parquet."""
    import pyarrow as pa

    return pa.schema([("messages", turns_type()), ("images", pictures_type()), ("solution", pa.string())])


def _in_parts(messages: Any) -> bool:
    turns = messages if isinstance(messages, list) else []
    return any(isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns)
