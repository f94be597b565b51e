"""Rows that a later step would refuse: each is named, with what to do, and none ends the check."""

import base64
import io
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from thyme.cli import main
from thyme.data import check
from thyme.data.check import CheckReport, check_file, plain_processor
from thyme.data.pictures import decode_image
from thyme.data.tables import json_lines
from thyme.data.tags import tag_problems
from thyme.verbs.data_check import training_steps


def _png(width: int = 60, height: int = 40, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bomb() -> bytes:
    """The header of a PNG of 20,000 x 20,000 pixels."""
    data = bytearray(_png())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _rl(**changes: Any) -> dict[str, Any]:
    content = "<image>\nHow many?"
    row = {"messages": [{"role": "user", "content": content}], "images": [_text(_png())], "question": "How many?"}
    return row | {"solution": "3"} | changes


def _sft(response: str = "<think>a</think>\n<answer>3</answer>", **changes: Any) -> dict[str, Any]:
    images = [_text(_png())] * (1 + response.count("<image>"))
    return {"image": images, "question": "<image>\nHow many?", "response": response} | changes


def _check(tmp_path: Path, *rows: Any) -> CheckReport:
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return check_file(path, later=training_steps(plain_processor()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # pictures
        (_rl(images=[_text(_bomb())]), "image 0 cannot be read"),
        (_rl(images=[_text(_png(2010, 10))]), "aspect ratio"),
        (_rl(images=[_text(_png()[:60])]), "image 0 cannot be read"),
        (_rl(images=[_text(b"no picture")]), "not an image format"),
        (_rl(images=["/data/a.png"]), "no file that can be read at /data/a.png"),
        (_rl(images=[{"path": "a.png", "bytes": None}]), "no file that can be read at a.png in "),
        (_rl(images=[{"bytes": None}]), "without 'bytes' and without 'path'"),
        (_rl(images=["https://example.org/a.png"]), "an address"),
        (_rl(images=["file:///dev/./zero"]), "no file that can be read at file:///dev/./zero"),
        (_rl(images=["a\0.png"]), "no file that can be read"),
        (_rl(images=[7]), "int is no picture"),
        (_rl(images=[[1, 2, 999]]), "holds no bytes"),
        (_rl(images={"a": 1}), "images must be a list"),
        (_rl(images=[_text(_png())] * 2), "1 <image> in the text, 2 in images"),
        (_sft(image=[_text(_png(1, 300))]), "aspect ratio"),
        # text
        (_rl(question="What is \ud83d?"), "question holds half a character"),
        (_rl(messages=[{"role": "user", "content": "<image>\udc00"}]), "the user's turn holds half a character"),
        (_sft("<think>\ud83d</think>\n<answer>3</answer>"), "response holds half a character"),
        (_rl(question=" "), "question must be text"),
        (
            _rl(question="\u200b\ufeff", messages=[{"role": "user", "content": "<image>\u2060"}]),
            "question must be text",
        ),
        (_sft("<think>a</think>\n<answer>\u200b</answer>"), "the <answer> is empty"),
        (_rl(solution=3), "solution must be text"),
        (_rl(solution="<answer></answer>"), "the solution itself earns nothing"),
        # answers and tags
        (_sft("<think>a</think>\n<answer>3</answer>\n<answer>4</answer>"), "the format earns nothing"),
        (_sft("<think>a</think>\n<answer>3</answer> and more"), "the format earns nothing"),
        (_sft("<think>a</think>\n<answer> </answer>"), "the <answer> is empty"),
        (_sft("<think><code>x</think></code>\n<answer>3</answer>"), "<think> is never closed"),
        (_sft("<think>a<answer>3</think></answer>"), "</think> at character 17 crosses <answer>"),
        (_sft("<think>a<sandbox_output>1</sandbox_output></think>\n<answer>3</answer>"), "follows no </code>"),
        (
            _sft("<think><code>1<sandbox_output>1</sandbox_output></code></think>\n<answer>3</answer>"),
            "opens inside <code>",
        ),
        (_sft("<think>a</think>\n<code>print('<answer>3</answer>')</code>"), "no <answer> that decoding would see"),
        # layouts
        ({"prompt": [], "data_source": "x", "reward_model": {"ground_truth": "3"}}, "one user turn, found 0"),
        ({"prompt": "Why?", "data_source": "x", "reward_model": {"ground_truth": None}}, "ground_truth is None"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "solution must be text"),
        ({"conversations": [{"from": "function", "value": "x"}]}, "a turn of 'function'"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "a part of type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds no picture"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "one user turn, found 2"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "no <answer>"),
        ({"text": "x"}, "'text' are the keys of no layout (thyme: image, question, response"),
        ({"conversations": [], "prompt": "x", "data_source": "y"}, "fit verl and sharegpt: say which"),
        (7, "a int, not an object"),
        # bytes
        (b'{"question": "\xff\xfe"}', "not UTF-8: byte 0xff at 14"),
        (b"\xef\xbb\xbf{}", "a byte order mark"),
        (b"[" * 50_000, "not JSON: RecursionError"),
        (b'[{"question": "x"},', "one JSON array?"),
        (b'{"response": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_row_is_named_and_the_rest_is_read(row: Any, message: str, tmp_path: Path) -> None:
    report = _check(tmp_path, _rl(), row, _sft())
    assert {problem.row for problem in report.problems} == {2} and report.bad_rows == 1
    lines = [str(problem) for problem in report.problems]
    assert any(message in line for line in lines), lines
    for line in lines:
        assert line.startswith(f"{tmp_path / 'rows.jsonl'}: row 2: ") and "\n" not in line and len(line) <= 500
        line.encode("utf-8")


GOOD = [
    _rl(),
    _rl(images=None, messages=[{"role": "user", "content": "How many?"}]),
    _sft(),
    _sft("<think><code>x</code>\n<sandbox_output><image></sandbox_output></think>\n<answer>3</answer>"),
    _sft(
        "<think><code>'<sandbox_output </answe'</code><sandbox_output>1</sandbox_output>b</think>\n<answer>3</answer>"
    ),
    _rl(images=[{"bytes": _text(_png()), "path": "a.png"}]),
    _rl(images=[{"bytes": list(_png())}]),
    _rl(images=["data:image/png;base64," + _text(_png())]),
    _rl(images=["DATA:IMAGE/PNG;BASE64," + _text(_png())]),
    _rl(images=["\n".join(_text(_png())[i : i + 20] for i in range(0, 400, 20))]),
    _rl(images=[_text(_png(2000, 10))]),
    _rl(images=[_text(_png(1, 1, "I;16"))]),
    _rl(question="多少？", solution="\\frac{1}{2}"),  # noqa: RUF001
]


@pytest.mark.parametrize("row", GOOD, ids=range(len(GOOD)))
def test_a_good_row_passes(row: dict[str, Any], tmp_path: Path) -> None:
    if isinstance(row.get("images"), list) and row["images"] and isinstance(row["images"][0], str):
        assert decode_image(row["images"][0]).mode == "RGB"
    assert _check(tmp_path, row).problems == ()


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), OSError("disk"), ValueError("odd")])
def test_whatever_a_later_step_raises_is_a_line(error: Exception, tmp_path: Path) -> None:
    def later(row: Any) -> Any:
        raise error

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(_rl()) + "\n" + json.dumps(_sft()) + "\n")
    report = check_file(path, later=later)
    assert [p.row for p in report.problems] == [1, 2] and type(error).__name__ in report.problems[0].message


def test_files_that_are_no_jsonl_are_said_to_be_what_they_are(tmp_path: Path) -> None:
    for name, data, what in (
        ("a.jsonl", b"PAR1....", "Parquet"),
        ("b.jsonl", b"\x1f\x8b....", "gzip"),
        ("c.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("d.tsv", b"index\timage\n", "table"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=what):
            check_file(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        check_file(tmp_path)


def test_a_large_file_takes_the_memory_of_its_largest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(check, "MAX_KEPT", 5)
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": "x" * 50_000}) + "\n")
        file.write('{"text": "' + "x" * 10_000_000 + '"}\n{"text": 1}\n')
    told: list[int] = []
    tracemalloc.start()
    report = check_file(path, later=lambda row: iter(()), on_problem=lambda problem: told.append(problem.row))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told == list(range(1, 303)) and report.bad_rows == 302 and len(report.problems) == 5
    assert peak < 2_000_000


def test_the_verb_prints_a_line_a_problem_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (_rl(), _rl(images=[_text(_bomb())]), _sft(), {"text": "\ud83d"}))))
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(path)])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == ["row 2", "row 4"] and len(lines) == 4
    assert lines[2] == f"{path}: 1 SFT rows, 2 RL rows, 3 images"
    assert lines[3] == f"{path}: 2 bad rows: 1 picture, 1 layout"
    assert "2 bad rows" in captured.err
    path.write_text(json.dumps(_rl()))
    main(["data", "check", str(path)])


def test_inside_of_code_a_tag_is_text() -> None:
    assert not list(tag_problems("<think><code>'</think><answer>'</code></think>\n<answer>3</answer>"))


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_folder_of_other_files_is_checked_too(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_sft(), _sft(image=[]), _sft("<think>a</think>")]
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"a{suffix}")
    else:
        (tmp_path / f"a{suffix}").write_text(json.dumps(rows, indent=1))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns, "solution": "so"}) + "\n")
    with pytest.raises(SystemExit):
        main(["data", "check", str(tmp_path)])
    captured = capsys.readouterr()
    problems = [line for line in captured.out.splitlines() if ": row " in line]
    assert [line.split(": ")[1] for line in problems] == ["row 2", "row 3"]
    assert f"a{suffix}: 2 bad rows: 1 picture count, 1 no answer" in captured.out
    assert "b.jsonl: 1 rows with another system prompt, in whose place training puts ours" in captured.out
    with pytest.raises(SystemExit):
        main(["data", "check", str(tmp_path / "b.jsonl"), "--format", "verl"])
