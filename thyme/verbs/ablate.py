"""Run a recipe's RL or SFT with settings varied, over seeds, and compare: means, intervals, differences, a chart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from thyme.config import from_dict, settings, to_dict, to_toml
from thyme.interrupt import goes_on_with
from thyme.options import value_of
from thyme.progress import progress
from thyme.result import Result
from thyme.train.config import SftConfig
from thyme.verbs import rl, sft
from thyme.verbs.config import TrainingConfig
from thyme.verbs.folders import RUN_FILE, RUNS

if TYPE_CHECKING:
    from thyme.evals.ablation.arms import Arm

METRICS = {
    "rl": ("eval/accuracy", "reward/result/mean", "rollout/code_share", "sandbox/success_rate"),
    "sft": ("eval/accuracy", "eval/code_share", "loss"),
}
STAGES: dict[str, type[TrainingConfig]] = {"rl": rl.Config, "sft": sft.Config}


@dataclass(frozen=True, kw_only=True)
class Config(rl.Config):
    """An ablation: the settings of `thyme rl` or `thyme sft`, and what is varied among its runs."""

    name: str = "ablation"
    stage: Literal["rl", "sft"] = "rl"
    """What is run. Of SFT a seed is that of the rows' order, and of the toy world where that gives them."""
    sft: SftConfig = field(default_factory=SftConfig)
    vary: tuple[str, ...] = ()
    """KEY=V1,V2 for each setting that is varied: every combination is an arm, and the first one is what the others are
    compared with. Settings that go together: KEY+OTHER=V1+W1,V2+W2."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is run with each of them."""
    metrics: tuple[str, ...] = ()
    """What is compared, by names of metrics.jsonl. Left out: eval/accuracy, reward/result/mean, rollout/code_share and
    sandbox/success_rate; of SFT eval/accuracy, eval/code_share and loss. Where one is of `eval/`, held-out questions
    are asked at the end of each run, if eval.every_steps does not say more."""
    last: int = 5
    """A run's figure is the mean over its last so many steps, those of them that have the metric."""
    jobs: int = 1
    """Runs at once, a process each."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)  # the arms are checked one by one
        for name in ("last", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}: give at least one, and none twice")

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics that are compared."""
        return self.metrics or METRICS[self.stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of an ablation."""

    arm: Arm
    seed: int
    stage: str
    """The verb that makes it."""
    config: TrainingConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return RUNS / self.config.name


def runs_of(config: Config) -> list[Run]:
    """Every run, by arm and seed, its settings checked.

    Raises:
        ValueError: a key that is unknown or a value that it cannot have; the arm is named.
    """
    trained = STAGES[config.stage]
    known = {f.name for f in settings(trained)}
    base = {key: value for key, value in to_dict(config).items() if key in known}
    if config.eval.every_steps == 0 and any(metric.startswith("eval/") for metric in config.compared):
        base["eval"]["every_steps"] = getattr(config, config.stage).steps
    from thyme.evals.ablation.arms import arms_of

    runs: list[Run] = []
    for arm in arms_of(config.vary):
        for seed in config.seeds:
            raw: dict[str, Any] = json.loads(json.dumps(base)) | {"seed": seed}
            raw["name"] = f"{config.name}-{arm.slug}-seed{seed}"
            if config.stage == "sft":
                raw["toy"]["seed"] = raw["data"]["seed"] = seed
            for key, text in arm.values:
                if key in ("seed", "name"):
                    raise ValueError(f"vary: {key} is not to be varied: every run has its own")
                *tables, last = key.split(".")
                table = raw
                for name in tables:
                    table = table.setdefault(name, {})
                table[last] = value_of(trained, key, text)
            try:
                runs.append(Run(arm=arm, seed=seed, stage=config.stage, config=from_dict(trained, raw)))
            except ValueError as error:
                raise ValueError(f"arm {arm.name}: {error}") from None
    return runs


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    for run in runs_of(config):
        yield f"{run.arm.name}, seed {run.seed}: {run.folder}"


def run(config: Config) -> Result:
    """Runs what is not finished yet, and writes ablation.md, ablation.json and ablation.png."""
    folder, runs = RUNS / config.name, runs_of(config)
    if (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} is a training run: --name gives this one another folder")
    finished = {run.folder: _is_finished(run) for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    missing = [run for run in runs if not finished[run.folder]]
    print(f"{len(runs)} runs, {len(missing)} of them to do")
    # Seed by seed, so that what there is of an ablation that was stopped compares.
    missing.sort(key=lambda run: config.seeds.index(run.seed))
    failed = Event()
    started: list[subprocess.Popen[bytes]] = []
    with (
        goes_on_with("the same command goes on"),
        progress(len(runs), "ablate", "run") as line,
        ThreadPoolExecutor(config.jobs) as workers,
    ):
        line.begin(len(runs) - len(missing))
        futures = [workers.submit(_train, run, folder, failed, started) for run in missing]
        try:
            for future in as_completed(futures):
                future.result()
                line.advance()
        except KeyboardInterrupt:
            failed.set()
            for process in started:
                process.terminate()
            raise
    return Result(report(config, runs))


def report(config: Config, runs: list[Run]) -> dict[str, Any]:
    """Writes what finished runs come to, and prints it; returns what ablation.json says."""
    from thyme.evals.ablation.chart import draw_chart
    from thyme.evals.ablation.figures import compared, last_value
    from thyme.evals.ablation.table import to_markdown

    folder = RUNS / config.name
    rows = {run.folder: _rows(run) for run in runs}
    found = {}
    for metric in config.compared:
        values: dict[str, list[float | None]] = {run.arm.name: [] for run in runs}
        for run in runs:
            values[run.arm.name].append(last_value(rows[run.folder], metric, config.last))
        found[metric] = compared(values)
    stage = config.sft if config.stage == "sft" else config.rl
    of = "rows" if config.stage == "sft" else f"questions x {config.rollout.group_size} rollouts"
    notes = [
        f"start: {config.model}; {stage.steps} steps of {stage.batch_size} {of}",
        f"a figure is the mean over a run's last {config.last} steps, those of them that have the metric",
        "intervals: 95 %, Student's, over seeds; differences: to the first arm, within each seed",
    ]
    if any(metric.startswith("eval/") for metric in config.compared):
        notes.append(f"eval/: {config.eval.num_questions} held-out questions")
    text = to_markdown(f"Ablation {config.name}", notes, config.seeds, found)
    (folder / "ablation.md").write_text(text)
    figures = {metric: [asdict(arm) for arm in arms] for metric, arms in found.items()}
    told = {"seeds": config.seeds, "metrics": figures}
    (folder / "ablation.json").write_text(json.dumps(told, indent=2) + "\n")
    draw_chart(folder / "ablation.png", f"Ablation {config.name}, {len(config.seeds)} seeds", found)
    print(text, end="")
    print(f"table {folder}/ablation.md   figures {folder}/ablation.json   chart {folder}/ablation.png")
    return told


def _is_finished(run: Run) -> bool:
    """Whether the run is done; ValueError where its folder holds a run of other settings."""
    from thyme.train.manifest import text_digest
    from thyme.verbs.training_run import RunState

    if not (run.folder / RUN_FILE).is_file():
        return False
    state = RunState.read(run.folder)
    if state.config != text_digest(to_toml(run.config)):
        raise ValueError(f"{run.folder} is a run of other settings: --name gives this ablation other folders")
    return state.is_finished


def _train(run: Run, folder: Path, failed: Event, started: list[subprocess.Popen[bytes]]) -> None:
    """A process that trains, or goes on where one was stopped; its output goes to the ablation's folder.

    None is started where another has failed: the pool's thread is at the next run before anybody could cancel it.
    """
    if failed.is_set():
        return
    verb, what = "resume", run.folder
    if not (run.folder / RUN_FILE).is_file():
        verb, what = run.stage, folder / "recipes" / f"{run.config.name}.toml"
        what.parent.mkdir(exist_ok=True)
        what.write_text(to_toml(run.config))
    log = folder / "logs" / f"{run.config.name}.txt"
    log.parent.mkdir(exist_ok=True)
    print(f"{run.arm.name}, seed {run.seed}: thyme {verb} {what}", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "thyme", verb, str(what)], stdout=output, stderr=output)
        started.append(process)
        code = process.wait()
    if code:
        failed.set()
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{run.arm.name}, seed {run.seed}: thyme {verb} {what} ended with {code}: {said} ({log})")


def _rows(run: Run) -> list[dict[str, Any]]:
    """The metrics of each of its steps."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("stage") == run.stage]
