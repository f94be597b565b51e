"""Every layout written and read again is the same row; what cannot be used is left out, and no half file stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import FIRST, HDD, RESPONSE, SECOND, b64, png, thyme_rl, thyme_sft
from thyme.cli import main
from thyme.data import convert as convert_module
from thyme.data.config import DataConfig
from thyme.data.convert import convert
from thyme.data.layouts.known import LAYOUTS
from thyme.data.sources import open_data
from thyme.data.tables.opening import open_table

pytest.importorskip("pyarrow")

TEXT_ONLY = {"question": "What is 6 * 7?", "response": "<think>a</think>\n<answer>42</answer>", "image": []}


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _told(path: Path, kind: Any) -> list[Any]:
    """All that a stage sees of the rows of a file but their ids."""
    out: list[Any] = []
    for row in open_data([path], DataConfig(), kind):
        question = row.question if kind == "sft" else row
        said = (row.prompt, row.response, [i.tobytes() for i in row.images]) if kind == "sft" else ()
        pictures = [(name, picture.tobytes()) for name, picture in question.pictures]
        out.append((said, question.question, question.solution, pictures))
    return out


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("to", LAYOUTS)
def test_what_is_written_reads_back_the_same(to: Any, suffix: str, tmp_path: Path) -> None:
    rows = {
        "sft": [thyme_sft(0), TEXT_ONLY, thyme_sft(1, image=[b64(png(90, 70, "#10203040", "RGBA")), b64(SECOND)])],
        "rl": [thyme_rl(0), thyme_rl(1, images=[b64(png(20, 30))])],
    }
    for kind in ("sft", "rl"):
        if (to, kind) in (("verl", "sft"), ("sharegpt", "rl")):
            continue
        source = _jsonl(tmp_path / f"{kind}.jsonl", rows[kind])
        out = tmp_path / "out" / f"{kind}{suffix}"
        report = convert([source], out, to)
        assert report.written == len(rows[kind]) and not report.left_out
        assert _told(out, kind) == _told(source, kind)
        assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []
        (first, *_) = (entry.value for entry in open_table(out).scan())
        assert LAYOUTS[to].recognizes({key: value for key, value in first.items() if value is not None})
        assert HDD not in json.dumps(first, default=str)
        back = tmp_path / "back" / f"{kind}.jsonl"
        convert([out], back, "thyme")
        again = tmp_path / "again" / f"{kind}.jsonl"
        convert([back], again, "thyme")
        assert back.read_bytes() == again.read_bytes() and _told(back, kind) == _told(source, kind)
        back.unlink()
        again.unlink()


def test_image_files_are_copied_byte_by_byte(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    convert([_jsonl(tmp_path / "a.jsonl", [thyme_rl(0)])], out, "verl")
    assert open_table(out).read(0)["images"] == [{"bytes": FIRST, "path": None}]


def test_demonstrations_become_questions_where_a_layout_has_no_response(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "a.jsonl", [thyme_sft(3), thyme_rl(4)])
    report = convert([source], tmp_path / "out.jsonl", "verl")
    assert report.written == 2
    assert [(q.question, q.solution, q.scenario) for q in open_data([tmp_path / "out.jsonl"], DataConfig(), "rl")] == [
        ("Which digit is on sign 3?", "7", "a"),
        ("Which digit is on sign 4?", "7", "a"),
    ]
    report = convert([source], tmp_path / "b.jsonl", "sharegpt")
    assert (report.written, report.left_out) == (1, {"no response": 1})
    report = convert([source], tmp_path / "b.parquet", "thyme")
    assert (report.written, report.left_out) == (1, {"another kind": 1})


def test_parquet_is_written_in_groups_and_no_more_rows_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(convert_module, "ROW_GROUP_BYTES", 3 * len(RESPONSE))
    source = _jsonl(tmp_path / "a.jsonl", [thyme_sft(i) for i in range(12)])
    convert([source], tmp_path / "out.parquet", "messages")
    metadata = pq.ParquetFile(tmp_path / "out.parquet").metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(sizes) == 12 and max(sizes) <= 3 and len(sizes) >= 4


def test_the_verb_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = thyme_sft(1, response=RESPONSE.replace("</code>", ""))
    unread = thyme_sft(2, image=["QUJD", b64(SECOND)])
    (tmp_path / "in").mkdir()
    _jsonl(tmp_path / "in" / "a.jsonl", [thyme_sft(0), bad, unread])
    _jsonl(tmp_path / "in" / "b.jsonl", [bad, thyme_sft(3)])
    extra = _jsonl(tmp_path / "c.jsonl", [thyme_sft(4)])
    out = tmp_path / "out.jsonl"
    main(["data", "convert", str(tmp_path / "in"), str(extra), str(out), "--to", "openai"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"left out 2 rows, tags: the first is {tmp_path}/in/a.jsonl: row 2: ")
    assert lines[1].startswith("left out 1 rows, picture: ") and lines[2] == f"{out}: 3 rows"
    main(["data", "check", str(out)])
    assert capsys.readouterr().out == f"{out}: 3 SFT rows, 0 RL rows, 6 images\n"


def test_a_file_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _jsonl(tmp_path / "a.jsonl", [thyme_rl(0, images=["QUJD"])])
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes(b"PAR1" + bytes(50))
    out = tmp_path / "out.jsonl"
    for paths, words in (
        ([source, out], "no row to write: "),
        ([_jsonl(tmp_path / "c.jsonl", [thyme_rl(0)]), damaged, out], "a damaged parquet file"),
        ([source, source], "exists already"),
        ([source, tmp_path / "out.csv"], "ends in .jsonl or .parquet"),
        ([source], "OUT missing"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "convert", *map(str, paths)])
        assert words in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []
