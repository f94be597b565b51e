"""`thyme profile` as a user runs it: what it writes, that the sums are the steps', what it refuses."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.trace_rules import checked
from thyme.cli import main
from thyme.engine.step_record import StepRecord
from thyme.verbs.live_line import RateLine, rate_line

SMALL = (
    *("--threads", "1", "--engine.num-blocks", "200", "--engine.max-sequences", "8", "--engine.max-context", "1400"),
    *("--rollout.max-tokens", "6", "--rollout.max-tokens-per-round", "6", "--rollout.group-size", "2"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "256"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def thyme(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def accounted(page: str) -> float:
    found = re.search(r"Named spans account for ([\d.]+)%", page)
    assert found is not None
    return float(found.group(1))


def test_a_reward_that_sleeps_is_named_first(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("slow.py").write_text(
        "import time\n\ndef reward(rollouts):\n    time.sleep(0.4)\n    return [0.0] * len(rollouts)\n"
    )
    thyme(
        *("profile", "rollout", "--model", demo_checkpoint, *SMALL, "--count", "1", "--steps", "2", "--name", "x"),
        *("--reward.function", "slow.py:reward", "--ops", "false"),
    )
    out = capsys.readouterr().out
    folder = Path("runs/x/trace")
    page = (folder / "verdict.md").read_text()
    assert out.startswith(page) and "runs/x/trace/trace.json" in out
    assert re.search(r"^1\. \*\*waiting for rewards\*\*", page, re.MULTILINE)
    assert accounted(page) >= 95
    assert "thyme profile rollout --model" in page and "--reward.function slow.py:reward --ops false" in page
    events = checked(folder / "trace.json")
    steps = [event for event in events if event.get("cat") == "steps" and event["name"].startswith("step ")]
    assert [event["name"] for event in steps] == ["step 1", "step 2"]  # step 0 is the warm-up
    scored = [event for event in events if event.get("cat") == "rewards"]
    assert len(scored) == 2 and all(event["dur"] > 0.35e6 for event in scored)
    records = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    shown = [
        event for event in events if event.get("cat") == "engine" and event["name"] in ("decode", "prefill", "mixed")
    ]
    assert len(records) == len(shown) and {record["kind"] for record in records} >= {"decode"}
    # The time of an engine step in the trace is the record's, and the engine's time is within the steps'.
    for record, event in zip(records, sorted(shown, key=lambda event: event["ts"]), strict=True):
        assert event["dur"] == pytest.approx(record["host_us"] + record["device_us"], abs=0.01)
    assert sum(event["dur"] for event in shown) < sum(event["dur"] for event in steps)
    assert "## Ops of one more step" not in page


def test_training_is_profiled_to_its_updates(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("spread.py").write_text("def reward(rollouts):\n    return [float(r.index) for r in rollouts]\n")
    spread = ("--reward.function", "spread.py:reward", "--rl.batch-size", "2", "--rl.epochs-per-batch", "2")
    of = ("--model", demo_checkpoint, *SMALL, *spread)
    thyme("profile", "train", *of, "--steps", "1", "--warmup", "0", "--name", "y")
    page = Path("runs/y/trace/verdict.md").read_text()
    for name in ("forward", "backward", "the optimizer's step"):
        row = rf"^\| training: {name} \| [\d.]+ \| [\d.]+% \| \d+\.\d+ \| \d+% \|$"
        assert re.search(row, page, re.MULTILINE), name
    assert "| log-probs before the update |" in page and "No update was made" not in page
    assert accounted(page) >= 95
    events = checked(Path("runs/y/trace/trace.json"))
    assert sum(event["name"] == "backward" for event in events) == 2
    assert not Path("runs/y/checkpoints").exists() and not Path("runs/y/metrics.jsonl").exists()
    ops = {row["name"]: row for row in json.loads(Path("runs/y/trace/ops.json").read_text())}
    assert {"thyme.grpo_loss", "thyme.paged_attention", "thyme.sample", "torch._fused_adamw_"} <= set(ops)
    assert "## Ops of one more step" in page and max(ops, key=lambda name: ops[name]["seconds"]) in page
    attention = [row for name, row in ops.items() if "scaled_dot_product" in name]
    assert len(attention) >= 2 and all(row["flops"] > 0 for row in attention)  # forward and backward


def test_sft_is_profiled_from_its_rows_to_its_updates(capsys: pytest.CaptureFixture[str]) -> None:
    thyme("data", "synth", "rows", "--sft", "12", "--rl", "0", "--heldout", "0")
    recipe = ("sft_7b_stage1", "--model", "tiny", "--data.train", "rows/sft.jsonl", "--threads", "1")
    small = ("--sft.batch-size", "4", "--sft.max-tokens-per-micro-batch", "1200", "--data.ahead-steps", "1")
    capsys.readouterr()
    thyme("profile", "train", *recipe, *small, "--steps", "2", "--name", "z")
    folder = Path("runs/z/trace")
    page = (folder / "verdict.md").read_text()
    assert capsys.readouterr().out.startswith(page) and page.startswith("# SFT of tiny\n")
    assert "`thyme profile train sft_7b_stage1 --model tiny" in page and "(sft.max_tokens_per_micro_batch)" in page
    assert accounted(page) >= 95 and "of 2 steps went" in page and "How far from the roof" not in page
    for name in ("forward", "backward", "the optimizer's step"):
        row = rf"^\| training: {name} \| [\d.]+ \| [\d.]+% \| \d+\.\d+ \| \d+% \|$"
        assert re.search(row, page, re.MULTILINE), name
    events = checked(folder / "trace.json")
    spans = [event for event in events if event["ph"] == "X"]
    steps = [event for event in spans if event["name"].startswith("step ")]
    assert [event["name"] for event in steps] == ["step 1", "step 2"]  # step 0 is the warm-up
    names = [event["name"] for event in spans if event["cat"] == "steps"]
    assert names.count("wait for data") == names.count("optimizer") == 2
    assert names.count("forward") == names.count("backward") >= 4  # micro-batches
    prepared = [event for event in spans if event["cat"] == "data"]
    assert prepared and all(event["args"]["count"] == 1 for event in prepared)  # by threads, ahead
    assert sum(event["dur"] for event in spans if event["name"] == "backward") > 0
    passes = [event["args"] for event in spans if event["name"] == "forward"]
    tokens, trained = sum(sum(work["lengths"]) for work in passes), sum(work["rows"] for work in passes)
    assert 0 < trained < tokens
    assert f"- {tokens:,} tokens in {len(passes)} micro-batches, {trained:,} of them trained" in page
    ops = {row["name"] for row in json.loads((folder / "ops.json").read_text())}
    assert {"torch._fused_adamw_"} <= ops and "thyme.paged_attention" not in ops
    assert not Path("runs/z/checkpoints").exists() and not Path("runs/z/metrics.jsonl").exists()


def test_which_stage_is_profiled_is_said_or_seen(capsys: pytest.CaptureFixture[str]) -> None:
    sft, rl = "rows: warm-up, timed, timed, ops", "rollouts each: warm-up, timed, timed, ops"
    of_group = ("--rollout.group-size", "1")  # nothing for rl to learn from
    for args, said in (
        (("sft_7b_stage1",), sft),
        (("sft_7b_stage1", *of_group), sft),
        (("--sft.batch-size", "2"), sft),
        (("demo",), rl),
        ((), rl),
        (("demo", "--stage", "sft"), sft),
        (("sft_7b_stage1", "--stage", "rl"), rl),
    ):
        thyme("profile", "train", *args, "--dry-run")
        assert said in capsys.readouterr().out, args
    with pytest.raises(SystemExit):
        thyme("profile", "train", "demo", *of_group)
    assert "rollout.group_size: 1 must be at least 2 to train by" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_ranks_are_refused(stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        thyme("profile", "train", "demo", "--stage", stage)
    assert "profile train: one process only: start it without torchrun" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.soak
def test_rollouts_of_a_hugging_face_folder_are_profiled(hub_folder: Path) -> None:
    thyme("data", "synth", "rows", "--sft", "0", "--rl", "3", "--heldout", "0")
    thyme(
        *("profile", "rollout", "--model", hub_folder, "--data.train", "rows/rl.jsonl", *SMALL, "--count", "1"),
        *("--steps", "1", "--warmup", "1", "--torch-profiler"),
    )
    page = Path("runs/profile/trace/verdict.md").read_text()
    assert accounted(page) >= 95 and "of 1 step went" in page
    checked(Path("runs/profile/trace/trace.json"))
    with gzip.open("runs/profile/trace/torch.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--steps", "0"), "steps: 0 must be at least 1"),
        (("--warmup", "-1"), "warmup: -1 must be at least 0"),
        (("--model", "nowhere"), "model nowhere: no such folder"),
        (("--memory-snapshot",), "memory_snapshot: PyTorch records allocations on a CUDA device only"),
        (("--nvtx",), "nvtx: NVTX has ranges on a CUDA device only"),
        (("--step", "3"), "unknown option --step: did you mean --steps?"),
    ],
)
@pytest.mark.parametrize("what", ["rollout", "train"])
def test_what_cannot_be_profiled_is_refused_in_a_line(
    what: str, args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "CUDA" in said:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        thyme("profile", what, *args)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_the_word_alone_says_what_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        thyme("profile")
    assert "thyme profile needs one of: rollout, train" in capsys.readouterr().err
    thyme("profile", "train", "demo", "--dry-run", "--steps", "3")
    assert "# steps of 16 questions, 8 rollouts each: warm-up, timed, timed, timed, ops" in capsys.readouterr().out


def step(samples: int, took_us: float, floor_us: float | None) -> StepRecord:
    return StepRecord(
        kind="decode",
        tokens=samples,
        sequences=samples,
        samples=samples,
        bytes=0,
        flops=0,
        idle_us=0.0,
        host_us=took_us / 2,
        device_us=took_us / 2,
        floor_us=floor_us,
        blocks=1,
        running=samples,
        waiting=2,
        parked=1,
        prefilled=0,
        unique=0,
    )


def test_the_live_line_is_of_the_last_seconds() -> None:
    now = 100.0
    line = RateLine("rollout", lambda: now)
    assert str(line) == "rollout"
    for _ in range(10):
        now += 0.1
        line.add(step(8, 1_000.0, 250.0))
    assert str(line) == "rollout  80 tok/s  25% of roof  8 running  2 waiting  1 parked"
    now += 10
    line.add(step(4, 1_000.0, None))
    assert str(line) == "rollout  2 tok/s  4 running  2 waiting  1 parked"


def test_the_live_line_is_shown_on_a_terminal_alone() -> None:
    with rate_line("rollout", Console(force_terminal=False)) as tell:
        assert tell is None
    console = Console(force_terminal=True, record=True, width=100)
    with rate_line("rollout", console) as tell:
        assert tell is not None
        tell(step(8, 1_000.0, 250.0))
    assert "25% of roof" in console.export_text()
