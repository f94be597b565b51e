"""`thyme data build` as a user runs it: a scripted writer, judge and checker, kills, shards, review."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.build.endpoint import Endpoint, pictures_of, raw_rows, text_of
from tests.rewards.judge_server import Reply
from thyme.build.funnel import Funnel
from thyme.build.store import journaled
from thyme.cli import main
from thyme.data.pictures import decode_image
from thyme.rewards.judge_prompts import CORRECTNESS
from thyme.rollout.prompts import user_prompt

ROOT = Path(__file__).parents[2]
EVEN = tuple(
    word
    for name, share in {"no_code": 40, "operations": 40, "crop": 60, "rotation": 70, "contrast": 70}.items()
    for word in (f"--build.shares.{name}", str(share))
)
"""Nearly as many rows of each scenario: the paper's shares are made for thousands."""
SANDBOX = ("--sandbox.workers", "1", "--sandbox.memory-mib", "256")
NO_PLUGIN = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arguments(raw: Path, endpoint: Endpoint, *more: str) -> list[str]:
    writer = ("--writer.url", endpoint.url, "--writer.model", "w", "--build.concurrency", "4")
    return ["data", "build", "--data.train", str(raw), *writer, *SANDBOX, *more]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def built(name: str = "build") -> dict[str, dict[str, Any]]:
    """The rows of a build by id; no id occurs twice."""
    rows = [json.loads(line) for path in Path(f"runs/{name}/rows").glob("*.jsonl") for line in lines_of(path)]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def ends(name: str = "build") -> Counter[str]:
    found = list(journaled(Path(f"runs/{name}")))
    assert len({end["item"] for end in found}) == len(found)
    return Counter(end["reason"] or end["state"] for end in found)


def test_rows_of_every_scenario_come_out_as_training_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 26, text=2)
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, "--judge.url", endpoint.url, "--judge.model", "j", *EVEN))
        asked = list(endpoint.asked)
    rows, out = built(), capsys.readouterr().out
    assert {row["source"] for row in rows.values()} == {
        *("no_code", "operations", "crop", "rotation", "contrast", "math", "zoom", "correction")
    }
    for row in rows.values():
        assert row["response"].count("<image>") + row["question"].count("<image>") == len(row["image"])
        if row["source"] in ("zoom", "correction"):
            assert row["response"].count("<sandbox_output><image></sandbox_output>") == 2
        if row["source"] == "math":
            assert row["response"].count("<sandbox_output>") == 1 and not row["image"]
    zoomed = next(row for row in rows.values() if row["source"] == "zoom")
    number = int(zoomed["id"].rpartition(":")[2]) - 1
    assert zoomed["question"] == user_prompt(f"What is on sign {number}?", f"/mnt/data/p{number}.png", (240, 180))
    target = decode_image(zoomed["image"][2])
    assert target.size == (50, 40)
    original = Image.open(f"raw/p{number}.png")
    assert np.array_equal(np.asarray(target), np.asarray(original.crop((60, 50, 110, 90))))
    # What the writer was shown: a fresh copy of the rules first, then the result of its own code.
    later = next(a for a in asked if len(a.body["messages"]) == 4 and pictures_of(a.body["messages"][3]))
    assert "<sandbox_output><image></sandbox_output>" in text_of(later.body["messages"][3])
    main(["data", "check", "runs/build/rows"])  # every step of training takes them
    assert "bad rows" not in capsys.readouterr().out
    funnel = json.loads(Path("runs/build/funnel.json").read_text())
    assert sum(funnel["begun"].values()) == 28 and funnel["dropped"]["write"]["another kind by triage"] > 0
    assert sum(funnel["kept"].values()) == len(rows) and f"{len(rows)}" in out


def test_what_a_writer_does_wrong_is_dropped_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 8)

    class Bad(Endpoint):
        def written(self, messages: list[dict[str, Any]]) -> str:
            said = super().written(messages)
            number = int(text_of(messages[1]).partition("on sign ")[2].partition("?")[0])
            if number == 0:
                return said.replace("image.save(", "image.sav(")
            if number == 1:
                return said.replace("I look at", "I look at the provided bounding box of")
            if number == 2:
                return said.replace("60, 50, 110, 90", "160, 50, 210, 90")
            if number == 3:
                return said.replace("word3", "word4")
            if number == 4:
                return ""
            return said

        def said(self, asked: Any) -> str:
            if f'"{CORRECTNESS}"' in text_of(asked.body["messages"][-1]):
                return json.dumps({CORRECTNESS: 0})
            return super().said(asked)

    Path("evidence.py").write_text(
        "def check(case):\n    assert case.rounds and case.box and case.image\n"
        "    return 'sign 5 is not shown' if case.answer == 'word5' else None\n"
    )
    only_crop = [
        w
        for s in ("no_code", "operations", "rotation", "contrast", "zoom", "correction")
        for w in (f"--build.shares.{s}", "0")
    ]
    with Bad() as endpoint:
        judge = ("--judge.url", endpoint.url, "--judge.model", "j", "--build.evidence", "evidence.py:check")
        main(arguments(raw, endpoint, *judge, *only_crop))
    assert ends() == {
        "code failed": 1,
        "speaks of what was given": 1,
        "box": 1,
        "wrong answer": 1,
        "nothing written": 1,
        "sign 5 is not shown": 1,
        "kept": 2,
    }
    assert set(built()) == {"crop/raw:7", "crop/raw:8"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {
        line[0]: line[1:4] for line in lines if line and line[0] in ("write", "sandbox", "rules", "judge", "evidence")
    }
    assert table == {
        "write": ["8", "1", "7"],
        "sandbox": ["7", "1", "6"],
        "rules": ["6", "2", "4"],
        "judge": ["4", "1", "3"],
        "evidence": ["3", "1", "2"],
    }


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(("half:2", "after:3"), id="two"),
        pytest.param(
            tuple(f"{kind}:{where}" for where in (1, 2, 3, 4, 5, 6, 8) for kind in ("half", "after")),
            id="many",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_killed_builds_lose_nothing_and_write_nothing_twice(kills: tuple[str, ...]) -> None:
    """The first write is the journal's header; each row that is kept is one, and its line in the journal another."""
    count = 4 + 2 * len(kills)
    raw, quiet = raw_rows(Path("raw"), count, text=1), ("--build.triage", "false")
    environment = NO_PLUGIN | {"PYTHONPATH": str(ROOT)}
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, "--name", "whole", *quiet))
        whole, asked = built("whole"), len(endpoint.asked)
        assert len(whole) == count + 1
        endpoint.prompts.clear()
        command = [sys.executable, "-m", "tests.build.killed"]
        for where in kills:
            more = arguments(raw.resolve(), endpoint, "--name", "killed", *quiet)
            done = subprocess.run([*command, where, *more], env=environment, capture_output=True, timeout=120)
            assert done.returncode == -9, done.stderr.decode()
        main(arguments(raw, endpoint, "--name", "killed", *quiet))
        again = endpoint.prompts.total()
    assert built("killed") == whole and ends("killed") == {"kept": count + 1}
    # What was answered is kept: only what was under way at a kill is asked again, of 4 rows at most each time.
    assert asked <= again <= asked + 4 * len(kills)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_rows_that_somebody_changed_are_left_alone(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A row taken out by hand left a gap of NUL bytes, a longer one was cut; a file that was gone counted as built."""
    raw, quiet = raw_rows(Path("raw"), 3), ("--build.triage", "false")
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, *quiet))
        (path,) = Path("runs/build/rows").iterdir()
        first, *rest = path.read_text().splitlines(keepends=True)
        if change == "gone":
            path.unlink()
        else:
            path.write_text("".join(rest if change == "shorter" else [first.replace("word", "words"), *rest]))
        before = path.read_bytes() if path.exists() else None
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments(raw, endpoint, *quiet))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"{path}: is not what the build wrote" in err and err.count("\n") == 1
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_model_that_does_not_answer_leaves_the_row_for_later(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 6)
    with Endpoint() as endpoint:
        answer = endpoint.reply
        endpoint.reply = lambda asked, number: (
            Reply(status=500) if "sign 3" in str(asked.body) else answer(asked, number)
        )
        with pytest.raises(SystemExit) as ended:
            main(arguments(raw, endpoint, "--writer.retries", "0", "--build.triage", "false"))
        assert ended.value.code == 1 and "1 rows have no end yet" in capsys.readouterr().out
        assert ends() == {"kept": 5}
        endpoint.reply = answer
        main(arguments(raw, endpoint, "--build.triage", "false"))
    assert ends() == {"kept": 6} and len(built()) == 6


def test_a_server_that_refuses_the_first_request_ends_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 3)
    with Endpoint() as endpoint:
        endpoint.reply = lambda asked, number: Reply(status=401)
        with pytest.raises(SystemExit) as ended:
            main(arguments(raw, endpoint))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "writer 'w'" in err and "OPENAI_API_KEY" in err and err.count("\n") == 1


def test_shards_share_the_work_and_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 5)
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, "--name", "whole", "--build.triage", "false"))
        for shard in ("1/2", "2/2", "2/2"):
            main(arguments(raw, endpoint, "--build.triage", "false", "--shard", shard))
        assert built() == built("whole") and ends() == {"kept": 5}
        files = {path.name.partition("-")[2] for path in Path("runs/build/rows").iterdir()}
        assert files == {"00000-of-00002.jsonl", "00001-of-00002.jsonl"}
        capsys.readouterr()
        for more, words in (
            (("--shard", "1/3"), "was built in shards of 0000"),
            (("--shard", "1/2", "--build.seed", "5"), "under another recipe"),
            (("--shard", "3/2"), "shard: '3/2' must be i/n"),
            (("--shard", "1/2", "--build.ray-workers", "2"), "leave shard out"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(arguments(raw, endpoint, "--build.triage", "false", *more))
            err = capsys.readouterr().err
            assert ended.value.code == 2 and words in err and err.count("\n") == 1, err


def test_reviewed_rows_wait_for_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 10)
    with Endpoint() as endpoint:
        command = arguments(raw, endpoint, "--build.triage", "false", "--build.review", "0.5")
        main(command)
        queue = [json.loads(line)["id"] for line in lines_of(Path("runs/build/review/queue-00000-of-00001.jsonl"))]
        assert 2 <= len(queue) <= 8 and not set(queue) & set(built()) and len(built()) + len(queue) == 10
        assert f"0 kept, 0 rejected, {len(queue)} waiting" in capsys.readouterr().out
        decisions = [
            {"id": queue[0], "keep": False},
            {"id": queue[0], "keep": True, "response": "<think>Better.</think>\n<answer>word</answer>"},
            {"id": queue[1], "keep": False},
        ]
        Path("runs/build/review/decisions.jsonl").write_text("".join(json.dumps(d) + "\n" for d in decisions))
        main(command)
        assert f"1 kept, 1 rejected, {len(queue) - 2} waiting" in capsys.readouterr().out
        rows = built()
        assert rows[queue[0]]["response"].startswith("<think>Better.") and queue[1] not in rows
        Path("runs/build/review/decisions.jsonl").write_text("{}\n")
        with pytest.raises(SystemExit):
            main(command)
        assert "decisions.jsonl: line 1: give" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_rows(Path("raw"), 4)
    rows = [json.loads(line) for line in lines_of(raw)]
    rows[0]["image"] = "missing.png"
    rows[1]["box"] = [10, 10, 900, 40]
    rows[2]["box"] = "here"
    rows.append({"question": "\ud800 What is 2 times 7?", "answer": "14"})
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n" + '{"question": " "}\n')
    with Endpoint() as endpoint:
        main(arguments(raw, endpoint, "--build.triage", "false"))
    out = capsys.readouterr().out
    assert ends() == {"picture": 1, "box": 1, "encoding": 1, "kept": 1}
    assert "not sampled: 1 box, 1 not JSON, 1 no question" in out
    with Endpoint() as endpoint, pytest.raises(SystemExit):
        main(["data", "build", "--writer.url", endpoint.url, "--writer.model", "w"])
    assert "data.train: nothing to build from" in capsys.readouterr().err


def test_the_funnel_adds_up() -> None:
    funnel = Funnel.of(
        "sft",
        [
            {"scenario": "crop", "state": "dropped", "gate": "rules", "reason": "box"},
            {"scenario": "crop", "state": "kept", "gate": "", "reason": ""},
            {"scenario": "zoom", "state": "review", "gate": "", "reason": ""},
        ],
    )
    assert [line.split()[:4] for line in funnel.lines()[1:]] == [
        ["read", "3", "0", "3"],
        ["write", "3", "0", "3"],
        ["sandbox", "3", "0", "3"],
        ["rules", "3", "1", "2"],
        ["judge", "2", "0", "2"],
        ["evidence", "2", "0", "2"],
        ["review", "2", "0", "1"],
        ["crop", "2", "rows", "in,"],
        ["zoom", "1", "rows", "in,"],
    ]
