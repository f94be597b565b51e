"""Ctrl-C and SIGTERM on verbs in processes of their own: state on disk, the command that goes on, no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.build.endpoint import Endpoint, raw_rows
from tests.progress_line import watched
from tests.sandbox.host import children_of
from thyme.cli import main
from thyme.evals import EvalResult
from thyme.rollout.rollout import RolloutLoop
from thyme.verbs import eval

ROOT = Path(__file__).parents[2]
TOY = (
    *("--threads", "1", "--engine.num-blocks", "200", "--engine.max-sequences", "8", "--engine.max-context", "1400"),
    *("--rollout.max-tokens", "40", "--rollout.max-tokens-per-round", "40", "--rollout.group-size", "2"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256", "--engine.quiet", "true"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def interrupted(has_begun: Callable[[], bool], signum: int, *args: str | Path) -> tuple[str, str]:
    """Runs a verb, sends it the signal when it has begun, and looks at what is left of its processes; what it said."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from thyme.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 120
        while not has_begun():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        family = [process.pid, *children_of(process.pid)]
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in out + err and "Exception ignored" not in err
    assert len(family) > 1 or args[0] == "sft"
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in family):
        assert time.monotonic() < deadline, family
        time.sleep(0.05)
    return out, err


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def lines(path: str, count: int) -> Callable[[], bool]:
    """Whether a file has so many lines."""
    return lambda: Path(path).is_file() and Path(path).read_bytes().count(b"\n") >= count


@pytest.mark.soak
@pytest.mark.parametrize(("verb", "signum"), [("sft", signal.SIGINT), ("rl", signal.SIGTERM)])
def test_training_saves_the_step_and_goes_on(verb: str, signum: int) -> None:
    more = TOY if verb == "rl" else ("--threads", "1")
    begun = lines("runs/x/metrics.jsonl", 2)
    keys = (f"--{verb}.steps", "500", f"--{verb}.batch-size", "2")
    _, err = interrupted(begun, signum, verb, "--name", "x", *keys, *more)
    assert "thyme: stopping after this step; once more stops at once" in err.splitlines()
    assert err.splitlines()[-1] == "thyme: interrupted; go on with: thyme resume runs/x"
    steps = len(Path("runs/x/metrics.jsonl").read_text().splitlines())
    saved = Path(f"runs/x/checkpoints/{verb}_{steps}")
    assert (saved / "trainer" / "state.pt").is_file()
    assert not json.loads(Path("runs/x/run.json").read_text())["is_finished"]
    main(["resume", "runs/x", f"--{verb}.steps", str(steps + 1)])
    done = [json.loads(line)["step"] for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    assert done == list(range(steps + 1)) and Path(f"runs/x/checkpoints/{verb}").is_dir()


@pytest.mark.soak
def test_an_evaluation_keeps_its_answers_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("eval", *TOY, "--eval.num-questions", "60", "--name", "x", "--control", "tool_free")
    predictions = Path("runs/x/predictions/heldout.jsonl")
    _, err = interrupted(lines(str(predictions), 4), signal.SIGINT, *asked)
    assert err == "thyme: interrupted; answers are kept; the same command with --eval.resume true goes on\n"
    kept = predictions.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    assert 4 <= whole.count(b"\n") < 61
    main([*asked, "--eval.resume", "true"])
    assert predictions.read_bytes().startswith(whole) and predictions.read_bytes().count(b"\n") == 61
    assert "heldout under controls" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_held_out_answers_are_kept_and_go_on(signum: int) -> None:
    asked = ("eval", *TOY, "--eval.num-questions", "60", "--name", "x")
    journal = Path("runs/x/rollouts/.eval.jsonl")
    _, err = interrupted(lines(str(journal), 5), signum, *asked)
    assert err == "thyme: interrupted; answers are kept; the same command goes on\n"
    assert 5 <= journal.read_bytes().count(b"\n") < 61 and not Path("runs/x/eval.json").exists()
    main([*asked, "--eval.resume", "true"])
    assert json.loads(Path("runs/x/eval.json").read_text())["overall"]["n"] == 60 and not journal.exists()


def test_an_interrupted_evaluation_comes_out_as_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []
    results: list[EvalResult] = []
    ends_after = 1000
    run, judged = RolloutLoop.run, eval.judged

    def counted(loop: RolloutLoop, *args: Any, on_end: Any) -> Any:
        ended = 0

        def end(rollout: Any) -> None:
            nonlocal ended
            on_end(rollout)
            ended += 1
            if ended == ends_after:
                raise KeyboardInterrupt

        groups = run(loop, *args, on_end=end)
        assert loop.timing is not None
        drawn.append(loop.timing.sampled_tokens)
        return groups

    def kept(*args: Any) -> EvalResult:
        results.append(judged(*args))
        return results[-1]

    shown = watched(monkeypatch, eval)
    monkeypatch.setattr(RolloutLoop, "run", counted)
    monkeypatch.setattr(eval, "judged", kept)
    asked = ["eval", *TOY, "--engine.deterministic", "true", "--eval.num-questions", "5", "--eval.samples", "2"]
    asked += ["--eval.temperature", "1", "--name"]
    main([*asked, "whole"])
    ends_after = 4
    with pytest.raises(SystemExit) as ended:
        main([*asked, "x"])
    assert ended.value.code == 130
    ends_after = 1000
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*asked, "x", "--eval.resume", "true", "--eval.seed", "1"])
    assert "runs/x/rollouts/.eval.jsonl was made with other sampling: repeat it" in capsys.readouterr().err
    shown.clear()
    main([*asked, "x", "--eval.resume", "true"])
    assert shown == [f"eval {done}/10" for done in range(4, 11)]
    assert "thyme: 4 answers are there already" in capsys.readouterr().err
    whole, again = results
    tokens = [[rollout.token_ids.tolist() for group in one.rollouts for rollout in group] for one in results]
    assert tokens[0] == tokens[1] and 0 < drawn[1] < drawn[0]
    assert again.overall == whole.overall and again.scenarios == whole.scenarios
    main([*asked, "x"])  # it had ended: all is asked again
    assert drawn[2] == drawn[0]


@pytest.mark.soak
def test_rollouts_of_whole_groups_are_kept() -> None:
    Path("reward.py").write_text(
        "def one(rollouts):\n    open('scored', 'a').write('group\\n')\n    return [1.0] * len(rollouts)\n"
    )
    words = ("rollout", *TOY, "--count", "3000", "--name", "x", "--reward.function", "reward.py:one")
    _, err = interrupted(lines("scored", 2), signal.SIGTERM, *words)
    path = "runs/x/rollouts/step_0.jsonl"
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len(rows) >= 4 and len(rows) % 2 == 0 and all(row["rewards"] is not None for row in rows)
    assert f"{len(rows)} rollouts of {len(rows) // 2} questions, whole groups alone, are kept: {path}" in err


@pytest.mark.soak
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_build_keeps_what_has_ended_and_goes_on(signum: int) -> None:
    raw = raw_rows(Path("raw"), 12).resolve()
    with Endpoint() as endpoint:
        answer = endpoint.reply
        endpoint.reply = lambda asked, number: (time.sleep(0.1), answer(asked, number))[1]
        words = ["data", "build", "--data.train", str(raw), "--name", "x", "--build.triage", "false"]
        words += ["--writer.url", endpoint.url, "--writer.model", "w", "--build.concurrency", "1"]
        words += ["--sandbox.workers", "1", "--sandbox.memory-mib", "256"]
        journal = "runs/x/journal/00000-of-00001.jsonl"
        _, err = interrupted(lines(journal, 4), signum, *words)
        assert err == "thyme: interrupted; rows that have ended are kept; the same command goes on\n"
        before = Path(journal).read_bytes()
        assert 4 <= before.count(b"\n") < 13
        main(words)
    assert Path(journal).read_bytes().startswith(before) and Path(journal).read_bytes().count(b"\n") == 13
