"""verl and DeepEyes: {data_source, prompt, images, reward_model: {ground_truth}, extra_info}; questions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thyme.data.layouts.row import (
    Kind,
    Row,
    Turn,
    conversation,
    embedded,
    from_json,
    identity,
    listed,
    pictures_type,
    spoken,
    text_of,
    turns_type,
)
from thyme.data.refusal import BadRow

PICTURES = ("images",)


def recognizes(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of this layout."""
    return "prompt" in row and ("reward_model" in row or "data_source" in row)


def read(row: Mapping[str, Any]) -> Row:
    """The row in the common form.

    Raises:
        BadRow: it is not laid out so.
    """
    prompt, reward, extra = (from_json(row.get(key)) for key in ("prompt", "reward_model", "extra_info"))
    turns = [Turn("user", prompt)] if isinstance(prompt, str) else conversation(prompt, "prompt")
    system, user, response = spoken(turns, "prompt")
    if response is not None:
        raise BadRow("turns", "prompt holds an assistant's turn: it ends with the user's")
    truth = from_json(reward.get("ground_truth")) if isinstance(reward, Mapping) else None
    if isinstance(truth, list) and len(truth) == 1:
        (truth,) = truth
    solution = text_of(truth)
    if solution is None:
        raise BadRow("no solution", f"reward_model.ground_truth is {truth!r:.60}: one answer, as text")
    extra = extra if isinstance(extra, Mapping) else {}
    bare = extra.get("question")
    said = identity(row)
    return Row(
        user=user,
        question=bare if isinstance(bare, str) and bare.strip() else None,
        solution=solution,
        system=system,
        pictures=listed(row.get("images"), "images"),
        source=said["source"],
        id=said["id"] or "-".join(filter(None, (extra.get("split"), text_of(extra.get("index"))))),
    )


def write(row: Row, pictures: Sequence[bytes], *, as_json: bool) -> dict[str, Any]:
    """A row of this layout; a response has no place in it.

    Args:
        row: its text.
        pictures: its image files.
        as_json: data URIs, for JSON lines; else bytes, for parquet.
    """
    said = {"system": row.system, "user": row.user}
    return {
        "data_source": row.source,
        "prompt": [{"role": role, "content": text} for role, text in said.items() if text is not None],
        "images": embedded(pictures, as_json=as_json),
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": row.solution},
        "extra_info": {"question": row.question},
    }


def schema(kind: Kind) -> Any:
    """The columns in parquet."""
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", turns_type()),
            ("images", pictures_type()),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pa.struct([("question", text)])),
        ]
    )
