"""What every layout is read into: text and undecoded pictures; and the pieces that several layouts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from thyme.data.pictures import data_uri
from thyme.data.refusal import BadRow

Kind = Literal["sft", "rl"]

UNREAD = object()
"""Stands in a row for a column that was not read."""

MARK = "<image>"
"""Where a picture stands in a text."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A row as it lies in a file, whatever the layout."""

    user: str
    """The user's turn, with a mark for each picture."""
    response: str | None = None
    """The assistant's turn, with a mark for each picture that its code made; None for a question to be rolled out."""
    question: str | None = None
    """The bare question, where the row says it apart from the user's turn."""
    solution: str | None = None
    """The reference answer."""
    system: str | None = None
    """The system prompt that the row names."""
    pictures: Sequence[Any] | None = field(default_factory=list)
    """In order of the marks, as they lie in the file; None where they were not read."""
    picture_key: str = "images"
    """What the row calls them."""
    source: str = ""
    """The data set that the row says it comes from."""
    id: str = ""
    """What the row calls itself."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: Any


def conversation(value: Any, key: str, *, role: str = "role", content: str = "content") -> list[Turn]:
    """The turns of a list of messages, of parquet's structure of two lists, or of either as JSON.

    Raises:
        BadRow: it is none of these.
    """
    value = from_json(value)
    if isinstance(value, Mapping) and isinstance(value.get(role), list) and isinstance(value.get(content), list):
        pairs = zip(value[role], value[content], strict=False)
        value = [{role: speaker, content: said} for speaker, said in pairs]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("layout", f"{key} must be a list of {{{role}, {content}}}")
    return [Turn(str(turn.get(role)), turn.get(content)) for turn in value]


def spoken(turns: Sequence[Turn], key: str) -> tuple[str | None, str, str | None]:
    """(system prompt, user's turn, assistant's turn) of a conversation of one round.

    Raises:
        BadRow: content that is no text, more than one round, a role that is none of these.
    """
    if not all(isinstance(turn.content, str) for turn in turns):
        raise BadRow("layout", f"{key} must be a list of {{role, content}} with text")
    said = {name: [turn.content for turn in turns if turn.role == name] for name in ("system", "user", "assistant")}
    others = sorted({turn.role for turn in turns} - set(said))
    if others:
        raise BadRow("turns", f"{key} holds a turn of {others[0]!r}: system, user and assistant are read")
    if len(said["user"]) != 1:
        raise BadRow("turns", f"{key} must hold one user turn, found {len(said['user'])}")
    if len(said["assistant"]) > 1 or len(said["system"]) > 1:
        raise BadRow("turns", f"{key} must hold one system and one assistant turn at most")
    if turns[-1].role == "system" or [turn.role for turn in turns][-2:] == ["assistant", "user"]:
        raise BadRow("turns", f"{key} must be in order: system, user, assistant")
    system, response = (said[name][0] if said[name] else None for name in ("system", "assistant"))
    return system, said["user"][0], response


def listed(value: Any, key: str) -> list[Any] | None:
    """A column of pictures as a list: none, one, a list, or parquet's structure of lists; None where it is unread.

    Raises:
        BadRow: it is none of these.
    """
    if value is None or value is UNREAD:
        return [] if value is None else None
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), list):
        names = value.get("path") or [None] * len(value["bytes"])
        return [{"bytes": data, "path": name} for data, name in zip(value["bytes"], names, strict=False)]
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return [value]
    if not isinstance(value, list):
        raise BadRow("pictures", f"{key} must be a list of pictures: base64, paths, or {{bytes, path}}")
    return value


def from_json(value: Any) -> Any:
    """What a column of JSON text says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def text_of(value: Any) -> str | None:
    """Text, or a number as text; None for anything else."""
    if isinstance(value, bool):
        return None
    return str(value) if isinstance(value, (str, int, float)) else None


def identity(row: Mapping[str, Any]) -> dict[str, str]:
    """The fields `source` and `id` of a row, from the columns that mean them."""
    source = next((row[key] for key in ("data_source", "source", "dataset") if isinstance(row.get(key), str)), "")
    name = next((text for key in ("id", "uid", "doc_id") if (text := text_of(row.get(key))) is not None), "")
    return {"source": source, "id": name}


def embedded(pictures: Sequence[bytes], *, as_json: bool) -> list[Any]:
    """Image files as a column: data URIs, or the dictionaries of Hugging Face data sets."""
    return [data_uri(data) if as_json else {"bytes": data, "path": None} for data in pictures]


def turns_type(role: str = "role", content: str = "content") -> Any:
    """Parquet's type of a list of messages."""
    import pyarrow as pa

    return pa.list_(pa.struct([(role, pa.string()), (content, pa.string())]))


def pictures_type() -> Any:
    """Parquet's type of a list of image files."""
    import pyarrow as pa

    return pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
