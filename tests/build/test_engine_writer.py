"""This project's own engine as the writer, on photographs that packages ship."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.build.endpoint import raw_rows
from thyme.build.store import journaled
from thyme.cli import main

SMALL = (
    *("--threads", "1", "--engine.num-blocks", "120", "--engine.max-sequences", "8", "--engine.max-context", "400"),
    *("--rollout.max-tokens", "24", "--rollout.max-tokens-per-round", "24", "--rollout.prompt-style", "short"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256", "--engine.quiet", "true", "--build.prompt", "question"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ends(name: str) -> list[dict[str, str]]:
    return list(journaled(Path(f"runs/{name}")))


def test_the_embedded_model_writes_and_every_row_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    main(["data", "synth", "rows", "--sft", "0", "--rl", "3", "--heldout", "0", "--toy.material", "photos"])
    main(["data", "build", "--data.train", "rows/rl.jsonl", *SMALL])
    assert len(ends("build")) == 3 and all(end["state"] == "dropped" for end in ends("build")), "its weights are random"
    assert {end["gate"] for end in ends("build")} <= {"sandbox", "rules"}
    funnel = json.loads(Path("runs/build/funnel.json").read_text())
    assert sum(sum(reasons.values()) for reasons in funnel["dropped"].values()) == 3
    capsys.readouterr()
    main(["data", "build", "--data.train", "rows/rl.jsonl", *SMALL])
    assert "3 are done, 0 to do" in capsys.readouterr().out and len(ends("build")) == 3


def test_its_pass_rate_is_a_gate_of_rl() -> None:
    raw = raw_rows(Path("raw"), 2)
    rows = [json.loads(line) | {"category": "OCR"} for line in raw.read_text().splitlines()]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = ("--build.samples", "2", "--build.min-side", "200", "--max-pixels", "20000")
    main(["data", "build", "--rl", "--data.train", str(raw), *SMALL, *limits])
    assert Counter(end["reason"] for end in ends("build")) == {"all wrong": 2}
    assert "none of 2 answers is right" in ends("build")[0]["detail"]


@pytest.mark.soak
def test_a_model_that_has_learned_a_few_rows_builds_rows_that_train_again(capsys: pytest.CaptureFixture[str]) -> None:
    """End to end on the embedded model: it learns rows by heart, writes them as code, and they pass every gate."""
    pytest.importorskip("skimage")
    main(["data", "synth", "rows", "--sft", "12", "--rl", "0", "--heldout", "0", "--toy.material", "photos"])
    few = ("--threads", "1", "--data.train", "rows/sft.jsonl")
    main(["sft", "demo", *few, "--name", "cold", "--sft.steps", "150", "--sft.batch-size", "12"])
    only_code = [word for name in ("no-code", "rotation", "contrast") for word in (f"--build.shares.{name}", "0")]
    build = ["data", "build", "demo", *few, "--model", "runs/cold/checkpoints/sft", "--build.prompt", "question"]
    main([*build, "--rollout.temperature", "0", *only_code])
    found = Counter(end["state"] for end in ends("build"))
    demonstrated = [json.loads(line) for line in Path("rows/sft.jsonl").read_text().splitlines()]
    with_pictures = sum(len(row["image"]) > 1 for row in demonstrated)
    assert found["kept"] + found["dropped"] == 12 and found["kept"] >= with_pictures / 2 > 0
    assert "operations" in capsys.readouterr().out
    main(["data", "check", "runs/build/rows"])
    again = ("--data.train", "runs/build/rows", "--name", "again", "--sft.steps", "2", "--sft.batch-size", "2")
    main(["sft", "demo", "--threads", "1", *again])
