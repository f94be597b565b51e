"""A data set of own files: what is usable, in which order, and what stands in for a row that is not."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.rows import FIRST, RESPONSE, SECOND, b64, png, thyme_rl, thyme_sft
from thyme.data import sources
from thyme.data.config import DataConfig
from thyme.data.sources import DataSet, open_data
from thyme.data.tables import parquet as parquet_module
from thyme.rollout.prompts import SYSTEM_PROMPT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def _asked(data: DataSet[Any]) -> list[str]:
    return [item.question.question if data.kind == "sft" else item.question for item in data]


def test_a_folder_of_two_shards_is_one_data_set(tmp_path: Path) -> None:
    for shard in range(2):
        rows = [thyme_sft(10 * shard + i) for i in range(5)]
        _parquet(tmp_path / f"single_round-0000{shard}-of-00002.parquet", rows, row_group_size=2)
    data = open_data([tmp_path], DataConfig(), "sft")
    assert len(data) == 10 and not data.left_out
    assert _asked(data) == [f"Which digit is on sign {n}?" for n in (*range(5), *range(10, 15))]
    assert data[7].question.id == "single_round-00001-of-00002:3" and data[-1] is not None
    assert {row.scenario for row in data} == {"single_round"}
    assert [row.question.id for row in data[2:4]] == [data[2].question.id, data[3].question.id]
    with pytest.raises(IndexError, match="row 10 of 10"):
        data[10]


def test_dirty_rows_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    text = _jsonl(
        tmp_path / "mixed.jsonl",
        [
            thyme_sft(0),
            "not json",
            thyme_sft(1, response=RESPONSE.replace("</code>", "")),
            thyme_sft(2, response="<think>a</think>\n<answer> </answer>", image=[b64(FIRST)]),
            thyme_sft(3, response="<think>a</think>", image=[b64(FIRST)]),
            thyme_sft(4, image=[b64(FIRST)]),
            {"messages": [{"role": "user", "content": "6 * 7?"}], "solution": "42"},
            {"text": "x"},
            thyme_sft(5),
            {"question": "What is 6 * 7?", "response": "<think>a</think>\n<answer>42</answer>", "image": []},
        ],
    )
    data = open_data([text], DataConfig(), "sft")
    assert _asked(data) == ["Which digit is on sign 0?", "Which digit is on sign 5?", "What is 6 * 7?"]
    assert data[2].question.image is None and [data[i].question.id for i in range(3)] == [
        "mixed:1",
        "mixed:9",
        "mixed:10",
    ]
    reasons = ("not JSON", "tags", "empty answer", "no answer", "picture count", "no response", "layout")
    assert data.left_out == Counter(dict.fromkeys(reasons, 1))
    assert data.summary().startswith("3 rows of 1 files; left out 7: ")
    assert f"1 tags ({text}: row 3: " in data.summary()


def test_demonstrations_serve_as_questions_and_questions_do_not_as_demonstrations(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [thyme_sft(0), thyme_rl(1)])
    data = open_data([path], DataConfig(), "rl")
    assert [(q.solution, len(q.pictures)) for q in data] == [("7", 1), ("7", 1)]
    only = _jsonl(tmp_path / "rl.jsonl", [thyme_rl(1)] * 3)
    with pytest.raises(ValueError, match=r"none of its 3 rows can be used for sft: 3 no response \(.*row 1: response"):
        open_data([only], DataConfig(), "sft")


def test_an_unknown_layout_is_an_error_that_names_keys_and_layouts(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "x.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"'text', 'label' are the keys of no layout.*verl: prompt, reward_model"):
        open_data([path], DataConfig(), "rl")
    with pytest.raises(ValueError, match="no files: name files or folders"):
        open_data([], DataConfig(), "rl")


def test_a_picture_that_cannot_be_read_is_found_when_its_row_is_and_the_next_stands_in(tmp_path: Path) -> None:
    rows = [thyme_rl(i, **({"images": [b64(b"no picture")]} if i in (3, 4) else {})) for i in range(6)]
    rows[5]["images"] = [b64(png(900, 4))]
    path = _parquet(tmp_path / "a.parquet", rows)

    def fits(image: Any) -> None:
        if image.width > 200 * image.height:
            raise ValueError("too long")

    data = open_data([path], DataConfig(), "rl", fits=fits)
    assert len(data) == 6 and not data.left_out
    number = [int(data[i].id.partition(":")[2]) - 1 for i in range(6)]
    assert number == [0, 1, 2, 0, 0, 0] and data.left_out == {"picture": 3}
    assert "image 0 is refused by the picture processor: too long" not in data.summary()  # one example a reason
    fresh = open_data([path], DataConfig(), "rl", fits=fits)
    order = random.Random(0).sample(range(6), 6)
    assert {i: fresh[i].id for i in order} == {i: data[i].id for i in order}
    assert [q.id for q in fresh.first(5)] == ["a:1", "a:2", "a:3"] and len(fresh.first(2)) == 2  # each once
    broken = _parquet(tmp_path / "b.parquet", rows[3:5])
    with pytest.raises(ValueError, match="no row can be used"):
        open_data([broken], DataConfig(), "rl").first(1)
    with pytest.raises(ValueError, match="no row can be used: 2 rows of 1 files; left out 2: 2 picture"):
        open_data([broken], DataConfig(), "rl")[0]


def test_parts_in_parquet_take_their_pictures_from_the_column_beside_them(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Which colour?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "images": images, "solution": "red"}
        for images in ([{"bytes": FIRST, "path": None}], [], [{"bytes": FIRST, "path": None}] * 2)
    ]
    data = open_data([_parquet(tmp_path / "a.parquet", rows)], DataConfig(), "rl")
    assert len(data) == 3 and data[0].image_size == (60, 40)
    assert [q.id for q in data] == ["a:1"] * 3 and data.left_out == {"pictures": 2}


def test_the_number_of_pictures_in_parquet_is_found_when_the_row_is_read(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", [thyme_sft(0), thyme_sft(1, image=[b64(FIRST)]), thyme_sft(2)])
    data = open_data([path], DataConfig(), "sft")
    assert not data.left_out
    assert [row.question.id for row in data] == ["a:1", "a:3", "a:3"] and data.left_out == {"picture count": 1}


def test_item_i_of_the_stream_is_always_the_same_with_bad_rows_in_the_middle(tmp_path: Path) -> None:
    rows = [thyme_rl(i, **({"images": ["QUJD"]} if i == 4 else {})) for i in range(9)]
    path = _parquet(tmp_path / "a.parquet", rows, row_group_size=3)
    whole = [q.id for q in open_data([path], DataConfig(), "rl").stream(3)(0, 27)]
    resumed = open_data([path], DataConfig(), "rl").stream(3)
    assert [q.id for q in resumed(11, 5)] == whole[11:16] and [q.id for q in resumed(2, 3)] == whole[2:5]
    assert whole[:9] != whole[9:18] and whole != [q.id for q in open_data([path], DataConfig(), "rl").stream(4)(0, 27)]
    for epoch in range(3):
        assert len(set(whole[9 * epoch : 9 * epoch + 9])) == 8  # the bad row's place shows its neighbour twice


def test_an_epoch_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [thyme_rl(i) | {"pad": f"{i:03d}" * 3_000} for i in range(60)]
    for shard in range(2):
        part = rows[30 * shard : 30 * shard + 30]
        _parquet(tmp_path / f"s{shard}.parquet", part, row_group_size=5, compression="none", use_dictionary=False)
    group_bytes = 5 * 9_000
    monkeypatch.setattr(sources, "WINDOW_BYTES", 3 * group_bytes)
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 5 * group_bytes)
    cache = parquet_module._Groups()
    monkeypatch.setattr(parquet_module, "_cache", cache)
    read: list[int] = []
    group = parquet_module.Parquet._group
    monkeypatch.setattr(parquet_module.Parquet, "_group", lambda self, index: read.append(index) or group(self, index))
    data = open_data([tmp_path], DataConfig(), "rl")
    order = data.order(0, 0)
    assert sorted(order) == list(range(60)) and not np.array_equal(order, data.order(0, 1))
    held = 0
    for index in order:
        _ = data[int(index)]
        held = max(held, cache.bytes())
    assert len(read) == 12 and held <= 5 * group_bytes
    mixed = order[:10] // 5
    assert len(set(mixed.tolist())) >= 2 and len(set((order[:20] // 30).tolist())) == 2


def test_ids_and_digest_tell_files_apart(tmp_path: Path) -> None:
    for name in ("x/part-0.jsonl", "y/part-0.jsonl", "y/part-1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _jsonl(tmp_path / name, [thyme_rl(1), {"messages": [], "question": "a", "solution": "b"}])
    data = open_data([tmp_path / "x", tmp_path / "y"], DataConfig(), "rl")
    assert [q.id for q in data] == ["x/part-0:1", "y/part-0:1", "y/part-1:1"]
    again = open_data([tmp_path / "x", tmp_path / "y"], DataConfig(), "rl")
    assert data.digest == again.digest and len(data.digest) == 64
    _jsonl(tmp_path / "y/part-1.jsonl", [thyme_rl(1)] * 2)
    assert open_data([tmp_path / "x", tmp_path / "y"], DataConfig(), "rl").digest != data.digest
    for name in ("a.jsonl", "a.json"):
        _jsonl(tmp_path / name, [thyme_rl(1)])
    assert [q.id for q in open_data([tmp_path / "a.jsonl", tmp_path / "a.json"], DataConfig(), "rl")] == [
        "a.jsonl:1",
        "a.json:1",
    ]


def test_another_system_prompt_is_noted_and_replaced(tmp_path: Path) -> None:
    rows = [thyme_rl(i) for i in range(3)]
    rows[0]["messages"][0]["content"] = SYSTEM_PROMPT.replace("\n\n", "\n")
    rows[1]["messages"][0]["content"] = "Call a tool."
    data = open_data([_jsonl(tmp_path / "a.jsonl", rows)], DataConfig(), "rl")
    assert data.notes == {"another system prompt, replaced by ours": 1}
    assert data.summary() == "3 rows of 1 files; 1 with another system prompt, replaced by ours"


def test_relative_pictures_start_from_the_file_or_from_the_folder_said(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(SECOND)
    (tmp_path / "a.png").write_bytes(FIRST)
    path = _jsonl(tmp_path / "rows.jsonl", [thyme_rl(0, images=["a.png"])])
    assert open_data([path], DataConfig(), "rl")[0].image_size == (60, 40)
    assert open_data([path], DataConfig(images=str(tmp_path / "pictures")), "rl")[0].image_size == (28, 18)
