"""The executor with the real sandbox: whatever way it is left, what ran is killed and nothing stays."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rollout.test_rollout import Processor
from tests.sandbox.host import eventually, open_descriptors, picture, snippets_of
from thyme.rollout.config import RolloutConfig
from thyme.rollout.executor import Diverged, Executor
from thyme.rollout.output import Output
from thyme.rollout.snapshots import Snapshots, room_for_snapshots
from thyme.rollout.types import Question, Turn
from thyme.sandbox import Sandbox, SandboxConfig, SandboxResult, Status

ROOT = Path(__file__).parents[2]
QUESTION = Question(id="q", image=picture(40, 30), image_path="pic.png", question="what?", solution="7")
ENDLESS = "while True: pass"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(workers=2, memory_mib=256, timeout_s=60.0, max_sessions=16)) as sandbox:
        yield sandbox


def executor(sandbox: Sandbox) -> Executor:
    return Executor(sandbox, Processor(), RolloutConfig())  # type: ignore[arg-type]


def test_a_session_has_every_picture_of_its_question(sandbox: Sandbox) -> None:
    question = replace(QUESTION, more_images=(("other.png", picture(20, 10)),))
    with executor(sandbox) as run:
        result, _ = run.run(
            1, question, 0, "for path in ('pic.png', 'other.png'): print(Image.open(path).size)"
        ).result()
        assert result.stdout == "(40, 30)\n(20, 10)\n"


def test_a_rollout_s_blocks_share_a_session_that_knows_its_image(sandbox: Sandbox) -> None:
    with executor(sandbox) as run:
        first, _ = run.run(1, QUESTION, 0, "x = Image.open(image_path).size").result()
        result, output = run.run(1, QUESTION, 0, "print(x, image_path)").result()
        other, _ = run.run(2, QUESTION, 0, "print('x' in globals())").result()
        assert first.status is Status.OK and other.stdout == "False\n"
        assert result.stdout == "(40, 30) pic.png\n"
        assert output.text == "<sandbox_output>(40, 30) pic.png</sandbox_output>"
        assert run.end(1).result() is None and run.end(1).result() is None
        assert run.run(1, QUESTION, 0, "print('x' in globals())").result()[0].stdout == "False\n"


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()])
def test_leaving_kills_what_runs_and_leaves_nothing(
    sandbox: Sandbox, error: BaseException | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two snippets run, ten wait for their turn, one session is idle; the time limit is a minute."""
    client, server = sandbox._client, sandbox._client.server.process.pid
    assert sandbox.run("print(1)", QUESTION.image).status is Status.OK
    idle = snippets_of(server)
    descriptors, threads = open_descriptors(), threading.active_count()
    with caplog.at_level(logging.DEBUG, "asyncio"):
        try:
            with executor(sandbox) as run:
                assert run.run(0, QUESTION, 0, "x = 1").result()[0].status is Status.OK
                futures = [run.run(i, QUESTION, 0, ENDLESS) for i in range(1, 13)]
                assert eventually(lambda: client.rounds.num_running == 2 and len(client.rounds.waiting) == 10)
                assert threading.active_count() == threads + 1
                if error is not None:
                    raise error
        except BaseException as seen:
            assert seen is error
    assert all(future.cancelled() for future in futures)
    assert threading.active_count() == threads
    assert client.rounds.num_running == 0 and not client.rounds.waiting and not client.rounds.live
    assert eventually(lambda: snippets_of(server) <= idle) and eventually(lambda: open_descriptors() <= descriptors)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sandbox.run("print(1)").stdout == "1\n"


def test_an_error_around_a_snippet_reaches_the_caller(sandbox: Sandbox) -> None:
    broken = Question(id="q", image="missing.png", image_path="", question="what?", solution="7")  # type: ignore[arg-type]
    with executor(sandbox) as run:
        with pytest.raises(ValueError, match=r"missing\.png"):
            run.run(1, broken, 0, "print(1)").result()
        assert run.run(2, QUESTION, 0, "print(1)").result()[0].stdout == "1\n"


def test_a_program_may_end_in_the_middle_of_a_run() -> None:
    """Its iterator suspended for ever, a snippet running: the program ends all the same, and quietly."""
    program = (
        "from tests.rollout.test_executor import *\n"
        "sandbox = Sandbox(SandboxConfig(workers=2, memory_mib=256, timeout_s=60.0))\n"
        "run = executor(sandbox).__enter__()\n"
        f"run.run(1, QUESTION, 0, {ENDLESS!r})\n"
        "assert eventually(lambda: sandbox._client.rounds.num_running == 1)\n"
        "print('over')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=40
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_inside_a_running_event_loop(sandbox: Sandbox) -> None:
    async def program() -> str:
        with executor(sandbox) as run:
            return run.run(1, QUESTION, 0, "print(6 * 7)").result()[0].stdout

    assert asyncio.run(program()) == "42\n"


def turn(code: str, outcome: tuple[SandboxResult, Output]) -> Turn:
    result, output = outcome
    return Turn(text="", code=code, result=result, output_text=output.text, num_images=0)


@pytest.mark.parametrize("live", [True, False], ids=["forked", "run again"])
def test_a_branch_goes_on_from_a_session_that_was_kept(live: bool) -> None:
    """Of code that gives something else each time only a fork can be had; what is beyond it is run again."""
    codes = ["import time, random\nx = [time.time_ns()]\nprint(x)", "x.append(random.random())\nprint(x[1])"]
    off = frozenset() if live else frozenset({"fork"})
    with Sandbox(SandboxConfig(workers=2, memory_mib=256, max_sessions=16), _off=off) as sandbox:
        live = any(layer.name == "live fork" and layer.ok for layer in sandbox.layers())
        snapshots = Snapshots(room_for_snapshots(sandbox))
        with Executor(sandbox, Processor(), RolloutConfig(), snapshots=snapshots) as run:  # type: ignore[arg-type]
            turns = [turn(code, run.run(1, QUESTION, 5, code).result()) for code in codes]
            third = run.run(1, QUESTION, 5, "x.append(random.random())\nprint(x)").result()[0]
            run.end(1).result()
        assert len(snapshots) == (3 if live else 0)
        with Executor(sandbox, Processor(), RolloutConfig(), snapshots=snapshots) as run:  # type: ignore[arg-type]
            if not live:
                with pytest.raises(Diverged, match="gave something else"):
                    run.run(2, QUESTION, 5, "print(x)", turns).result()
                return
            branches = [run.run(i, QUESTION, 5, "x.append(random.random())\nprint(x)", turns) for i in (2, 3)]
            assert [branch.result()[0].stdout for branch in branches] == [third.stdout] * 2
            first = run.run(4, QUESTION, 5, "print(x)", turns[:1]).result()[0]
            assert first.stdout == turns[0].result.stdout  # type: ignore[union-attr]
            other = run.run(5, QUESTION, 6, "print('x' in globals())", []).result()[0]
            assert other.stdout == "False\n"
        snapshots.close()
        assert eventually(lambda: not sandbox._client.rounds.live)


def test_a_session_kept_from_an_earlier_round_saves_what_came_before(sandbox: Sandbox) -> None:
    with Executor(sandbox, Processor(), RolloutConfig(), snapshots=(kept := Snapshots(1))) as run:  # type: ignore[arg-type]
        codes = ["import time\nx = time.time_ns()\nprint(x)", "y = x % 7\nprint(y)"]
        turns = [turn(codes[0], run.run(1, QUESTION, 5, codes[0]).result())]
        run.end(1).result()
        if not len(kept):
            pytest.skip("no live forks here")
        turns.append(turn(codes[1], run.run(2, QUESTION, 5, codes[1], turns).result()))
        run.end(2).result()
        assert len(kept) == 1, "there is room for one"
        assert run.run(3, QUESTION, 5, "print(y)", turns).result()[0].stdout == turns[1].result.stdout  # type: ignore[union-attr]
    kept.close()
