"""`thyme ablate` as a user runs it: a process a run, none of them twice."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.progress_line import watched
from tests.verbs.test_verbs import SMALL, thyme
from thyme.verbs import ablate, sft

TINY = (*SMALL, "--rl.steps", "1", "--rl.batch-size", "2", "--rl.kl-coef", "0", "--metrics", "reward/mean")
VARY = ("--vary", "rollout.temperatures.code=0,0.6", "--seeds", "0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        thyme("ablate", *args)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.soak
def test_each_run_is_made_once(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("ablate", "--model", demo_checkpoint, "--name", "ab", *VARY, *TINY)
    thyme(*asked)
    assert "2 runs, 2 of them to do" in capsys.readouterr().out
    runs = [Path("runs/ab-0-seed0"), Path("runs/ab-0.6-seed0")]
    assert [("code_temperature = 0.6" in (run / "config.toml").read_text()) for run in runs] == [False, True]
    figures = json.loads(Path("runs/ab/ablation.json").read_text())["metrics"]["reward/mean"]
    logged = [json.loads((run / "metrics.jsonl").read_text())["reward/mean"] for run in runs]
    assert [arm["by_seed"] for arm in figures] == [[value] for value in logged]
    assert "| code 0.6 |" in Path("runs/ab/ablation.md").read_text()
    with Image.open("runs/ab/ablation.png") as image:
        assert image.width == 960
    times = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    thyme(*asked)
    assert "2 runs, 0 of them to do" in capsys.readouterr().out
    assert times == [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert "a run of other settings" in refused(capsys, *asked[1:], "--rl.learning-rate", "1e-3")


def test_a_run_that_was_stopped_goes_on_and_one_that_fails_is_named(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is asked of the processes; what `resume` does has tests of its own."""
    called: list[list[str]] = []

    class Pretended:
        def __init__(self, command: list[str], stdout: Any, stderr: Any) -> None:
            called.append(command[3:])
            print("Traceback\nthyme: the disk is full", file=stdout, flush=True)

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(ablate.subprocess, "Popen", Pretended)
    asked = ("--model", demo_checkpoint, "--name", "ab", *VARY, *TINY)
    said = refused(capsys, *asked)
    assert "code 0, seed 0: thyme rl runs/ab/recipes/ab-0-seed0.toml ended with 2: thyme: the disk is full" in said
    assert called == [["rl", "runs/ab/recipes/ab-0-seed0.toml"]], "another was started after one had failed"
    from thyme.config import to_toml
    from thyme.options import parse
    from thyme.train.manifest import Origin, text_digest
    from thyme.verbs.training_run import RunState

    run = ablate.runs_of(parse(ablate.Config, [str(word) for word in asked]))[0]
    digest = text_digest(to_toml(run.config))
    run.folder.mkdir(parents=True)
    origin = Origin(config=digest, model="m", model_digest="", data_digest="")
    RunState(verb="rl", config=digest, origins={}, origin=origin).write(run.folder)
    called.clear()
    refused(capsys, *asked)
    assert called == [["resume", "runs/ab-0-seed0"]]


def test_the_line_is_of_all_runs_and_begins_with_what_is_finished(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = watched(monkeypatch, ablate)
    monkeypatch.setattr(ablate, "_is_finished", lambda run: run.seed == 0)
    monkeypatch.setattr(ablate, "_train", lambda run, *_: None)
    monkeypatch.setattr(ablate, "report", lambda *_: {})
    thyme("ablate", "--model", demo_checkpoint, "--name", "ab", *VARY, "1", "2", "--jobs", "2", *TINY)
    assert shown == [f"ablate {done}/6" for done in range(2, 7)]


def test_every_arm_is_checked_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (("--vary", "rl.steps=1,0"), "arm steps 0: rl: RlConfig.steps: 0 must be at least 1"),
        (("--vary", "rl.stesp=1,2"), "did you mean --rl.steps"),
        (("--vary", "rl.greedy_tokens=raw,soft"), "arm greedy_tokens soft: rollout.code_temperature: 0"),
        (("--vary", "seed=1,2"), "seed is not to be varied"),
        (("--stage", "sft", "--vary", "rl.steps=1,2"), "did you mean --sft.steps"),
        ((), "nothing is varied"),
        (("--vary", "rl.steps=1", "--seeds", "1", "1"), "seeds: [1, 1]"),
        (("--vary", "rl.steps=1", "--last", "0"), "last: 0 must be at least 1"),
    ]
    for args, message in cases:
        assert message in refused(capsys, *args), args
    assert not Path("runs").exists()


def test_held_out_questions_are_asked_at_the_end_where_they_are_compared() -> None:
    def every(*metrics: str) -> int:
        config = ablate.Config(vary=("rl.learning_rate=1e-4",), metrics=metrics)
        return ablate.runs_of(config)[0].config.eval.every_steps

    assert every("reward/mean") == 0
    assert every("reward/mean", "eval/accuracy") == every() == 20


def test_sft_is_compared_on_rows_of_each_seed() -> None:
    config = ablate.Config(stage="sft", vary=("sft.loss_rule=paper,all",), seeds=(3, 4))
    runs = ablate.runs_of(config)
    assert [type(run.config) for run in runs] == [sft.Config] * 4
    found = [(run.config.sft.loss_rule, run.config.toy.seed, run.config.data.seed, run.seed) for run in runs]
    assert found == [("paper", 3, 3, 3), ("paper", 4, 4, 4), ("all", 3, 3, 3), ("all", 4, 4, 4)]
    assert {run.config.eval.every_steps for run in runs} == {config.sft.steps}
    assert config.compared == ("eval/accuracy", "eval/code_share", "loss")


def test_a_dry_run_lists_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        thyme("ablate", "--dry-run", "--rl.step", "1")
    capsys.readouterr()
    thyme("ablate", "demo", "--dry-run", "--vary", "rl.steps=1,2", "--seeds", "0", "1")
    lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert lines[1] == "# steps 1, seed 1: runs/ablation-1-seed1"
