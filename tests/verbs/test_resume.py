"""`thyme resume`: after kill -9 anywhere a run ends as if nothing had been; and what it refuses."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.sft_material import train_rows
from thyme.cli import main
from thyme.data.streams import endless
from thyme.rollout.dialect import Dialect, read_dialect
from thyme.toy.scenarios import demonstrations
from thyme.train.config import SftConfig
from thyme.train.metrics import Metrics, MetricsLog
from thyme.verbs.config import RunConfig
from thyme.verbs.opening import open_model, save_model

ROOT = Path(__file__).parents[2]
RECIPE = """
model = "{model}"
threads = 1

[toy]
mix = {{ direct = 0.0, crop = 0.0, rotate = 0.0, contrast = 0.0, arithmetic = 1.0, zoom = 0.0 }}

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
group_size = 4
max_rounds = 1
max_tokens = 80
max_tokens_per_round = 60

[rl]
steps = 5
batch_size = 2
warmup_steps = 1
learning_rate = 1e-3
record_steps = 1
save_steps = 2
keep_checkpoints = 1
best_metric = "reward/mean"

[anneal]
steps = 3
batch_size = 3
gate_steps = 2
save_steps = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts from a model that half knows the products it is asked, and computes them with code."""
    folder = tmp_path_factory.mktemp("start")
    opened = open_model(RunConfig(threads=1))
    rows = endless(demonstrations(0, 10, {"arithmetic": 1.0}))
    config = SftConfig(steps=30, batch_size=5, loss_rule="all", learning_rate=2e-3, muon_learning_rate=2e-2)
    train_rows(opened.model, opened.processor, rows, config)
    (folder / "recipe.toml").write_text(RECIPE.format(model=save_model(opened, folder / "model")))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        thyme("rl", recipe, "--name", "x")
        thyme("anneal", recipe, "--name", "y")
    return folder / "runs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def thyme(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def killed(at: str, *args: str | Path) -> None:
    """Runs the verb in a process that is killed at the event, which must come."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.verbs.killed", at, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(entry: Any) -> Any:
    """Without what a clock or a meter said, and without what a resumed run says of itself."""
    if isinstance(entry, list):
        return [timeless(value) for value in entry]
    if not isinstance(entry, dict):
        return entry
    measured = ("time/", "perf/", "sandbox/exec_ms", "rollout/from_journal", "rollout/reopened")
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
    assert len(rows) == 5 and sum(row["optim/grad_norm"] > 0 for row in rows) >= 2
    assert sum(row["rollout/tool_calls"] for row in rows) > 0
    assert files(whole / "x" / "rollouts") == [f"step_{i}.jsonl" for i in range(5)]
    assert "rl_4" in files(whole / "x" / "checkpoints")
    assert files(whole / "y" / "checkpoints") == ["anneal", "anneal_2"]


@pytest.mark.parametrize(
    "at",
    [
        "journal:13",  # while rollouts are sampled, before there is a checkpoint
        "path:rl_4.*state",  # in the second save
        "journal:42",  # while rollouts are sampled after the first
    ],
)
def test_a_killed_rl_run_ends_as_if_it_had_not_been(at: str, recipe: Path, whole: Path) -> None:
    killed(at, "rl", recipe, "--name", "x")
    thyme("resume", "runs/x")
    assert_equal(Path("runs/x"), whole / "x", "rl")
    rows = lines(Path("runs/x/metrics.jsonl"))
    kept = [sum(row.get(f"rollout/{what}", 0) for row in rows) for what in ("from_journal", "reopened")]
    assert kept == [16, 0] if at.startswith("path") else sum(kept) >= 3  # of the two steps after rl_2, all


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_file_and_once_more_while_it_resumes(seed: int, recipe: Path, whole: Path) -> None:
    draw = random.Random(seed)
    verb, name, events = ("rl", "x", 150) if seed % 4 else ("anneal", "y", 60)
    killed(f"files:{draw.randint(1, events)}", verb, recipe, "--name", name)
    if not Path("runs", name, "run.json").is_file():
        thyme(verb, recipe, "--name", name)  # it had not begun
    else:
        killed(f"files:{draw.randint(1, 20)}", "resume", f"runs/{name}")
        thyme("resume", f"runs/{name}")
    assert_equal(Path("runs", name), whole / name, verb)


class Stopped(BaseException):
    """What ends a process, without the process."""


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_gated_stage_goes_on_where_it_was(
    step: int, recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when that step has been logged; the second and the last one look at the gate."""
    log, again = MetricsLog.log, []

    def log_and_stop(self: MetricsLog, number: int, values: Metrics) -> Metrics:
        logged = log(self, number, values)
        if number + 1 == step:
            raise Stopped
        return logged

    def log_and_note(self: MetricsLog, number: int, values: Metrics) -> Metrics:
        again.append(number)
        return log(self, number, values)

    monkeypatch.setattr(MetricsLog, "log", log_and_stop)
    with pytest.raises(Stopped):
        thyme("anneal", recipe, "--name", "y")
    monkeypatch.setattr(MetricsLog, "log", log_and_note)
    thyme("resume", "runs/y")
    assert_equal(Path("runs/y"), whole / "y", "anneal")
    assert again == ([2] if step == 3 else [0, 1, 2])


@pytest.mark.parametrize("step", [1, 2])
def test_a_signal_ends_a_step_that_is_saved_and_the_run_goes_on_from_there(
    step: int, recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where no checkpoint was due."""
    log, again = MetricsLog.log, []

    def log_and_signal(self: MetricsLog, number: int, values: Metrics) -> Metrics:
        if number + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return log(self, number, values)

    def log_and_note(self: MetricsLog, number: int, values: Metrics) -> Metrics:
        again.append(number)
        return log(self, number, values)

    monkeypatch.setattr(MetricsLog, "log", log_and_signal)
    with pytest.raises(SystemExit) as ended:
        thyme("anneal", recipe, "--name", "y")
    assert ended.value.code == 143 and "go on with: thyme resume runs/y" in capfd.readouterr().err
    assert files(Path("runs/y/checkpoints")) == [f"anneal_{step}"]
    monkeypatch.setattr(MetricsLog, "log", log_and_note)
    thyme("resume", "runs/y")
    assert again == list(range(step, 3))
    final, expected = (run / "checkpoints/anneal/model.safetensors" for run in (Path("runs/y"), whole / "y"))
    assert final.read_bytes() == expected.read_bytes()
    assert timeless(lines(Path("runs/y/metrics.jsonl"))) == timeless(lines(whole / "y" / "metrics.jsonl"))


def refused(capfd: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one line with which a verb refuses."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        thyme(*args)
    err = capfd.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1, err
    return err


def test_a_run_is_never_begun_again_over_an_old_one(
    recipe: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "x", "runs/x")
    before = (whole / "x" / "metrics.jsonl").read_bytes()
    for verb in ("rl", "anneal"):
        line = refused(capfd, verb, recipe, "--name", "x")
        assert "runs/x holds a run already" in line and "`thyme resume runs/x`" in line and "--name" in line
    assert "is a training run" in refused(capfd, "rollout", recipe, "--name", "x")
    assert Path("runs/x/metrics.jsonl").read_bytes() == before
    Path("runs/x/run.json").unlink()
    assert "resume" not in refused(capfd, "rl", recipe, "--name", "x")
    assert "no training run that can be resumed" in refused(capfd, "resume", "runs/x")
    assert "no such folder" in refused(capfd, "resume", "runs/z")
    assert "RUN missing" in refused(capfd, "resume")


def test_a_finished_run_says_so_and_goes_on_with_more_steps(
    recipe: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "x", "runs/x")
    thyme("resume", "runs/x")
    assert "runs/x is finished" in capfd.readouterr().out
    thyme("resume", "runs/x", "--rl.steps", "7")
    thyme("rl", recipe, "--name", "longer", "--rl.steps", "7")
    assert_equal(Path("runs/x"), Path("runs/longer"), "rl")
    assert "steps = 7" in Path("runs/x/config.toml").read_text()


def test_what_may_change_and_what_not(recipe: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "y", "runs/y")
    for key, value in (("--anneal.learning-rate", "1"), ("--model", "tiny"), ("--seed", "1"), ("--toy.seed", "2")):
        assert f"{key}: a resumed run keeps it" in refused(capfd, "resume", "runs/y", key, value)
    assert "did you mean --anneal.steps" in refused(capfd, "resume", "runs/y", "--anneal.step", "9")
    thyme("resume", "runs/y", "--threads", "1", "--anneal.save-steps", "1")  # is finished, and nothing is trained
    with Path("runs/y/config.toml").open("a") as file:
        file.write("# edited")
    assert "was changed after the run wrote it" in refused(capfd, "resume", "runs/y")


def test_a_full_disk_is_one_line_wherever_it_is_met(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(self: MetricsLog, step: int, values: Metrics) -> Metrics:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "log", log)
    assert "No space left on device" in refused(capfd, "anneal", recipe, "--name", "x")


def test_a_full_disk_that_names_no_file_is_named_by_its_place(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails, unlike an open, does not say what to."""

    def log(self: MetricsLog, step: int, values: Metrics) -> Metrics:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "log", log)
    real, here = shutil.disk_usage, Path.cwd()
    assert "full" not in refused(capfd, "anneal", recipe, "--name", "x"), "nothing is"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: real(place)._replace(free=0 if Path(place) == here else 1 << 30)
    )
    assert f"No space left on device: {here} is full" in refused(capfd, "anneal", recipe, "--name", "y")


def test_another_start_model_is_refused(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is the reference of the KL term."""
    shutil.copytree(recipe.parent / "model", "start")
    thyme("rl", recipe, "--model", "start", "--name", "x", "--rl.steps", "1")
    weights = bytearray(Path("start/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("start/model.safetensors").write_bytes(weights)
    assert "not the model that the run started from" in refused(capfd, "resume", "runs/x", "--rl.steps", "2")


def test_a_checkpoint_of_another_run_is_refused(recipe: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "x", "runs/x")
    manifest = json.loads(Path("runs/x/checkpoints/rl/manifest.json").read_text())
    manifest["origin"]["model_digest"] = "another"
    Path("runs/x/checkpoints/rl/manifest.json").write_text(json.dumps(manifest))
    assert "started from another model" in refused(capfd, "resume", "runs/x", "--rl.steps", "6")


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(
    recipe: Path, whole: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "x", "runs/x")
    Path("runs/x/checkpoints/rl/trainer/state.pt").unlink()
    thyme("resume", "runs/x", "--rl.steps", "6")
    assert "state.pt is missing" in caplog.text and "rl from rl_4, step 4" in capfd.readouterr().out
    thyme("rl", recipe, "--name", "longer", "--rl.steps", "6")
    assert_equal(Path("runs/x"), Path("runs/longer"), "rl")


def test_two_processes_do_not_write_one_run(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("runs/x").mkdir(parents=True)
    hold = (
        "import fcntl, sys; file = open('runs/x/.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', "
        "flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert "in use by another process" in refused(capfd, "rl", recipe, "--name", "x")
        other.communicate()
    thyme("rl", recipe, "--name", "x", "--rl.steps", "1")


def test_the_resumed_run_keeps_whose_word_counted(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A prompt style that the command line forced on the model is forced again, and not taken for a recipe's."""
    room = ("--engine.max-context", "1400", "--engine.num-blocks", "200")
    thyme("rl", recipe, "--name", "x", "--rl.steps", "1", "--rollout.prompt-style", "thyme", *room)
    assert read_dialect(Path("runs/x/checkpoints/rl")) == Dialect(prompt_style="thyme")
    thyme("resume", "runs/x", "--rl.steps", "2")
    assert "following 'thyme'" in capfd.readouterr().err
    assert read_dialect(Path("runs/x/checkpoints/rl")) == Dialect(prompt_style="thyme")
