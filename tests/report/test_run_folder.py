"""What a run folder is found to hold."""

import json
from pathlib import Path

import pytest

from tests.report import runs
from thyme.report.run_folder import RunFolder
from thyme.verbs.spelling import RunSpelling, open_run


def test_files_come_in_the_order_of_their_steps(small: Path) -> None:
    rollouts = small / "rollouts"
    for name in ("step_10", "eval_rl", ".step_11.0_of_2", ".step_11.1_of_2", ".step_2", ".step_2.0_of_2"):
        (rollouts / f"{name}.jsonl").write_text("")
    (rollouts / ".step_11.jsonl.0").write_text("a rank's part, not yet put together")
    files = RunFolder(small).described()["files"]
    found = [(file["key"], file["step"], file["rank"]) for file in files]
    assert found == [
        ("eval_rl", None, None),
        ("step_0", 0, None),
        ("step_2", 2, None),
        ("step_10", 10, None),
        (".step_11.0_of_2", 11, "0 of 2"),
        (".step_11.1_of_2", 11, "1 of 2"),
    ]


def test_a_stamp_changes_with_anything_that_is_shown(small: Path) -> None:
    run = RunFolder(small)
    stamps = [run.described()["stamp"]]
    assert run.described()["stamp"] == stamps[0]
    with (small / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    stamps.append(run.described()["stamp"])
    runs.write_step(small, 7, runs.group_of_four())
    stamps.append(run.described()["stamp"])
    (small / "run.json").write_text("{}")
    stamps.append(run.described()["stamp"])
    assert len(set(stamps)) == 4


def test_metrics_are_columns_with_gaps(tmp_path: Path) -> None:
    rows = [
        {"stage": "sft", "step": 0, "loss": 2.0},
        {"stage": "sft", "step": 1, "eval": 0.5, "word": "no"},
        {"stage": "rl"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"loss": NaN}\n[1]\n')
    found = RunFolder(tmp_path).metrics()
    assert found["stages"]["sft"] == {"step": [0, 1], "loss": [2.0, None], "eval": [None, 0.5]}
    assert found["stages"]["rl"] == {"step": [0]} and found["problems"] == [
        "metrics.jsonl: line 5 cannot be read and is left out"
    ]


def test_where_the_spelling_of_tokens_comes_from(small: Path, tmp_path: Path) -> None:
    run = open_run(small)  # its config says "tiny"
    assert run.spelling is not None and run.rollout("step_0", 1)["tokens"]["text"][:3] == [
        "What digit is on the ",
        "red",
        " sign?",
    ]
    (small / "config.toml").write_text('model = "gone"')
    ids = open_run(small)
    assert ids.spelling is None and ids.rollout("step_0", 1)["tokens"]["text"][0].startswith("[")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        RunSpelling(damaged)(3)
    assert open_run(small, damaged).rollout("step_0", 1)["tokens"]["text"][0].endswith("?]"), "shown by id"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        RunSpelling("tiny")(10**9)


def test_a_rollout_is_found_by_its_question(small: Path) -> None:
    run = RunFolder(small)
    assert run.find("crop-1", near="step_2") == {"file": "step_2", "line": 5}
    assert run.find("crop-1", near="nowhere") == {"file": "step_0", "line": 5}
    assert run.find("nobody", near="step_2") is None
