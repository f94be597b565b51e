"""The released sets. SFT: {image, question, response}, the question being the user's whole turn. RL: {messages, images,
solution, question}, the question being the bare one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thyme.data.layouts.row import Kind, Row, conversation, identity, listed, spoken, turns_type
from thyme.data.pictures import base64_of
from thyme.data.refusal import BadRow

PICTURES = ("image", "images")


def recognizes(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of this layout."""
    return "response" in row or {"messages", "question", "solution"} <= set(row)


def read(row: Mapping[str, Any]) -> Row:
    """The row in the common form.

    Raises:
        BadRow: it is not laid out so.
    """
    if "response" in row:
        missing = [key for key in ("question", "response") if not isinstance(row.get(key), str) or not row[key].strip()]
        if missing:
            raise BadRow("text", f"{' and '.join(missing)} must be text")
        key = "image" if "image" in row or "images" not in row else "images"
        solution = row.get("solution") if isinstance(row.get("solution"), str) else None
        return Row(
            user=row["question"],
            response=row["response"],
            solution=solution,
            pictures=listed(row.get(key), key),
            picture_key=key,
            **identity(row),
        )
    for name in ("question", "solution"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise BadRow("text", f"{name} must be text")
    system, user, response = spoken(conversation(row.get("messages"), "messages"), "messages")
    return Row(
        user=user,
        response=response,
        question=row["question"],
        solution=row["solution"],
        system=system,
        pictures=listed(row.get("images"), "images"),
        **identity(row),
    )


def write(row: Row, pictures: Sequence[bytes], *, as_json: bool) -> dict[str, Any]:
    """A row of this layout: of the SFT set where there is a response, of the RL set elsewhere.

    Args:
        row: its text.
        pictures: its image files.
        as_json: for JSON lines, not for parquet; here they are the same.
    """
    encoded = [base64_of(data) for data in pictures]
    if row.response is not None:
        return {"image": encoded, "question": row.user, "response": row.response}
    messages = [{"role": "system", "content": row.system}, {"role": "user", "content": row.user}]
    return {"messages": messages, "images": encoded, "solution": row.solution, "question": row.question}


def schema(kind: Kind) -> Any:
    """The columns in parquet."""
    import pyarrow as pa

    pictures = pa.list_(pa.large_string())
    if kind == "sft":
        return pa.schema([("image", pictures), ("question", pa.string()), ("response", pa.string())])
    text = [(name, pa.string()) for name in ("solution", "question")]
    return pa.schema([("messages", turns_type()), ("images", pictures), *text])
