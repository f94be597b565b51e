"""`thyme data build --rl`: each gate, the pass rate, the second model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.build.endpoint import BOX, Endpoint, picture, pictures_of, text_of
from thyme.build.store import journaled
from thyme.cli import main
from thyme.data.config import DataConfig
from thyme.data.sources import open_data

SANDBOX = ("--sandbox.workers", "1", "--sandbox.memory-mib", "256")


class Model(Endpoint):
    """Right on sign n in n of 4 samples; as a checker it reads whatever it is shown, but errs on sign 7."""

    views: list[tuple[int, int]]

    def __init__(self) -> None:
        super().__init__()
        self.views = []

    def written(self, messages: list[dict[str, Any]]) -> str:
        turn = text_of(messages[-1])
        number = int(re.findall(r"sign (\d+)", turn)[0])
        if "The picture shows the part" in turn:
            self.views.append(pictures_of(messages[-1])[0].size)
            return "another" if number == 7 else f"word{number}"
        key = f"sign {number}"
        self.prompts[key] += 1
        answer = f"word{number}" if self.prompts[key] <= number else "wrong"
        return f"<think>I see it.</think>\n<answer>{answer}</answer>"


def test_each_gate_drops_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = []
    for number in range(10):
        picture(number).save(f"p{number}.png")
        row = {"image": f"p{number}.png", "question": f"What is on sign {number}?", "answer": f"word{number}"}
        rows.append(row | {"box": BOX, "category": "ocr"})
    rows[8]["box"] = [10, 10, 200, 150]
    rows[9]["category"] = "weather"
    picture(11).resize((200, 150)).save("small.png")
    rows.append(rows[2] | {"image": "small.png"})
    rows.append({key: value for key, value in rows[2].items() if key != "box"})
    Path("raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = ("--build.min-side", "230", "--build.samples", "4", "--build.concurrency", "1")
    with Model() as endpoint:
        both = [word for who in ("writer", "checker") for word in (f"--{who}.url", endpoint.url, f"--{who}.model", who)]
        main(["data", "build", "--rl", "--data.train", "raw.jsonl", *both, *limits, *SANDBOX])
        views = endpoint.views
    found = Counter((end["gate"], end["reason"]) for end in journaled(Path("runs/build")))
    assert found == {
        ("", ""): 3,
        ("read", "no box"): 1,
        ("size", "picture too small"): 1,
        ("target", "target too large"): 1,
        ("category", "no category"): 1,
        ("cross-check", "second model disagrees"): 1,
        ("difficulty", "all wrong"): 1,
        ("difficulty", "all right"): 3,
    }
    assert set(views) == {(150, 120)}, "three times the target's sides"
    kept = [json.loads(line) for line in Path("runs/build/rows/rl-00000-of-00001.jsonl").read_text().splitlines()]
    assert {(row["solution"], row["pass_rate"], row["category"]) for row in kept} == {
        ("word1", 0.25, "OCR"),
        ("word2", 0.5, "OCR"),
        ("word3", 0.75, "OCR"),
    }
    assert all(row["box"] == BOX for row in kept)
    assert "difficulty         7        4       3   3 all right, 1 all wrong" in capsys.readouterr().out
    questions = open_data(["runs/build/rows"], DataConfig(), "rl")  # RL reads them
    assert {questions[i].solution for i in range(3)} == {"word1", "word2", "word3"}
    main(["data", "check", "runs/build/rows"])


def test_the_default_gates_are_the_papers() -> None:
    from thyme.build.config import BuildConfig

    assert (BuildConfig().min_side, BuildConfig().max_target) == (2048, 0.05)
