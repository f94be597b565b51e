"""`thyme resume`: after kill -9 anywhere a run ends as if nothing had been; and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thyme.cli import main
from thyme.toy.scenarios import demonstrations
from thyme.train.config import SftConfig
from thyme.train.sft import train_sft
from thyme.verbs.config import RunConfig
from thyme.verbs.opening import open_model, save_model

ROOT = Path(__file__).parents[2]
RECIPE = """
model = "{model}"
threads = 1

[toy]
mix = {{ direct = 0.0, crop = 0.5, rotate = 0.0, contrast = 0.0, arithmetic = 0.5, zoom = 0.0 }}

[engine]
num_blocks = 64
max_sequences = 8
max_batch_tokens = 512
max_context = 512
deterministic = true
quiet = true

[sandbox]
workers = 1
memory_mib = 256

[rollout]
group_size = 3
max_rounds = 1
max_tokens = 64
max_tokens_per_round = 40

[rl]
steps = 5
batch_size = 2
warmup_steps = 1
learning_rate = 1e-3
record_steps = 1
save_steps = 2
keep_checkpoints = 1
best_metric = "reward/mean"

[sft]
steps = 3
batch_size = 1
save_steps = 2

[anneal]
steps = 3
batch_size = 3
gate_steps = 2
save_steps = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts from a model that writes code, so that rollouts have something to run."""
    folder = tmp_path_factory.mktemp("start")
    opened = open_model(RunConfig(threads=1))
    rows = demonstrations(0, 1, {"arithmetic": 1.0})
    config = SftConfig(steps=18, batch_size=1, learning_rate=3e-3)
    train_sft(opened.model, opened.processor, lambda start, n: rows * n, config)
    (folder / "recipe.toml").write_text(RECIPE.format(model=save_model(opened, folder / "model")))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        thyme("rl", recipe, "--name", "x")
        thyme("sft", recipe, "--name", "y")
    return folder / "runs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def thyme(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def killed(at: str, *args: str | Path) -> str:
    """Runs the verb in a process that is killed at the event; what it printed until then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.verbs.killed", at, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if at == "count" else -9), done.stderr
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(entry: Any) -> Any:
    """Without what a clock or a meter said, and without what a resumed run says of itself."""
    if isinstance(entry, list):
        return [timeless(value) for value in entry]
    if not isinstance(entry, dict):
        return entry
    measured = ("time/", "perf/", "sandbox/exec_ms", "rollout/kept")
    meters = ("wall_s", "sandbox_s", "cpu_s", "peak_mib")
    return {k: timeless(v) for k, v in entry.items() if not k.startswith(measured) and k not in meters}


def assert_equal(run: Path, expected: Path, verb: str) -> None:
    """To the byte where bytes are the result, line for line elsewhere; and nothing half is left."""
    final = f"checkpoints/{verb}"
    for file in ("model.safetensors", "config.json", "tokenizer.json", "thyme.json"):
        assert (run / final / file).read_bytes() == (expected / final / file).read_bytes(), file
    assert timeless(lines(run / "metrics.jsonl")) == timeless(lines(expected / "metrics.jsonl"))
    for folder in ("checkpoints", "rollouts"):
        assert files(run / folder) == files(expected / folder)
    for path in sorted((expected / "rollouts").glob("*.jsonl")):
        assert timeless(lines(run / "rollouts" / path.name)) == timeless(lines(path)), path.name
    if verb == "rl":
        best = "checkpoints/best.json"
        assert json.loads((run / best).read_text()) == json.loads((expected / best).read_text())


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_the_run_has_what_a_killed_one_could_lose(whole: Path) -> None:
    rows = lines(whole / "x" / "metrics.jsonl")
    assert len(rows) == 5 and all(row["optim/grad_norm"] > 0 for row in rows)
    assert sum(row["rollout/tool_calls"] for row in rows) > 0
    assert files(whole / "x" / "rollouts") == [f"step_{i}.jsonl" for i in range(5)]
    assert "rl_4" in files(whole / "x" / "checkpoints")
    assert files(whole / "y" / "checkpoints") == ["anneal_2", "sft", "sft_2", "sft_3"]


@pytest.mark.parametrize(
    ("at", "step"),
    [
        ("journal:12", 0),  # in the second step, before the first checkpoint
        ("files:260", 2),
        ("journal:26", 2),
    ],
)
def test_a_killed_rl_run_ends_as_if_it_had_not_been(at: str, step: int, recipe: Path, whole: Path) -> None:
    killed(at, "rl", recipe, "--name", "x")
    thyme("resume", "runs/x")
    assert_equal(Path("runs/x"), whole / "x", "rl")
    if at.startswith("journal"):
        assert sum(row.get("rollout/kept", 0) for row in lines(Path("runs/x/metrics.jsonl"))) > 0
