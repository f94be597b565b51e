"""A file of rollouts that grows, is replaced, is half-written, or is the journal of a step."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report import runs
from thyme.report.json_text import to_json
from thyme.report.rollout_file import MOST_PROBLEMS, RolloutFile
from thyme.report.rollout_summary import summarize
from thyme.report.run_folder import RunFolder
from thyme.report.single_file import report_page
from thyme.rollout.journal import Journal
from thyme.toy.model import tiny_processor


def test_every_rollout_is_found_by_its_line(small: Path) -> None:
    file = RolloutFile(small / "rollouts" / "step_0.jsonl")
    file.refresh()
    table = file.table()
    assert table["line"] == [1, 2, 3, 4, 5, 6, 7, 8] and table["group"] == [0] * 4 + [1] * 4
    assert table["seed"][0] == str(2**60), "a browser's numbers end at 2 ** 53"
    assert [file.row(line)["index"] for line in table["line"]] == [0, 1, 2, 3] * 2
    assert file.find("crop-1") == 5 and file.find("nobody") is None
    with pytest.raises(KeyError):
        file.row(9)


def test_questions_that_share_a_group_s_number_stand_apart(tmp_path: Path) -> None:
    """As evaluations of earlier versions numbered them, anew for each part that was asked at once."""
    rollouts = [*runs.group_of_four(0, "b")[:2], *runs.group_of_four(0, "a")[:2]]
    runs.write_step(tmp_path, 0, [rollouts[0], rollouts[2], rollouts[1], rollouts[3]])
    file = RolloutFile(tmp_path / "rollouts" / "step_0.jsonl")
    file.refresh()
    assert file.table()["question_id"] == ["a", "a", "b", "b"] and file.table()["index"] == [0, 1, 0, 1]


def test_what_is_appended_is_read_and_what_was_read_is_not_read_again(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small / "rollouts" / "step_0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    file = RolloutFile(path)
    file.refresh()
    stamp = file.table()["stamp"]
    assert len(file) == 3
    summarized: list[bytes] = []
    monkeypatch.setattr("thyme.report.rollout_file.summarize", lambda line: summarized.append(line) or summarize(line))
    with path.open("ab") as appended:
        appended.write(b"".join(lines[3:]))
    file.refresh()
    assert len(file) == 8 and summarized == lines[3:] and file.table()["stamp"] != stamp


def test_a_file_that_was_replaced_is_read_anew(small: Path) -> None:
    file = RolloutFile(small / "rollouts" / "step_0.jsonl")
    file.refresh()
    runs.write_step(small, 0, runs.group_of_four(5, "other"))
    file.refresh()
    assert len(file) == 4 and file.table()["question_id"] == ["other"] * 4


def test_a_line_that_is_no_rollout_costs_itself_alone(small: Path) -> None:
    path = small / "rollouts" / "step_0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"nonsense\n" + b"\n" + lines[1] + lines[2][: len(lines[2]) // 2])
    file = RolloutFile(path)
    file.refresh()
    table = file.table()
    assert table["line"] == [1, 4]
    told = table["problems"]
    assert len(told) == 2 and told[0].startswith("line 2 is no rollout") and "line 5" in told[1]
    assert "ends in the middle" in told[1]
    path.write_bytes(b"x\n" * 100)
    file.refresh()
    assert len(file.table()["problems"]) == MOST_PROBLEMS + 1
    assert file.table()["problems"][-1] == f"and {100 - MOST_PROBLEMS} more such lines"


def test_a_journal_is_read_while_it_is_written(tmp_path: Path) -> None:
    """Of a rollout that goes on the last line counts; a line that is being written waits."""
    made = runs.group_of_four()
    path = tmp_path / "rollouts" / ".step_4.jsonl"
    with Journal(path, "someone", tiny_processor()) as journal:
        journal.add_begun(made[0])
        journal.add(made[1])
    file = RolloutFile(path)
    file.refresh()
    assert file.table()["has_ended"] == [False, True]
    whole = path.read_bytes()
    row = json.loads(whole.splitlines()[1]) | {"has_ended": True}
    line = json.dumps(row).encode() + b"\n"
    path.write_bytes(whole + line[:200])
    file.refresh()
    assert file.table()["has_ended"] == [False, True] and file.table()["problems"] == []
    path.write_bytes(whole + line)
    file.refresh()
    assert file.table()["has_ended"] == [True, True] and file.table()["line"] == [4, 3]


ODD: tuple[dict[str, Any], ...] = (
    {"turns": [{"result": {"status": "ok", "images": 3}}]},
    {"turns": [{"result": {"status": "ok", "images": [], "fixes": [3], "error": None}}]},
    {"turns": [{"result": {"status": "error", "images": [], "fixes": [], "error": 7}}]},
    {"question": {"id": "x", "image": "0" * 64, "more_images": [1]}},
    {"tokens": {"token_ids": [1], "sampled": 3}},
    {"tokens": {"token_ids": [1, 2], "kinds": [{}, []]}},
    {"tokens": {"trainer_logprobs": ["a"], "temperatures": [1], "logprobs": [0], "logprobs_raw": [0]}},
    {"tokens": {"trainer_logprobs": [1], "temperatures": 3, "logprobs": [0], "logprobs_raw": [0]}},
    {"answer": {"a": [1]}, "status": None, "rewards": [1], "group": "x", "index": 1e400, "seed": []},
)
"""What another program, or a version to come, may have put into a row."""


@pytest.mark.parametrize("changed", ODD, ids=range(len(ODD)))
def test_a_row_of_odd_types_costs_itself_alone(small: Path, changed: dict[str, Any]) -> None:
    path = small / "rollouts" / "step_0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + json.dumps(json.loads(lines[1]) | changed).encode() + b"\n" + lines[2])
    run = RunFolder(small)
    table = run.table("step_0")
    assert {1, 3} <= set(table["line"]) and len(table["line"]) + len(table["problems"]) == 3
    run.rollout("step_0", 1)
    if 2 in table["line"]:
        try:
            to_json(run.rollout("step_0", 2))
        except ValueError as error:
            assert "step_0, line 2: written by another version, or damaged" in str(error)
    report_page(run, 100)


def test_a_line_that_is_nested_too_deep_costs_itself_alone(small: Path) -> None:
    deep = b"[" * 100_000 + b"\n"
    for name in ("rollouts/step_0.jsonl", "metrics.jsonl"):
        with (small / name).open("ab") as file:
            file.write(deep)
    (small / "run.json").write_bytes(deep)
    run = RunFolder(small)
    assert len(run.table("step_0")["line"]) == 8 and len(run.table("step_0")["problems"]) == 1
    assert run.metrics()["problems"] and "run.json cannot be read" in run.described()["notes"][0]
