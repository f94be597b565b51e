"""RL with everything on, as a user says it in a recipe."""

import json
import tomllib
from pathlib import Path

import pytest

from thyme.cli import main

RECIPE = """
threads = 1

[engine]
num_blocks = 200
max_sequences = 8
max_context = 1400
quiet = true

[rollout]
max_tokens = 6
max_tokens_per_round = 6
group_size = 2

[sandbox]
workers = 1
memory_mib = 256

[rl]
steps = 2
batch_size = 2
updates_per_batch = 2
epochs_per_batch = 2
truncated = "mask"
record_steps = 1

[rl.loss]
loss = "gspo"
clip_eps_low = 3e-4
clip_eps_high = 4e-4
rollout_ratio_cap = 2.0

[rl.mismatch]
mask = "sequence"
high = 5.0

[rl.select]
max_refills = 1
oversample = 1.5

[rl.alarms]
warmup = 1
window = 4
"""


def test_a_recipe_with_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model earns nothing anywhere: every group is asked again, and nothing is left to train on."""
    monkeypatch.chdir(tmp_path)
    Path("all.toml").write_text(RECIPE)
    main(["rl", "all.toml", "--name", "all"])
    run = Path("runs/all")
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    for row in (first, second):
        assert row["batch/refills"] == 1.0 and row["batch/groups"] == row["optim/updates"] == 0.0
        assert row["reward/frac_zero_std"] == 1.0
    assert (first["alarm/no_spread"], second["alarm/no_spread"]) == (0.0, 1.0)
    (alarm,) = (json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines())
    assert (alarm["alarm"], alarm["step"]) == ("no_spread", 1)
    rows = [json.loads(line) for line in (run / alarm["rollouts"]).read_text().splitlines()]
    assert [row["group"] for row in rows] == [group for group in range(6) for _ in "ab"]  # 3 asked, then 3 again
    said = tomllib.loads((run / "config.toml").read_text())["rl"]
    for name, value in tomllib.loads(RECIPE)["rl"].items():
        assert (said[name] | value if isinstance(value, dict) else value) == said[name]
