"""`thyme eval` over several machines: by shards in one folder, and on Ray workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.build.test_ray import launched, waits_for, workers_of
from tests.evals.benchmarks.published import choice, picture, write_tsv
from tests.verbs.test_benchmarks import BRIEF, lines, run
from thyme.evals.benchmarks import shards
from thyme.evals.benchmarks.answers import Answers
from thyme.evals.benchmarks.shards import put_together, shards_of
from thyme.evals.evidence import EvidenceFile
from thyme.verbs.folders import held

COLORS = ("blue", "red", "green")
RUNS = ("mcq", "mcq.tool_free", "mcq.result_only", "mcq.jpeg")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(count: int) -> None:
    write_tsv(Path("a.tsv"), [choice(i, "AB"[i % 2], image=picture(COLORS[i % 3])) for i in range(count)])


def arguments(checkpoint: Path) -> list[str]:
    return [
        *("--model", str(checkpoint), "--eval.benchmark", "mcq", "--eval.data", "a.tsv", "--eval.samples", "2"),
        *("--eval.temperature", "1", "--engine.deterministic", "true", *BRIEF),
    ]


def kept(name: str) -> dict[str, Any]:
    """What a run has kept, whatever the order in which it came: without times."""
    found: dict[str, Any] = {"score": json.loads(Path(f"runs/{name}/score.json").read_text())}
    for path in sorted(Path(f"runs/{name}").glob("*/*.jsonl")):
        one = lines(str(path))
        for line in one:
            for time_s in ("wall_s", "sandbox_s"):
                line.pop(time_s, None)
            for turn in line.get("turns", []):  # type: ignore[attr-defined]
                for used in ("wall_s", "cpu_s", "peak_mib") if turn["result"] is not None else ():
                    turn["result"].pop(used)
        found[f"{path.parent.name}/{path.name}"] = sorted(one, key=lambda line: json.dumps(line, sort_keys=True))
    found["images"] = sorted(path.name for path in Path(f"runs/{name}/images").iterdir())
    return found


def test_shards_answer_what_one_machine_answers(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(7)
    more = ["--control", "tool_free,result_only", "--eval.robustness", "jpeg"]
    command = [*arguments(demo_checkpoint), *more]
    assert run(*command, "--name", "whole") == 0
    for shard in ("2/3", "1/3", "3/3"):
        assert run(*command, "--name", "shared", "--shard", shard) == 0
    out = capsys.readouterr().out
    assert "shard 2 of 3: 2 rows answered" in out and not Path("runs/shared/score.json").exists()
    assert run(*command, "--name", "shared", "--shard", "1/3") == 2
    assert "--eval.resume true goes on with it" in capsys.readouterr().err
    assert run(*command, "--name", "shared", "--shard", "1/3", "--eval.resume", "true") == 0
    assert shards_of(Path("runs/shared"), "mcq") == [f"0000{i}-of-00003" for i in range(3)]
    assert run(*command, "--name", "shared") == 0
    assert kept("shared") == kept("whole") and set(RUNS) <= {Path(name).stem for name in kept("whole")}
    assert 'shard = ""' in Path("runs/shared/config.toml").read_text()


def test_the_whole_asks_what_shards_have_not_and_takes_no_other_answers(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(5)
    command = arguments(demo_checkpoint)
    assert run(*command, "--name", "whole") == 0
    assert run(*command, "--name", "half", "--shard", "2/2") == 0
    shutil.copytree("runs/half", "runs/other")
    assert run(*command, "--name", "other", "--eval.seed", "7") == 2
    said = capsys.readouterr().err
    assert "mcq.00001-of-00002.jsonl was made with sampling.seed = 0, this run has 7" in said
    assert run(*command, "--name", "half") == 0 and kept("half") == kept("whole")
    assert run(*command, "--name", "few", "--eval.limit", "1", "--shard", "2/2") == 0
    assert "the shard has no row of it" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--control", "tool_free"]])
def test_held_out_questions_are_asked_by_shards_too(demo_checkpoint: Path, more: list[str]) -> None:
    command = [
        "--model",
        str(demo_checkpoint),
        "--eval.num-questions",
        "6",
        "--rollout.max-tokens-per-round",
        "24",
        *BRIEF,
    ]
    assert run("demo", *command, *more, "--name", "whole", "--shard", "1/1") == 0
    for shard in ("1/2", "2/2"):
        assert run("demo", *command, *more, "--name", "shared", "--shard", shard) == 0
    assert run("demo", *command, *more, "--name", "shared") == 0
    assert kept("shared") == kept("whole") and kept("whole")["score"]["n"] == 6


class Killed(BaseException):
    pass


def each(change: Callable[[str], str], lines_of: Callable[[Path, Path], Iterator[str]], *files: Path) -> Iterator[str]:
    return map(change, lines_of(*files))


def test_a_kill_while_shards_are_put_together_loses_nothing_and_doubles_nothing(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(4)
    command = arguments(demo_checkpoint)
    assert run(*command, "--name", "whole") == 0
    for shard in ("1/2", "2/2"):
        assert run(*command, "--name", "parts", "--shard", shard) == 0
    settings = json.loads(Path("runs/whole/predictions/mcq.jsonl").read_text().splitlines()[0])["settings"]
    killed = 0
    for steps in range(60):
        folder = Path("runs") / f"put{steps}"
        shutil.copytree("runs/parts", folder)
        with monkeypatch.context() as patched:
            left = steps

            def dying(function: Any) -> Any:
                def call(*args: Any, **named: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise Killed
                    left -= 1
                    return function(*args, **named)

                return call

            patched.setattr(Answers, "add", dying(Answers.add))
            patched.setattr(EvidenceFile, "put", dying(EvidenceFile.put))
            patched.setattr(Path, "unlink", dying(Path.unlink))
            patched.setattr(shards, "_fewer", partial(each, dying(str), shards._fewer))
            try:
                put_together(folder, "mcq", settings)
            except Killed:
                killed += 1
        put_together(folder, "mcq", settings)
        shutil.copy("runs/whole/score.json", folder)
        assert kept(folder.name) == kept("whole"), f"killed after {steps} steps"
        if killed <= steps:
            break
    assert 20 < killed < 60


def test_a_shard_holds_its_part_and_keeps_the_whole_off(tmp_path: Path) -> None:
    holding = (
        "import pathlib, sys, thyme.verbs.folders as folders\n"
        "with folders.held(pathlib.Path(sys.argv[1]), sys.argv[2]): print(flush=True), input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path), "00000-of-00002"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for part in ("", "00000-of-00002"):
            with pytest.raises(ValueError, match="in use by another process"), held(tmp_path, part):
                pass
        with held(tmp_path, "00001-of-00002"):
            pass
        other.communicate(b"\n")
    with held(tmp_path):
        pass


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard", "3/2"], "must be i/n with i from 1 to n"),
        (["--shard", "1/2", "--eval.ray-workers", "2"], "leave shard out, or Ray"),
        (["--shard", "1/2", "--score", "p.jsonl"], "shard: --score asks no model"),
        (["--eval.ray-workers", "2", "--score", "p.jsonl"], "eval.ray_workers: --score asks no model"),
        (["--eval.ray-workers", "-1"], "ray_workers: -1 must be at least 0"),
        (["--eval.ray-workers", "2", "--eval.best-of", "3"], "best_of and retries are of held-out questions alone"),
    ],
)
def test_what_does_not_go_together_is_said(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows(1)
    assert run("--eval.benchmark", "mcq", "--eval.data", "a.tsv", "--model", "none", *more) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--shard", "1/2"], ["--control", "blind"], ["--eval.robustness", "jpeg"]])
def test_what_is_asked_row_by_row_is_drawn_once(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for drawn in (["--eval.best-of", "3"], ["--eval.retries", "1"]):
        assert run("demo", "--model", "none", *more, *drawn) == 2
        assert f"{more[0][2:]}: each answer is drawn once" in capsys.readouterr().err


@pytest.mark.soak
def test_two_ray_workers_answer_what_one_process_answers_also_when_they_are_killed(demo_checkpoint: Path) -> None:
    pytest.importorskip("ray")
    rows(24)
    more = ["--control", "result_only", "--eval.paper-protocol", "true", "--eval.samples", "1", "--eval.at-once", "2"]
    command = [*arguments(demo_checkpoint), *more]
    assert run(*command, "--name", "whole") == 0
    ray = ["eval", *command, "--name", "ray", "--eval.resume", "true", "--eval.ray-workers", "2"]
    log, predictions = Path("log"), Path("runs/ray/predictions/mcq.jsonl")

    def answered() -> int:
        return len(predictions.read_text().splitlines()) - 1 if predictions.is_file() else 0

    driver = launched(ray, log)
    waits_for(lambda: answered() >= 1, driver, log)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = answered()
    assert 1 <= before < 24

    driver = launched(ray, log)
    waits_for(lambda: answered() > before and len(workers_of(driver)) == 2, driver, log)
    os.kill(workers_of(driver)[0], signal.SIGKILL)
    assert driver.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert kept("ray") == kept("whole")


@pytest.mark.soak
def test_rows_that_a_worker_cannot_ask_are_named(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    write_tsv(Path("a.tsv"), [choice(0), choice(1, image="bm9waWN0dXJl"), choice(2)])
    assert run(*arguments(demo_checkpoint), "--eval.ray-workers", "2") == 0
    assert json.loads(Path("runs/eval/score.json").read_text())["n"] == 2
    assert "left out: 1 picture (a.tsv, index 1: image 0" in capsys.readouterr().err
