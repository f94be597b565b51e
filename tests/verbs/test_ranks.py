"""The training verbs under torchrun, as a user runs them: one folder, one voice, and the run of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.ranks import torchrun
from thyme.cli import main
from thyme.model import load_model

SFT = ("--sft.batch-size", "5", "--sft.save-steps", "2", "--sft.max-tokens-per-micro-batch", "300")
RL = (
    *("--rl.batch-size", "3", "--rl.save-steps", "2", "--rl.warmup-steps", "1", "--rollout.group-size", "2"),
    *("--rollout.max-tokens", "24", "--engine.num-blocks", "64", "--engine.max-sequences", "8"),
    *("--engine.deterministic", "true", "--sandbox.workers", "1"),
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


def check_same(run: str, other: str, last: str) -> None:
    """Both runs tell of the same steps, and ended at the same weights but for the order of sums."""
    assert [line["step"] for line in lines(run)] == [line["step"] for line in lines(other)]
    for ours, theirs in zip(lines(run), lines(other), strict=True):
        for name in ("loss", "optim/grad_norm", "batch/trained_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
    a, b = (load_model(Path("runs") / name / "checkpoints" / last) for name in (run, other))
    assert max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True)) < 1e-3


def test_sft_on_two_ranks_is_one_run_and_one_process_goes_on_with_it(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "thyme", "sft", "--name", "two", "--sft.steps", "3", *SFT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: runs/two/checkpoints/sft") == 1
    assert sorted(path.name for path in Path("runs/two/checkpoints").iterdir()) == ["sft", "sft_2"]
    main(["resume", "runs/two", "--sft.steps", "5"])
    main(["sft", "--name", "one", "--sft.steps", "5", *SFT])
    check_same("two", "one", "sft")


def test_what_one_rank_refuses_ends_all_of_them(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "thyme", "sft", "--distributed.shard-ranks", "4", cwd=tmp_path)
    assert done.returncode != 0
    assert "distributed.shard_ranks: 4 does not divide the 2 ranks" in done.stderr


@pytest.mark.soak
def test_a_run_changes_its_number_of_ranks_both_ways(tmp_path: Path) -> None:
    main(["sft", "--name", "grown", "--sft.steps", "2", *SFT])
    for ranks, steps in ((3, "4"), (2, "6")):
        command = ("-m", "thyme", "resume", "runs/grown", "--sft.steps", steps)
        done = torchrun(ranks, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    main(["sft", "--name", "one", "--sft.steps", "6", *SFT])
    check_same("grown", "one", "sft")


@pytest.mark.soak
def test_rl_on_two_ranks_is_one_run_and_goes_on_on_one(tmp_path: Path) -> None:
    Path("reward.py").write_text("def by_text(rollouts):\n    return [float(len(r.text) % 5) for r in rollouts]\n")
    recipe = (*RL, "--reward.function", f"{tmp_path}/reward.py:by_text")
    done = torchrun(2, "-m", "thyme", "rl", "--name", "two", "--rl.steps", "2", *recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main(["resume", "runs/two", "--rl.steps", "3"])
    main(["rl", "--name", "one", "--rl.steps", "3", *recipe])
    check_same("two", "one", "rl")
    assert all(line["optim/grad_norm"] > 0 for line in lines("two"))
