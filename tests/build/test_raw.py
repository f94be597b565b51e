"""Raw rows of every layout, of several files, and plans over them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import FIRST, b64, thyme_rl, thyme_sft
from thyme.build.boxes import Box
from thyme.build.config import BuildConfig, SharesConfig
from thyme.build.plan import Plan
from thyme.build.raw import RawRows, read_raw
from thyme.data.refusal import BadRow
from thyme.shard import Shard


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_rows_and_released_rows_are_read_alike(tmp_path: Path) -> None:
    extra = {"box": [1, 2, 30, 20], "category": "OCR", "source": "signs"}
    plain = {"image": b64(FIRST), "question": "<image>Which digit is on sign 7?", "answer": 7} | extra
    found = [read_raw(row, "r:1", tmp_path) for row in (plain, thyme_rl(7) | extra, thyme_sft(7) | extra)]
    for raw in found:
        assert raw.question == "Which digit is on sign 7?" and raw.answer == "7" and raw.box == Box(1, 2, 30, 20)
        assert raw.image is not None and raw.image.size == (60, 40) and raw.data == FIRST
        assert (raw.category, raw.source) == ("OCR", "signs")
        assert raw.image_path.startswith("/mnt/data/")
    text = read_raw({"question": "What is 2 + 2?", "solution": "4"}, "r:2", tmp_path)
    assert (text.image, text.image_path, text.answer) == (None, "", "4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box": [1, 2, 3]}, "is none"),
        ({"box": [9, 2, 3, 8]}, "holds nothing"),
        ({"box": [1, 2, 61.5, 20]}, "lies outside of a picture of 60x40"),
        ({"image": "QUJD"}, "cannot be read"),
        ({"image": None}, "lies outside of no picture"),
        ({"question": "  "}, "asks nothing"),
        ({"question": None}, "keys of no layout"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    row = {"image": b64(FIRST), "question": "Which?", "answer": "A", "box": [1, 2, 30, 20]} | change
    with pytest.raises(BadRow, match=words):
        read_raw(row, "r:1", tmp_path)


def test_rows_by_index_over_files_of_both_kinds(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    one = write(tmp_path / "a" / "raw.jsonl", [thyme_rl(1), {"nothing": 1}, thyme_rl(2)])
    two = write(tmp_path / "b" / "raw.jsonl", [{"question": "What is 1 + 1?", "answer": "2"}])
    boxed = {"image": [b64(FIRST)], "question": "Which?", "answer": "A", "box": [1.0, 2.0, 30.0, 20.0]}
    pq.write_table(pa.Table.from_pylist([boxed, boxed | {"box": None}]), tmp_path / "c.parquet")
    raw = RawRows([one, two, tmp_path / "c.parquet"])
    assert [raw.name(i) for i in range(len(raw))] == ["a/raw:1", "a/raw:3", "b/raw:1", "c:1", "c:2"]
    assert raw.left_out == {"layout": 1}
    assert [tuple(raw.traits(i)) for i in range(len(raw))] == [
        (True, False, False),
        (True, False, False),
        (False, False, True),
        (True, True, False),
        (True, False, False),
    ]
    assert [raw.read(i).answer for i in (1, 2, 3)] == [thyme_rl(2)["solution"], "2", "A"]
    with pytest.raises(ValueError, match="no raw row that can be used: 1 layout"):
        RawRows([write(tmp_path / "bad.jsonl", [{"nothing": 1}])])


def test_a_plan_shares_rows_out_by_recipe_and_seed_alone(tmp_path: Path) -> None:
    row = {"image": "none.png", "question": "Which?", "answer": "A", "box": [1, 2, 30, 20]}  # no picture is read
    raw = RawRows([write(tmp_path / "raw.jsonl", [row] * 300)])
    shares = SharesConfig(no_code=1, crop=2, rotation=0, contrast=0, operations=0, zoom=1, correction=0)
    config = BuildConfig(shares=shares)
    plan = Plan(raw, config)
    counts = Counter(plan[i].scenario for i in range(len(plan)))
    assert set(counts) == {"no_code", "crop", "zoom"} and 120 < counts["crop"] < 180 and 50 < counts["zoom"] < 100
    assert [plan[i] for i in range(300)] == [Plan(raw, config)[i] for i in range(300)]
    some = Plan(raw, BuildConfig(count=50, seed=3))
    assert len(some) == 50 and len({some[i].row for i in range(50)}) == 50
    assert some.identity() == Plan(raw, BuildConfig(count=50, seed=3, concurrency=2)).identity()
    assert some.identity() != Plan(raw, BuildConfig(count=50, seed=4)).identity()
    parts = [set(plan.of(Shard(i, 4))) for i in range(1, 5)]
    assert set.union(*parts) == set(range(300)) and sum(map(len, parts)) == 300
