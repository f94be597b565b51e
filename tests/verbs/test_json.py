"""`--json` on verbs: one JSON value on stdout and nothing else, what people read on stderr, the exit code as it was."""

import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from thyme.cli import main
from thyme.result import Result
from thyme.verbs.table import JSON_VERBS, VERBS

MODEL = ("--threads", "1", "--engine.num-blocks", "200", "--engine.max-sequences", "8", "--engine.max-context", "1400")
SANDBOX = ("--sandbox.workers", "1", "--sandbox.memory-mib", "256")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a verb with --json: what it found, its exit code, and what stands on stderr."""

    def run(*args: str | Path) -> tuple[Any, int, str]:
        capfd.readouterr()
        code = 0
        try:
            main([*map(str, args), "--json"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capfd.readouterr()
        return json.loads(out), code, err

    return run


class Color(Enum):
    RED = "red"


@dataclass(frozen=True)
class Found:
    path: Path
    values: tuple[float, ...]
    by_color: dict[Color, set[int]]


def test_a_result_is_json_whatever_it_is_made_of() -> None:
    found = Result([Found(Path("a/b"), (1.5, math.nan, -math.inf), {Color.RED: {1}})], 3)
    assert json.loads(found.to_json()) == [{"path": "a/b", "values": [1.5, None, None], "by_color": {"red": [1]}}]
    assert json.loads(Result(None).to_json()) is None
    with pytest.raises(TypeError):
        Result(object()).to_json()


def test_rows_are_checked_counted_compared_and_written(said: Any) -> None:
    found, code, err = said("data", "synth", "rows", "--sft", "2", "--rl", "2", "--heldout", "0")
    assert code == 0 and found["written"]["rows/sft.jsonl"] == 2 and "rows/sft.jsonl: 2 rows" in err
    found, code, err = said("data", "check", "rows/sft.jsonl")
    assert code == 0 and found["files"][0]["report"]["sft_rows"] == 2 and found["files"][0]["problems"] == []
    with Path("rows/sft.jsonl").open("a") as file:
        file.write('{"question": "no more"}\n')
    found, code, err = said("data", "check", "rows/sft.jsonl")
    (problem,) = found["files"][0]["problems"]
    assert code == 2 and problem["row"] == 3 and found["files"][0]["report"]["bad_rows"] == 1
    assert err.splitlines()[-1] == "thyme: rows/sft.jsonl: 1 bad rows, named above: mend or drop them"
    found, code, _ = said("data", "stats", "rows/rl.jsonl")
    assert code == 0 and found["rows"] == {"rl": 2}
    found, code, _ = said("data", "dedup", "rows/rl.jsonl", "--out", "kept")
    assert (found["rows"], found["repeated"], found["matches"], found["written"]) == (2, 0, [], {"kept/rl.jsonl": 2})
    found, code, _ = said("data", "convert", "rows/rl.jsonl", "rows/sft.jsonl", "all.jsonl")
    assert found["path"] == "all.jsonl" and found["written"] == 4 and sum(found["left_out"].values()) == 1


def test_a_plan_is_told_in_bytes(said: Any) -> None:
    found, code, err = said("plan", "--model", "qwen2.5-vl-3b", "--stage", "sft")
    assert code == 0 and found["fits"] and found["changes"] == {"activation_checkpointing": True} and "it fits" in err
    assert found["peak"] == max(sum(items.values()) for items in found["phases"].values()) < found["budget"]
    found, code, _ = said("plan", "--model", "qwen2.5-vl-72b", "--gpu-gib", "8", "--reserve-gib", "1")
    assert code == 1 and not found["fits"] and found["changes"] is None


def test_a_snippet_comes_back(said: Any) -> None:
    Path("a.py").write_text("from PIL import Image\nImage.new('RGB', (6, 5)).save('x.png')\nprint(6 * 7)\n1 / 0")
    found, code, err = said("sandbox", "run", "a.py", *SANDBOX)
    assert code == 1 and found["status"] == "error" and found["stdout"] == "42\n" and "ZeroDivisionError" in err
    assert found["error"]["type"] == "ZeroDivisionError" and found["error"]["line"] == 4
    with Image.open("a.out1.png") as picture:
        assert found["images"] == ["a.out1.png"] and picture.size == (6, 5)


def test_training_evaluating_and_sampling(said: Any, demo_checkpoint: Path) -> None:
    found, code, err = said("sft", "--threads", "1", "--sft.steps", "1", "--sft.batch-size", "2", "--name", "x")
    assert code == 0 and found["checkpoint"] == "runs/x/checkpoints/sft" and found["steps"] == 1
    assert found["last"]["step"] == 0 and found["last"]["loss"] > 0 and "checkpoint: runs/x" in err
    found, _, _ = said("resume", "runs/x")  # is finished
    assert found is None
    model = ("--model", str(demo_checkpoint), *MODEL, *SANDBOX, "--engine.quiet", "true")
    short = ("--rollout.max-tokens", "6", "--rollout.max-tokens-per-round", "6", "--rollout.group-size", "2")
    found, _, err = said("rollout", *model, *short, "--count", "2", "--name", "y")
    assert found.pop("timing")["sampled_tokens"] > 0
    assert found == {"path": "runs/y/rollouts/step_0.jsonl", "rollouts": 4, "questions": 2, "mismatch": None}
    found, _, err = said("eval", *model, *short, "--eval.num-questions", "3", "--name", "z")
    assert found == json.loads(Path("runs/z/eval.json").read_text()) and "all          n    3" in err
    found, _, _ = said("report", "runs/y", "--rollouts", "2")
    assert found["path"] == "runs/y/report.html" and (found["rollouts"], found["of"]) == (2, 4)


def test_scored_predictions(said: Any) -> None:
    Path("mcq.tsv").write_text("index\tquestion\tA\tB\tanswer\n1\tWhich?\tx\ty\tA\n2\tWhich?\tx\ty\tB\n")
    Path("p.jsonl").write_text('{"index": 1, "prediction": "A"}\n{"index": 2, "prediction": "A"}\n')
    words = ("--score", "p.jsonl", "--eval.benchmark", "mcq", "--eval.data", "mcq.tsv", "--name", "s")
    found, code, _ = said("eval", *words)
    assert code == 0 and found == json.loads(Path("runs/s/score.json").read_text()) and found["n"] == 2


def test_it_is_a_word_of_verbs_with_a_result_and_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"demo", "serve", "view", "data review", "completion"} == set(VERBS) - JSON_VERBS
    for verb, has in (("eval", True), ("bench", True), ("view", False)):
        main([*verb.split(), "--help"])
        assert ("[--json]" in capsys.readouterr().out) == has
    with pytest.raises(SystemExit):
        main(["view", "runs/x", "--json"])
    assert "unknown option --json" in capsys.readouterr().err


def test_an_error_leaves_stdout_empty(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "stats", "nowhere.jsonl", "--json"])
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "thyme: data file nowhere.jsonl: no such file\n")
