"""Rows in the released formats, one JSON object a line.

SFT rows: {image: [base64, ...], question, response}, the question being the full user prompt with path and size and
`<image>` standing in question and response once per image, in order. RL rows: {messages, images: [base64, ...],
solution, question}, the question being the bare one. What is written is PNG: JPEG would drown three gray levels.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.data.rows import Demonstration, Question
from thyme.pictures import read_picture, to_rgb
from thyme.rollout.prompts import SYSTEM_PROMPT, text_prompt, user_prompt

if TYPE_CHECKING:
    from PIL import Image

_DATA_URI = re.compile(r"^\s*data:[\w/+.-]*(?:;[\w=.-]+)*;base64,")


def sft_record(row: Demonstration) -> dict[str, Any]:
    """A demonstration as a row of the SFT set."""
    return {
        "image": [encode_image(image) for image in row.images],
        "question": full_prompt(row.question),
        "response": row.response,
    }


def rl_record(question: Question) -> dict[str, Any]:
    """A question as a row of the RL set."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": full_prompt(question)},
        ],
        "images": [] if question.image is None else [encode_image(question.image)],
        "solution": question.solution,
        "question": question.question,
    }


def read_demonstration(row: dict[str, Any]) -> Demonstration:
    """The demonstration of an SFT row; the picture of its question is the first where the question shows one.

    Raises:
        ValueError: a picture that cannot be read; says which.
    """
    images = [decode_image(value, f"image {index}") for index, value in enumerate(row.get("image") or [])]
    asked = _asked(row["question"], images if "<image>" in row["question"] else [], row)
    return Demonstration(images, row["question"], row["response"], "", asked)


def read_question(row: dict[str, Any]) -> Question:
    """The question of an RL row.

    Raises:
        ValueError: a picture that cannot be read; says which.
    """
    images = [decode_image(value, f"image {index}") for index, value in enumerate(row.get("images") or [])]
    return _asked(row["question"], images, row)


def _asked(text: str, images: list[Image.Image], row: dict[str, Any]) -> Question:
    image = images[0] if images else None
    path = "image.png" if images else ""
    return Question(id="", image=image, image_path=path, question=text, solution=str(row.get("solution", "")))


def decode_image(value: Any, name: str = "image") -> Image.Image:
    """The picture of a row, upright and RGB.

    Args:
        value: base64, with or without line breaks, a data URI, or the dictionary of Hugging Face data sets with the
            file's bytes (as base64 or as a list of numbers) under "bytes".
        name: what errors call it.

    Raises:
        ValueError: none of these, or no intact picture.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None:
            raise ValueError(f"{name}: a dictionary without 'bytes': embed the file as base64")
        value = value["bytes"]
    if isinstance(value, list):
        try:
            return read_picture(bytes(value), name)
        except (TypeError, ValueError) as error:
            raise error if str(error).startswith(name) else ValueError(f"{name}: a list that holds no bytes") from None
    if not isinstance(value, str):
        raise ValueError(f"{name}: {type(value).__name__} is no picture: give base64 of an image file")
    encoded = re.sub(r"\s", "", _DATA_URI.sub("", value, count=1))
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        what = "a path or an address" if re.match(r"[\w.~/:\\-]+\.\w{3,4}$", value[:300]) else "no base64"
        raise ValueError(f"{name}: {what}: embed the image file as base64") from None
    return read_picture(data, name)


def encode_image(image: Image.Image) -> str:
    """Base64 of a PNG."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=6)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_rows(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line. The file appears only once it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    partial.replace(path)


def full_prompt(question: Question) -> str:
    """The user turn of a question as the released checkpoints were trained on it."""
    if question.image is None:
        return text_prompt(question.question)
    return user_prompt(question.question, question.image_path, question.image_size)
