"""ms-swift and LLaMA-Factory: {messages, images}, text with marks. An assistant's turn is a demonstration; "solution"
beside the messages makes a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thyme.data.layouts.row import Row, conversation, identity, listed, spoken, text_of

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


def write(row: Row, pictures: list[Any]) -> dict[str, Any]:
    """A row of this layout."""
    said = {"system": row.system, "user": row.user, "assistant": row.response}
    messages = [{"role": role, "content": text} for role, text in said.items() if text is not None]
    return {"messages": messages, "images": pictures, "solution": row.solution}


def _in_parts(messages: Any) -> bool:
    turns = messages if isinstance(messages, list) else []
    return any(isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns)
