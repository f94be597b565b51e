"""Figures of rows, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.rows import RESPONSE, thyme_rl, thyme_sft
from thyme.cli import main
from thyme.data.check import plain_processor
from thyme.data.stats import gather


def _file(path: Path) -> Path:
    rows = [thyme_sft(1) | {"source": "crop"}, thyme_sft(2) | {"source": "zoom"}, thyme_rl(3), thyme_sft(4)]
    rows[3]["image"] = ["QUJD", "QUJD"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return path


def test_figures_are_what_a_count_by_hand_gives(tmp_path: Path) -> None:
    path = _file(tmp_path / "rows.jsonl")
    stats = gather([path], plain_processor())
    assert stats.rows == {"sft": 2, "rl": 1} and stats.scenarios == {"crop": 1, "zoom": 1, "-": 1}
    assert stats.tags == {"think": 2, "code": 2, "sandbox_output": 2, "answer": 2}
    assert stats.unreadable == {"picture": 1, "not JSON": 1} and "row 4" in stats.examples["picture"]
    # A token a byte; Qwen2.5-VL shows 60 x 40 and 28 x 18 pixels in 4 tokens each, its least.
    assert stats.lengths["tokens of the response"] == [len(RESPONSE.encode())] * 2
    assert stats.lengths["tokens of the question"][0] == len(thyme_sft(1)["question"].encode())
    assert stats.lengths["pictures"] == [2, 2, 1] and stats.lengths["longer side (pixels)"] == [60, 28, 60, 28, 60]
    processor = plain_processor()
    from thyme.data.pictures import decode_image

    real = sum(processor.preprocess(decode_image(image)).num_tokens for image in thyme_sft(1)["image"])
    assert stats.lengths["tokens of pictures"][0] == real
    whole = stats.lengths["tokens of the question"][0] + len(RESPONSE.encode()) + real
    assert stats.lengths["tokens in all"][0] == whole
    assert stats.lengths["code blocks"] == [1, 1] and stats.solutions == 1


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path / "rows.jsonl")
    main(["data", "stats", str(path)])
    out = capsys.readouterr().out
    assert "3 rows: 2 sft, 1 rl" in out and "scenarios: crop 1 (33.3%)" in out and "2 <code>" in out
    assert "not in the figures: 1 rows, picture" in out and "tokens are bytes" in out
    main(["data", "stats", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["lengths"]["pictures"]["p100"] == 2
    path.write_text("no json\n")
    with pytest.raises(SystemExit):
        main(["data", "stats", str(path)])
    assert "no row to count" in capsys.readouterr().err
