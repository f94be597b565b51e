"""Files as tables: every row in order, any row by its position, and no more in memory than a few rows."""

import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from thyme.data.refusal import BadRow
from thyme.data.tables import parquet as parquet_module
from thyme.data.tables.json_lines import JsonLines
from thyme.data.tables.opening import data_files, open_table
from thyme.data.tables.parquet import Parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_any_row_of_json_lines_is_read_by_its_position(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\u00e4"}\n\n  \nnot json\n{"a": 2}', "utf-8")
    table = open_table(path)
    entries = list(table.scan())
    assert [entry.number for entry in entries] == [1, 4, 5]
    assert [entry.value for entry in entries] == [{"a": "\u00e4"}, None, {"a": 2}]
    assert entries[1].refusal is not None and entries[1].refusal.reason == "not JSON"
    assert table.read(entries[2].position) == {"a": 2} and table.read(entries[0].position) == {"a": "\u00e4"}
    with pytest.raises(BadRow, match="not JSON"):
        table.read(entries[1].position)


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', '[{"a": 1}, {"a": 2}]'])
def test_a_byte_order_mark_costs_no_row(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, "utf-8-sig")
    table = open_table(path)
    assert [table.read(entry.position) for entry in table.scan()] == [{"a": 1}, {"a": 2}]
    assert [entry.value for entry in table.scan()] == [{"a": 1}, {"a": 2}]


def test_ten_thousand_lines_are_passed_over_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"i": i, "image": "A" * 2_000}) + "\n" for i in range(10_000))
    tracemalloc.start()
    positions = [entry.position for entry in JsonLines(path).scan()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(positions) == 10_000 and peak < 2_000_000 < path.stat().st_size
    assert JsonLines(path).read(positions[9_876])["i"] == 9_876


def test_one_json_array_is_read_row_by_row(tmp_path: Path) -> None:
    text = '\u00e4\u56fe \\" ]},'
    rows: list[Any] = [{"text": text * (i % 7), "image": "A" * (3_000 * (i % 5)), "i": i} for i in range(200)]
    rows[3] = 12
    path = tmp_path / "rows.json"
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}):
        path.write_text(" \n" + json.dumps(rows, **options) + "\n", "utf-8")  # type: ignore[arg-type]
        table = open_table(path)
        entries = list(table.scan())
        assert [entry.value for entry in entries] == rows and [entry.number for entry in entries] == list(range(1, 201))
        assert [table.read(entry.position) for entry in reversed(entries)] == rows[::-1]
    assert list(open_table(_text(path, "[]")).scan()) == []
    for broken, what in (('[{"a": 1}, {"a"', "at byte 11: no JSON"), ('[{"a": 1}', "at byte 9: it breaks off")):
        with pytest.raises(ValueError, match=what):
            list(open_table(_text(path, broken)).scan())


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["large_string", "binary", "struct"])
def test_parquet_gives_the_lists_it_was_given(kind: str, tmp_path: Path) -> None:
    types = {
        "large_string": pa.list_(pa.large_string()),
        "binary": pa.list_(pa.binary()),
        "struct": pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    }
    pictures: Any = {
        "large_string": ["QUJD", "REVG"],
        "binary": [b"ABC", b"DEF"],
        "struct": [{"bytes": b"ABC", "path": None}, {"bytes": None, "path": "a.png"}],
    }[kind]
    column = pa.array([pictures, [], None], type=types[kind])
    pq.write_table(pa.table({"image": column, "question": ["a", "b", "c"]}), tmp_path / "x.parquet")
    table = open_table(tmp_path / "x.parquet")
    assert [table.read(i)["image"] for i in range(3)] == [pictures, [], None]
    assert [entry.value for entry in table.scan({"image"})] == [{"question": name} for name in "abc"]


def test_a_row_group_is_read_once_for_all_threads_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"i": i, "picture": bytes([i]) * 10_000} for i in range(40)]
    table = Parquet(_write(tmp_path / "x.parquet", rows, row_group_size=10, compression="none", use_dictionary=False))
    read: list[int] = []
    group = Parquet._group
    monkeypatch.setattr(Parquet, "_group", lambda self, index: read.append(index) or group(self, index))
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 250_000)
    cache = parquet_module._Groups()
    monkeypatch.setattr(parquet_module, "_cache", cache)
    assert {table.block(i)[0] for i in range(10, 20)} == {1} and table.block(9)[1] > 100_000
    found: list[int] = []
    threads = [threading.Thread(target=lambda i=i: found.append(table.read(i)["i"])) for i in range(10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(10, 20)) and read == [1]
    for position in (0, 20, 30, 39, 0):
        table.read(position)
        assert cache.bytes() <= 250_000
    assert read == [1, 0, 2, 3, 0]


def test_files_that_are_no_tables_are_said_to_be_what_they_are(tmp_path: Path) -> None:
    for name, data, what in (
        ("a.jsonl", b"\x1f\x8b....", "a gzip file"),
        ("b.jsonl", b"PK\x03\x04..", "a zip file"),
        ("c.jsonl", "{}".encode("utf-16"), "a UTF-16 file"),
        ("d.csv", b"index,image\n", "a table of text"),
        ("e.parquet", b"version https://git-lfs", "no parquet file"),
        ("f.parquet", b"PAR1" + b"x" * 100, "a damaged parquet file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"data file .*{name}: is {what}|{what}"):
            open_table(tmp_path / name)


def test_a_damaged_page_is_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"text": f"{i:04d}" * 2_000} for i in range(4)]
    path = _write(tmp_path / "x.parquet", rows, row_group_size=2, compression="gzip")
    data = bytearray(path.read_bytes())
    data[20:60] = bytes(40)
    path.write_bytes(bytes(data))
    table = open_table(path)
    with pytest.raises(BadRow, match="cannot be read"):
        table.read(0)
    assert table.read(3)["text"].startswith("0003")
    with pytest.raises(ValueError, match="a damaged parquet file"):
        list(table.scan())


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "x.parquet", [{"a": 1}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install thyme\[data\]"):
        open_table(path)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "sub/c.json", ".cache/d.jsonl", "notes.txt"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    files = data_files([tmp_path / "set"])
    assert [str(file.relative_to(tmp_path / "set")) for file in files] == ["a.parquet", "b.jsonl", "sub/c.json"]
    with pytest.raises(ValueError, match=r"b\.jsonl: named twice"):
        data_files([tmp_path / "set", tmp_path / "set" / "b.jsonl"])
    assert data_files([tmp_path / "set" / "*.jsonl"]) == [tmp_path / "set" / "b.jsonl"]
    with pytest.raises(ValueError, match=r"\*\.csv: no file matches"):
        data_files([tmp_path / "set" / "*.csv"])
    with pytest.raises(ValueError, match="nowhere: no such file"):
        data_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no \*\.parquet"):
        data_files([tmp_path / "empty"])
