"""Chat rows as OpenAI's interface takes them: {messages} whose content is text or a list of parts, pictures among
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from thyme.data.layouts.row import MARK, UNREAD, Kind, Row, Turn, conversation, identity, listed, spoken, text_of
from thyme.data.pictures import data_uri
from thyme.data.refusal import BadRow

PICTURES = ("images",)
"""Most lie among the text."""

_TEXT = ("text", "input_text", "output_text")
_PICTURE = ("image_url", "input_image", "image")


def recognizes(row: Mapping[str, Any]) -> bool:
    """Whether a row has messages with content in parts."""
    turns = row.get("messages")
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns
    )


def read(row: Mapping[str, Any]) -> Row:
    """The row in the common form.

    Raises:
        BadRow: it is not laid out so.
    """
    # Parts that only say "an image" take theirs from a column beside the messages, as TRL's rows do.
    column = listed(row.get("images"), "images")
    beside = iter(column) if column is not None else repeat(UNREAD)
    pictures: list[Any] = []
    turns = [
        Turn(turn.role, _joined(turn.content, beside, pictures))
        for turn in conversation(row.get("messages"), "messages")
    ]
    if column is not None and list(beside):
        raise BadRow("pictures", "images holds more pictures than the messages have parts for: give each a part")
    system, user, response = spoken(turns, "messages")
    return Row(
        user=user,
        response=response,
        solution=text_of(row.get("solution")),
        system=system,
        pictures=pictures,
        picture_key="messages",
        **identity(row),
    )


def write(row: Row, pictures: Sequence[bytes], *, as_json: bool) -> dict[str, Any]:
    """A row of this layout. Every turn is in parts, so that a column of them has one type.

    Args:
        row: its text.
        pictures: its image files.
        as_json: for JSON lines, not for parquet; here they are the same.
    """
    left = map(data_uri, pictures)
    said = {"system": row.system, "user": row.user, "assistant": row.response}
    messages = [{"role": role, "content": _parts(text, left)} for role, text in said.items() if text is not None]
    return {"messages": messages} if row.solution is None else {"messages": messages, "solution": row.solution}


def schema(kind: Kind) -> Any:
    """The columns in parquet."""
    import pyarrow as pa

    url = pa.struct([("url", pa.large_string())])
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image_url", url)])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    return pa.schema([("messages", pa.list_(turn)), ("solution", pa.string())])


def _joined(content: Any, beside: Iterator[Any], pictures: list[Any]) -> Any:
    """The text of a turn with a mark for each part that is a picture, which goes to `pictures`."""
    if not isinstance(content, list):
        return content
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in _PICTURE:
            text += MARK
            value = next((part[key] for key in ("image_url", "image", "url") if part.get(key) is not None), None)
            value = value.get("url", value) if isinstance(value, Mapping) else value
            value = next(beside, None) if value is None else value
            if value is None:
                raise BadRow("pictures", f"a part of type {kind!r} holds no picture: give its data URI or path")
            pictures.append(value)
        else:
            raise BadRow("layout", f"a part of type {kind!r} in messages: text and image_url are read")
    return text


def _parts(text: str, pictures: Iterator[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(MARK)):
        if index:
            parts.append({"type": "image_url", "image_url": {"url": next(pictures)}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
