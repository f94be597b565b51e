"""Verdicts of an evaluation reach the rollouts that they are about, and no others."""

import json
from dataclasses import replace
from pathlib import Path

from tests.report import runs
from thyme.evals.benchmarks.traces import Traces
from thyme.report.run_folder import RunFolder

VERDICTS = [
    {"index": "1", "sample": 0, "verdict": "absent", "reason": "its code failed"},
    {"index": "1", "sample": 1, "verdict": "unreadable", "reason": "it prints nothing"},
]


def write_lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder: Path, picture_bytes: int = 2**30) -> RunFolder:
    """Two questions of a benchmark, the first of two samples, one of them drawn twice; none has rewards of its own."""
    with Traces(folder / "rollouts" / "mcq.dark.jsonl", picture_bytes) as traces:
        for number, index, answer in ((1, 0, "none"), (1, 1, "9"), (1, 0, "7"), (2, 0, "7")):
            asked = runs.question(f"mcq/{number}", runs.photograph(number))
            asked = replace(asked, image_path="a.png")
            traces.add(runs.rollout(asked, [runs.looked_closer(asked)], answer, group=number, index=index))
    return RunFolder(folder)


def test_right_and_evidence_come_from_beside_the_rollouts(tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    before = run.table("mcq.dark")
    assert before["right"] == [None] * 4 and before["line"] == [1, 3, 2, 4]
    stamp = run.described()["stamp"]
    settings = {"settings": {"benchmark": "mcq"}}
    first = {"index": "1", "value": 0.5, "values": [1.0, 0.0]}
    write_lines(tmp_path / "predictions" / "mcq.dark.jsonl", settings, first)
    write_lines(tmp_path / "evidence" / "mcq.dark.jsonl", *VERDICTS)
    assert run.described()["stamp"] != stamp
    table = run.table("mcq.dark")
    assert table["right"] == [None, True, False, None], "the attempt that was given up has no verdict"
    assert table["evidence"] == [None, 0.0, None, None] and table["stamp"] != before["stamp"]
    view = run.rollout("mcq.dark", 3)
    assert view["rewards"] == {"result": 1.0, "parts/evidence": 0.0, "evidence": "absent: its code failed"}
    assert view["right"] is True and view["question"]["pictures"][0]["width"] == 320
    assert view["rounds"][0]["result"]["pictures"][0]["region"]["box"] == list(runs.BOX)
    with (tmp_path / "predictions" / "mcq.dark.jsonl").open("a") as file:  # of a run that is under way
        file.write(json.dumps({"index": "2", "value": 0.0}) + '\n{"index": "3", "val')
    assert run.table("mcq.dark")["right"] == [None, True, False, False]
    assert run.rollout("mcq.dark", 1)["rewards"] is None and run.rollout("mcq.dark", 4)["right"] is False


def test_what_a_line_says_itself_stands(small: Path) -> None:
    run = RunFolder(small)
    table, view = run.table("step_2"), run.rollout("step_2", 1)
    ids, samples = table["question_id"], table["index"]
    rows = [{"index": id_, "values": [0.25] * 8} for id_ in set(ids)]
    write_lines(small / "predictions" / "step_2.jsonl", *rows)
    found = [{"index": i, "sample": s, "verdict": "held", "reason": "so"} for i, s in zip(ids, samples, strict=True)]
    write_lines(small / "evidence" / "step_2.jsonl", *found)
    again = run.table("step_2")
    for column in ("total", "right", "evidence"):
        pairs = list(zip(table[column], again[column], strict=True))
        assert any(before is not None for before, _ in pairs)
        assert all(now == before for before, now in pairs if before is not None), column
    now = run.rollout("step_2", 1)["rewards"]
    assert now["evidence"] == "held: so" and {name: now[name] for name in view["rewards"]} == view["rewards"]


def test_pictures_are_kept_until_their_room_is_used_up(tmp_path: Path) -> None:
    run = evaluated(tmp_path, picture_bytes=1)
    pictures = [run.rollout("mcq.dark", line)["question"]["pictures"] for line in (1, 2, 3, 4)]
    assert [len(found) for found in pictures] == [1, 0, 0, 0]
    assert "eval.picture_gib" in run.rollout("mcq.dark", 2)["notes"][0]


def test_an_evaluation_under_way_is_shown_until_its_file_is_there(small: Path) -> None:
    journal = small / "rollouts" / ".eval.jsonl"
    journal.write_text('{"identity": ""}\n')
    first = RunFolder(small).described()["files"][0]
    assert (first["key"], first["is_journal"]) == (".eval", True)
    (small / "rollouts" / "eval.jsonl").write_text("")
    assert ".eval" not in [file["key"] for file in RunFolder(small).described()["files"]]
