"""Rows in the released formats, one JSON object a line.

SFT rows: {image: [base64, ...], question, response}, the question being the full user prompt with path and size and
`<image>` standing in question and response once per image, in order. RL rows: {messages, images: [base64, ...],
solution, question}, the question being the bare one. What is written is PNG: JPEG would drown three gray levels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.data.rows import Demonstration, Question
from thyme.pictures import to_rgb
from thyme.rollout.prompts import SYSTEM_PROMPT, text_prompt, user_prompt

if TYPE_CHECKING:
    from PIL import Image


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
        "images": [encode_image(picture) for _, picture in question.pictures],
        "solution": question.solution,
        "question": question.question,
    }


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
    more = [(path, picture.size) for path, picture in question.more_images]
    return user_prompt(question.question, question.image_path, question.image_size, more)
