"""Rows in the released formats, one JSON object a line.

SFT rows: {image: [base64, ...], question, response}, the question being the full user prompt with path and size and
`<image>` standing in question and response once per image, in order. RL rows: {messages, images: [base64, ...],
solution, question}, the question being the bare one. Pictures are PNG, since JPEG would drown three gray levels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.data.config import DataConfig, Split
from thyme.rollout.prompts import SYSTEM_PROMPT, text_prompt, user_prompt

if TYPE_CHECKING:
    from PIL import Image

    from thyme.data.synthetic import SftRow
    from thyme.rollout.types import Question


def sft_record(row: SftRow) -> dict[str, Any]:
    """A demonstration as a row of the SFT set."""
    return {
        "image": [encode_image(image) for image in row.images],
        "question": _prompt(row.question),
        "response": row.response,
    }


def rl_record(question: Question) -> dict[str, Any]:
    """A question as a row of the RL set."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": _prompt(question)},
        ],
        "images": [] if question.image is None else [encode_image(question.image)],
        "solution": question.solution,
        "question": question.question,
    }


def encode_image(image: Image.Image) -> str:
    """Base64 of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_synthetic(
    folder: str | Path, config: DataConfig | None = None, *, sft: int = 0, rl: int = 0, heldout: int = 0
) -> dict[Path, int]:
    """Writes sft.jsonl, rl.jsonl and heldout.jsonl with that many rows each, leaving out the empty ones.

    Returns:
        Rows by file. The same config and counts write the same bytes; a file appears only once it is complete.

    Raises:
        ValueError: a negative count, or none at all.
    """
    config = config or DataConfig()
    folder = Path(folder)
    counts = {"sft": sft, "rl": rl, "heldout": heldout}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"rows to write must be >= 0 and not all 0, got {counts}")
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "sft": lambda index: sft_record(_row(config, index)),
        "rl": lambda index: rl_record(_question(config, index, "train")),
        "heldout": lambda index: rl_record(_question(config, index, "heldout")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, count in counts.items():
        if count:
            path = folder / f"{name}.jsonl"
            _write_lines(path, map(makers[name], range(count)))
            written[path] = count
    return written


def _row(config: DataConfig, index: int) -> SftRow:
    from thyme.data.synthetic import sft_rows

    return sft_rows(
        config.seed,
        1,
        config.mix,
        material=config.material,
        no_code=config.no_code,
        no_code_scenarios=config.no_code_scenarios,
        no_code_answer=config.no_code_answer,
        box_noise=config.box_noise,
        start=index,
    )[0]


def _question(config: DataConfig, index: int, split: Split) -> Question:
    from thyme.data.synthetic import questions

    return questions(config.seed, 1, config.mix, split, material=config.material, start=index)[0]


def _prompt(question: Question) -> str:
    if question.image is None:
        return text_prompt(question.question)
    return user_prompt(question.question, question.image_path, question.image_size)


def _write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    partial.replace(path)
