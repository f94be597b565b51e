"""Tables of text: quoted fields, rows that cannot be read, and one row at a time."""

import base64
import os
from pathlib import Path

import pytest

from thyme.data.refusal import BadRow
from thyme.data.tables import delimited
from thyme.data.tables.delimited import Delimited


def table(folder: Path, text: str | bytes, name: str = "rows.tsv") -> Delimited:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Delimited(path)


def test_rows_are_found_again_by_the_byte_they_begin_at(tmp_path: Path) -> None:
    rows = table(tmp_path, 'index\tquestion\n0\t"two\nlines, a ""quote"" and a\ttab"\n\n1\tplain\n2\tü\n')
    entries = list(rows.scan())
    assert [entry.number for entry in entries] == [1, 2, 3]
    assert entries[0].value == {"index": "0", "question": 'two\nlines, a "quote" and a\ttab'}
    assert [rows.read(entry.position) for entry in reversed(entries)] == [entry.value for entry in reversed(entries)]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_name(tmp_path: Path) -> None:
    assert [e.value for e in table(tmp_path, "\ufeffindex\ta\r\n0\tx\r\n").scan()] == [{"index": "0", "a": "x"}]


def test_a_byte_order_mark_stands_before_a_quoted_name_too(tmp_path: Path) -> None:
    rows = table(tmp_path, '\ufeff"index"\t"a"\r\n"0"\t"x\ny"\r\n"1"\t"z"\r\n')
    entries = list(rows.scan())
    assert [e.value for e in entries] == [{"index": "0", "a": "x\ny"}, {"index": "1", "a": "z"}]
    assert [rows.read(entry.position) for entry in entries] == [entry.value for entry in entries]


def test_columns_without_a_name_are_not_in_the_way(tmp_path: Path) -> None:
    (entry,) = table(tmp_path, "index\ta\t\t\n0\tx\t\t\n").scan()
    assert entry.value == {"index": "0", "a": "x", "": ""}


def test_commas_separate_in_csv(tmp_path: Path) -> None:
    assert [e.value for e in table(tmp_path, 'a,b\n"1,5",2\n', "rows.csv").scan()] == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1\tcut", "wrong number of fields"),
        (b"1\t2\t3\t4", "wrong number of fields"),
        (b"1\t\xff\xfe\t3", "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_and_the_next_one_read(tmp_path: Path, row: bytes, reason: str) -> None:
    rows = table(tmp_path, b"a\tb\tc\n0\tx\ty\n" + row + b"\n2\tx\ty\n")
    entries = list(rows.scan())
    assert [entry.refusal and entry.refusal.reason for entry in entries] == [None, reason, None]
    assert entries[2].value == {"a": "2", "b": "x", "c": "y"}
    with pytest.raises(BadRow):
        rows.read(entries[1].position)


@pytest.mark.parametrize("text", ["", "\n", "\t\t\n"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.tsv: is empty"):
        table(tmp_path, text)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        table(tmp_path, "a\tb\ta\n")


def test_a_quote_that_nobody_closes_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_FIELD_BYTES", 1000)
    delimited.csv.field_size_limit(1000)
    rows = table(tmp_path, "a\tb\n" + f'0\t"{"x" * 400}\n' + f"1\t{'y' * 400}\n" * 3 + "9\tz\n")
    try:
        entries = list(rows.scan())
    finally:
        delimited.csv.field_size_limit(1 << 28)
    assert entries[0].refusal is not None and entries[0].refusal.reason == "not a row"
    assert entries[-1].value == {"a": "9", "b": "z"}


def test_pictures_of_many_megabytes_pass(tmp_path: Path) -> None:
    picture = base64.b64encode(os.urandom(3 << 20)).decode()
    rows = table(tmp_path, f"index\timage\n0\t{picture}\n1\t{picture}\n")
    assert all(entry.value["image"] == picture for entry in rows.scan())
