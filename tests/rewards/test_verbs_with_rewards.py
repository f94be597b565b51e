"""A judge and a reward of one's own from the command line, as a user has them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rewards.judge_server import NO, SOON, JudgeServer, Reply
from tests.train.sft_material import train_rows
from thyme.cli import main
from thyme.data.streams import endless
from thyme.model import Processor, build, save
from thyme.rollout.dialect import Dialect, write_dialect
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations
from thyme.train.config import SftConfig

SMALL = (
    *("--threads", "1", "--engine.num-blocks", "200", "--engine.max-sequences", "8", "--engine.max-context", "1400"),
    *("--rollout.max-tokens", "120", "--rollout.max-tokens-per-round", "80", "--rollout.group-size", "2"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256"),
)
RL = (*SMALL, "--rl.steps", "1", "--rl.batch-size", "1", "--rl.record-steps", "1", "--rollout.temperature", "0.1")


@pytest.fixture(scope="session")
def knowing(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows one product by heart, its reasoning and its answer."""
    model = build(tiny_config(), processor, seed=0)
    config = SftConfig(steps=40, batch_size=1, optimizer="adamw", learning_rate=3e-3)
    train_rows(model, processor, endless(demonstrations(0, 1, {"arithmetic": 1.0})), config)
    folder = tmp_path_factory.mktemp("knowing")
    save(model, processor, folder)
    write_dialect(folder, Dialect(prompt_style="short"))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The question that it knows, with a solution that no rule can compare its answer with."""
    asked = demonstrations(0, 1, {"arithmetic": 1.0})[0].question
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": asked.question}], "solution": "the figure in the ledger"}
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with JudgeServer() as opened:
        yield opened


def thyme(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def judge(server: JudgeServer) -> tuple[str, ...]:
    return ("--judge.url", server.url, "--judge.model", "m", "--judge.cache", "verdicts", "--judge.retries", "0")


def rewards(run: str) -> list[dict]:
    lines = Path(f"runs/{run}/rollouts/step_0.jsonl").read_text().splitlines()
    return [json.loads(line)["rewards"] for line in lines]


def metrics(run: str) -> dict[str, float]:
    (row,) = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    return row


def test_rl_asks_the_judge_and_remembers_what_it_said(server: JudgeServer, knowing: Path, rows: Path) -> None:
    given = ("--model", knowing, "--data.train", rows, *RL, *judge(server))
    thyme("rl", "--name", "a", *given)
    assert {asked.key for asked in server.asked} == {"Correctness", "Consistency"}
    assert all("\nthe figure in the ledger\n" in a.prompt for a in server.asked if a.key == "Correctness")
    assert [reward["total"] for reward in rewards("a")] == [2.0, 2.0]
    assert metrics("a")["judge/calls"] == len(server.asked)
    server.stop()
    thyme("rl", "--name", "b", *given)
    assert rewards("b") == rewards("a")
    assert metrics("b")["judge/calls"] == 0 < metrics("b")["judge/cache_hits"]


def test_a_judge_that_is_down_leaves_groups_out(
    server: JudgeServer, knowing: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda asked, number: Reply(status=500, headers=SOON)
    thyme("rl", "--name", "a", "--model", knowing, "--data.train", rows, *RL, *judge(server))
    assert rewards("a") == [None, None]
    assert metrics("a")["reward/groups_failed"] == 1.0 and metrics("a")["judge/failures"] > 0


def test_an_evaluation_with_a_judge_counts_what_rules_do_not_decide(
    server: JudgeServer, knowing: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", knowing, "--data.heldout", rows, *SMALL, "--eval.num-questions", "1")

    def overall(name: str) -> tuple[float, int, int]:
        figures = json.loads(Path(f"runs/{name}/eval.json").read_text())["overall"]
        return figures["accuracy"], figures["by_judge"], figures["errors"]

    thyme("eval", "--name", "rules", *given)
    assert overall("rules") == (0.0, 0, 0) and "judge" not in capsys.readouterr().out
    thyme("eval", "--name", "judged", *given, *judge(server))
    assert overall("judged") == (1.0, 1, 0) and "right on the judge's word: 1, not judged: 0" in capsys.readouterr().out
    assert [asked.key for asked in server.asked] == ["Correctness"]
    server.reply = NO
    thyme("eval", "--name", "refused", *given, *judge(server)[:4])
    assert overall("refused") == (0.0, 0, 0)
    server.stop()
    thyme("eval", "--name", "down", *given, *judge(server)[:4], "--judge.retries", "0")
    assert overall("down") == (0.0, 0, 1) and "not judged: 1" in capsys.readouterr().out


def test_evaluation_on_the_way_asks_the_judge_too(server: JudgeServer, knowing: Path, rows: Path) -> None:
    heldout = Path("heldout.jsonl")
    heldout.write_text(rows.read_text().replace("ledger", "register"))
    held = ("--data.heldout", heldout, "--eval.every-steps", "1", "--eval.num-questions", "1")
    thyme("rl", "--name", "a", "--model", knowing, "--data.train", rows, *held, *RL, *judge(server))
    row = metrics("a")
    assert (row["eval/accuracy"], row["eval/by_judge"], row["eval/not_judged"]) == (1.0, 1.0, 0.0)


def test_rl_takes_a_function_of_ones_own(server: JudgeServer, knowing: Path, rows: Path) -> None:
    Path("mine.py").write_text(
        "async def reward(rollouts, judge=None):\n"
        "    return [{'order': rollout.index, 'judged': judge is not None} for rollout in rollouts]\n"
    )
    given = ("--model", knowing, "--data.train", rows, *RL, "--reward.function", "mine.py:reward")
    thyme("rl", "--name", "a", *given)
    assert [reward["parts"] for reward in rewards("a")] == [
        {"order": 0.0, "judged": 0.0},
        {"order": 1.0, "judged": 0.0},
    ]
    assert metrics("a")["reward/order/mean"] == 0.5
    thyme("rl", "--name", "b", *given, *judge(server))
    assert [reward["total"] for reward in rewards("b")] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--reward.function", "mine.py:other"), "'other' is not there in mine.py"),
        (("--reward.function", "nowhere.py:reward"), "no file 'nowhere.py'"),
        (("--reward.function", "mine.py:reward"), "failed on its first group (question "),
        (("--judge.url", "URL", "--judge.model", "m"), "refuses its first request: HTTP 404"),
        (("--judge.url", "http://127.0.0.1:1/v1"), "model: None must be the judge's name at judge.url"),
        (("--reward.overlong-buffer-tokens", "121"), "must be at most the response's limit, 120 tokens"),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    server: JudgeServer,
    knowing: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, ...],
    message: str,
) -> None:
    Path("mine.py").write_text("def reward(rollouts):\n    return []\n")
    server.reply = lambda asked, number: Reply(status=404)
    settings = tuple(server.url if value == "URL" else value for value in settings)
    with pytest.raises(SystemExit):
        thyme("rl", "--model", knowing, "--data.train", rows, *RL, "--rl.steps", "2", *settings)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert line.startswith("thyme: ")
