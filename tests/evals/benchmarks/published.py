"""Rows in the layouts that benchmarks are published in, made small."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def picture(color: str = "red", size: tuple[int, int] = (56, 56)) -> str:
    """A picture as base64."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table as pandas writes it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice(index: int, answer: str = "A", **more: Any) -> dict[str, Any]:
    """A row of a multiple choice benchmark."""
    row = {"index": index, "image": picture(), "question": f"Question {index}?", "A": "red", "B": "blue"}
    return row | {"answer": answer, "category": "color"} | more


ROWS: dict[str, list[dict[str, Any]]] = {
    "VStarBench": [
        choice(0, category="direct_attributes", C="green", D="black"),
        choice(1, "B", category="relative_position", C="", D=""),
    ],
    "HRBench4K": [
        choice(4 * q + cycle, "AB"[cycle % 2], category=category, cycle_category=cycle, question=f"Question {q}?")
        for q, category in enumerate(("single", "cross", "cross"))
        for cycle in range(4)
    ],
    "MME-RealWorld-Lite": [
        {
            "index": i,
            "image": picture(),
            "question": "Which?",
            "multi-choice options": str([f"({letter}) text {letter}" for letter in "ABCDE"]),
            "answer": "ABCDE"[i],
            "category": category,
            "l2-category": "person/attribute/color",
        }
        for i, category in enumerate(
            ("Perception/Monitoring", "Perception/OCR with Complex Context", "Reasoning/Monitoring")
        )
    ],
    "HallusionBench": [
        {
            "index": f"x_VD_ocr_{set_id}_{figure}_{question}",
            "image": picture(),
            "question": "Is it red?",
            "answer": "Yes" if (figure + question) % 2 else "No",
            "category": "VD",
            "l2-category": "ocr",
        }
        for set_id in range(2)
        for figure in range(2)
        for question in range(2)
    ],
    "OCRBench": [
        {
            "index": 0,
            "image": picture(),
            "question": "Text?",
            "answer": "['STOP', 'Stop sign']",
            "category": "Scene Text-centric VQA",
        },
        {
            "index": 1,
            "image": picture(),
            "question": "Formula?",
            "answer": "['x ^ 2']",
            "category": "Handwritten Mathematical Expression Recognition",
        },
        {
            "index": 2,
            "image": picture(),
            "question": "Word?",
            "answer": "['abc']",
            "category": "Irregular Text Recognition",
        },
    ],
    "ChartQA_TEST": [
        {"index": i, "image": picture(), "question": "How much?", "answer": "['100']", "split": split}
        for i, split in enumerate(("test_human", "test_augmented"))
    ],
    "MathVista_MINI": [
        {
            "index": 0,
            "image": picture(),
            "question": "How many?",
            "question_type": "multi_choice",
            "choices": "['3', '4']",
            "answer": "4",
            "task": "geometry",
        }
    ],
    "LogicVista": [
        {"index": 0, "image": picture(), "question": "Which?", "answer": "A, C", "skill": "inductive, spatial"}
    ],
}
"""Rows by benchmark; a benchmark that is not here has the layout of one that is."""


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON array."""
    path.write_text(json.dumps(list(rows)))
    return path
