"""Pictures that show the same, and those that do not; rows that repeat, share, leak."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from thyme.cli import main
from thyme.data.dedup import DISTANCE, DedupReport, Match, dedup, perceptual_hash


def photograph(number: int) -> Image.Image:
    """A picture with coarse and fine structure, of its number alone."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse = small.resize((320, 240), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 10, (240, 320, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 60) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def b64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def row(image: Image.Image, question: str = "What is it?") -> dict[str, Any]:
    return {"image": b64(image), "question": question, "answer": "A"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_what_is_done_to_a_picture_leaves_its_hash_and_another_picture_has_another() -> None:
    hashes = [perceptual_hash(photograph(n)) for n in range(40)]
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > DISTANCE
    for number in range(8):
        image = photograph(number)
        for changed in (
            image.resize((160, 120)),
            image.resize((640, 480)),
            jpeg(image),
            ImageEnhance.Brightness(image).enhance(1.1),
            ImageEnhance.Contrast(image).enhance(0.8),
        ):
            assert (perceptual_hash(changed) ^ hashes[number]).bit_count() <= DISTANCE


def test_the_index_finds_all_that_a_full_search_finds(tmp_path: Path) -> None:
    """Hashes at every distance up to 7, against a loop over all pairs."""
    from thyme.data.dedup import Place, _Index

    rng = np.random.default_rng(0)
    index, codes = _Index(7), [int(rng.integers(0, 1 << 63)) for _ in range(200)]
    for number, code in enumerate(codes):
        index.add(code, Place(tmp_path, number, 0), "")
    for _ in range(300):
        asked = codes[int(rng.integers(200))]
        for bit in rng.permutation(64)[: int(rng.integers(0, 10))]:
            asked ^= 1 << int(bit)
        bits, number = min((code ^ asked).bit_count() * 1000 + n for n, code in enumerate(codes)) // 1000, None
        found = index.nearest(index.near(asked), "")
        assert (found is None) == (bits > 7) and (found is None or found[0] == bits), number


def test_rows_that_repeat_share_and_leak(tmp_path: Path) -> None:
    a, b, c, d = (photograph(n) for n in range(4))
    train = write(
        tmp_path / "train.jsonl",
        [row(a), row(jpeg(a), "what  is IT?"), row(a, "Which color?"), row(b), row(c.resize((200, 150))), row(d)],
    )
    evaluation = tmp_path / "bench.tsv"
    turned = c.transpose(Image.Transpose.ROTATE_90)
    evaluation.write_text(f"index\timage\tquestion\tanswer\n7\t{b64(turned)}\tWhat?\tA\n8\t7\tAgain?\tB\n")
    matches: list[Match] = []
    report = dedup([train], [evaluation], on_match=matches.append)
    assert report.repeated == {(train, 2)} and report.shared == 1 and report.leaked == {(train, 5)}
    assert (report.rows, report.pictures, report.evaluation_pictures) == (6, 6, 1) and not report.unreadable
    leak = next(match for match in matches if match.leaks)
    assert (leak.row.row, leak.like.path, leak.like.row) == (5, evaluation, 1)


def test_a_row_of_several_pictures_repeats_one_that_has_all_of_them(tmp_path: Path) -> None:
    """Sets of comparisons ask one question of many pairs: a picture in common makes no row superfluous, nor do
    the same ones in another order."""
    pairs = [(0, 1), (0, 2), (1, 2), (0, 1), (0,), (2, 0), (0,)]
    rows = [{"images": [b64(photograph(n)) for n in p], "question": "Which differs?", "answer": "A"} for p in pairs]
    report = dedup([write(tmp_path / "pairs.jsonl", rows)])
    assert sorted(row for _, row in report.repeated) == [4, 7] and report.pictures == 12


def test_pictures_without_structure_are_compared_by_their_bytes(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    report = dedup([write(tmp_path / "t.jsonl", [row(red), row(blue), row(red)])])
    assert report.repeated == {(tmp_path / "t.jsonl", 3)}


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [row(photograph(0)), row(photograph(0)) | {"image": "QUJD"}, row(photograph(0)) | {"image": "gone.png"}]
    train = write(tmp_path / "t.jsonl", [*rows, row(photograph(0))])
    with train.open("a") as file:
        file.write("{broken\n")
    report: DedupReport = dedup([train], [train.with_name("t.jsonl")])
    assert report.unreadable == {"picture": 2, "not JSON": 1, "evaluation: picture": 2, "evaluation: not JSON": 1}
    assert report.leaked == {(train, 1), (train, 4)} and "row 2" in report.examples["picture"]
    with pytest.raises(ValueError, match="distance: 9 must be from 0 to 7"):
        dedup([train], distance=9)


def test_pictures_that_benchmark_rows_share_or_name_are_compared(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [row(photograph(0)), row(photograph(1)), row(photograph(2))])
    own = row(photograph(0))["image"]
    (tmp_path / "a.png").write_bytes(base64.b64decode(row(photograph(1))["image"]))
    images = {7: "8", 8: own, 9: "a.png", 10: "%%%", 11: ""}
    table = tmp_path / "bench.tsv"
    lines = [f"{index}\t{image}\tWhat?\n" for index, image in images.items()]
    table.write_text("index\timage\tquestion\n" + "".join(lines))
    report: DedupReport = dedup([train], [table])
    assert report.evaluation_pictures == 2 and report.leaked == {(train, 1), (train, 2)}
    assert report.unreadable == {"evaluation: picture": 1}
    assert "bench.tsv: row 4: picture 0: " in report.examples["evaluation: picture"]


def test_the_verb_names_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [photograph(n) for n in range(4)]
    rows = [row(pictures[0]), row(pictures[1]), row(pictures[0]), row(pictures[2])]
    lines = write(tmp_path / "t.jsonl", rows)
    pq.write_table(
        pa.Table.from_pylist([row(pictures[3]), row(pictures[1]), row(pictures[2])]),
        tmp_path / "p.parquet",
        row_group_size=2,
    )
    evaluation = write(tmp_path / "eval.jsonl", [row(jpeg(pictures[2]), "Another?")])
    report = tmp_path / "matches.jsonl"
    command = ["data", "dedup", str(lines), str(tmp_path / "p.parquet"), "--against", str(evaluation)]
    main([*command, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert f"{lines}: row 3, picture 0 repeats {lines}: row 1, picture 0" in out
    assert f"{lines}: row 4, picture 0 leaks {evaluation}: row 1, picture 0" in out
    assert "7 rows, 7 pictures: 3 rows repeat, 0 share a picture with another question; 2 leak from 1" in out
    assert [json.loads(x) for x in (tmp_path / "out" / "t.jsonl").read_text().splitlines()] == rows[:2]
    assert pq.read_table(tmp_path / "out" / "p.parquet").to_pylist() == [row(pictures[3])]
    main([*command, "--report", str(report)])
    kinds = [json.loads(line)["kind"] for line in report.read_text().splitlines()]
    assert sorted(kinds) == ["leaks", "leaks", "repeats", "repeats", "repeats"]
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "out")])
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_copied_is_said_before_anything_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thyme.data.dedup.dedup", lambda *_, **__: pytest.fail("compared"))
    rows = [row(photograph(0))]
    for name in ("a", "b", "array"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "array" / "rows.jsonl").write_text(json.dumps(rows))  # lines by name alone
    for paths, message in ((["a", "b"], "have one name"), (["array"], "convert it first")):
        with pytest.raises(SystemExit):
            main(["data", "dedup", *(str(tmp_path / name) for name in paths), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
