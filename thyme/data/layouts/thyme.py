"""The released sets. SFT: {image, question, response}, the question being the user's whole turn. RL: {messages, images,
solution, question}, the question being the bare one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thyme.data.layouts.row import Row, conversation, identity, listed, spoken
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


def write(row: Row, pictures: list[Any]) -> dict[str, Any]:
    """A row of this layout: of the SFT set where there is a response, of the RL set elsewhere."""
    if row.response is not None:
        return {"image": pictures, "question": row.user, "response": row.response}
    messages = [{"role": "system", "content": row.system}, {"role": "user", "content": row.user}]
    return {"messages": messages, "images": pictures, "solution": row.solution, "question": row.question}
