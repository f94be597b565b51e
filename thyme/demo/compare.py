"""`thyme demo --compare`: does adaptive temperature keep a model from abandoning code?

A fragile cold start, whose code is right when drawn greedily and often broken when sampled, is trained by GRPO twice
from the same weights on the same questions: text 1 and code 0 (ATS), and temperature 1 everywhere. A well-fitted cold
start shows no such difference in greedy accuracy; that is why SFT ends here as soon as greedy code works.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from thyme.demo.curve import Line, draw_curve
from thyme.demo.show import percent
from thyme.demo.story import Clock, chapter
from thyme.evals import Summary, evaluate
from thyme.train.metrics import Metrics
from thyme.verbs import base, rl, sft
from thyme.verbs.folders import run_dir
from thyme.verbs.opening import Opened, open_loop, open_model, save_model
from thyme.verbs.recipe import Recipe
from thyme.verbs.rows import heldout_questions

ARMS = {"ATS: text 1, code 0": True, "1 everywhere": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of sampling, from start to end."""

    name: str
    before: Summary
    """Greedy, held out."""
    after: Summary
    history: list[Metrics]


def run_compare(config: Recipe) -> dict[str, Any]:
    """Both arms; returns what it writes to runs/compare/summary.json."""
    with run_dir(config) as folder:
        return _compared(config, folder)


def _compared(config: Recipe, folder: Path) -> dict[str, Any]:
    console, clock = Console(highlight=False), Clock()
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with chapter(console, "1/3  Base stage"):
        opened = open_model(config)
        base.train(config, opened, folder, label="    base")
    with chapter(console, "2/3  Fragile cold start: SFT until greedy code works"):
        found = WorkingCode(config, opened)
        sft.train(config, opened, folder, label="    sft", on_step=found)
        console.print(f"    {found.in_words()}")
        start = save_model(opened, folder / "checkpoints" / "sft")
    with (
        chapter(console, "3/3  GRPO from it, twice, one process each"),
        ProcessPoolExecutor(len(ARMS), mp_context=get_context("spawn")) as cores,
    ):
        running = [cores.submit(train_arm, config, start, folder, name, ats) for name, ats in ARMS.items()]
        arms = [arm.result() for arm in running]
    summary = {
        "seed": config.seed,
        "arms": [asdict(arm) for arm in arms],
        "wall_s": clock.wall_s,
        "cpu_s": clock.cpu_s,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    steps = [m["step"] + 1 for m in arms[0].history]
    draw_curve(
        folder / "curve.png",
        f"From a fragile cold start, seed {config.seed}: share of rollouts with code",
        [Line(arm.name, steps, [m["rollout/code_share"] for m in arm.history]) for arm in arms],
        "optimizer step",
    )
    console.print(arm_table(arms))
    console.print(verdict(arms))
    console.print(f"Curve {folder}/curve.png   figures {folder}/summary.json")
    return summary


class WorkingCode:
    """Ends SFT at the first check at which greedy code in sampled text runs: how many steps that takes depends on the
    seed, and a few steps more write code that sampling no longer breaks."""

    FIRST, EVERY = 40, 10  # steps
    QUESTIONS, SAMPLES = 48, 2
    CODE_SHARE, CODE_OK = 0.1, 0.95

    def __init__(self, config: Recipe, opened: Opened) -> None:
        self._config, self._opened = config, opened
        self._asked = heldout_questions(config, self.QUESTIONS)
        self._steps = 0
        self._seen: Summary | None = None

    def __call__(self, metrics: Metrics) -> bool:
        """After a step of SFT: whether to end the stage."""
        self._steps += 1
        if self._steps < self.FIRST or self._steps % self.EVERY:
            return False
        with open_loop(self._config, self._opened) as loop:
            sampling = loop.config.sampling(n=self.SAMPLES, temperature=1.0, code_temperature=0.0)
            self._seen = evaluate(loop, self._asked, sampling).overall
        return self._seen.code_share >= self.CODE_SHARE and (self._seen.code_ok or 0.0) >= self.CODE_OK

    def in_words(self) -> str:
        """What the last check saw."""
        if self._seen is None:
            return f"{self._steps} steps, unchecked"
        ran = "none" if self._seen.code_ok is None else f"{self._seen.code_ok:.0%}"
        return f"{self._steps} steps: code in {self._seen.code_share:.0%} of the rollouts with ATS, of it runs {ran}"


def train_arm(config: Recipe, start: Path, folder: Path, name: str, ats: bool) -> Arm:
    """GRPO from `start` with or without adaptive temperature, framed by greedy evaluations."""
    torch.set_num_threads(1)
    config = replace(config, model=str(start), threads=1, rollout=replace(config.rollout, adaptive=ats))
    opened = open_model(config)
    asked = heldout_questions(config, config.eval.num_questions)
    with open_loop(config, opened) as loop:
        before = evaluate(loop, asked)
        history = rl.train(config, opened, loop, folder / ("ats" if ats else "uniform"), label=None)
        after = evaluate(loop, asked)
    return Arm(name=name, before=before.overall, after=after.overall, history=history)


def arm_table(arms: list[Arm]) -> Table:
    """Before and after, greedy, and what happened to the code that was sampled on the way."""
    title = "Held-out accuracy in %, greedy [95 % interval]; first and last RL step"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("sampling", "before", "after", "code, greedy", "code, sampled", "of it runs"):
        table.add_column(column)
    for arm in arms:
        first, last = arm.history[0], arm.history[-1]
        ran = [f"{m['sandbox/success_rate']:.0%}" if "sandbox/success_rate" in m else "none" for m in (first, last)]
        table.add_row(
            arm.name,
            percent(arm.before),
            percent(arm.after),
            f"{arm.before.code_share:.0%} -> {arm.after.code_share:.0%}",
            f"{first['rollout/code_share']:.0%} -> {last['rollout/code_share']:.0%}",
            " -> ".join(ran),
        )
    return table


def verdict(arms: list[Arm]) -> str:
    """What was measured, in words chosen by the figures."""
    shares = [[m["rollout/code_share"] for m in arm.history] for arm in arms]
    ats, uniform = (f"{s[0]:.0%} -> {s[-1]:.0%}" for s in shares)
    figures = f"share of rollouts with code: {ats} with adaptive temperature, {uniform} without"
    if min(s[0] for s in shares) < 0.05:
        return f"This cold start hardly writes code: there was nothing to abandon ({figures})."
    kept, was_kept_without = (s[-1] >= 0.5 * s[0] for s in shares)
    if kept and not was_kept_without:
        return f"Without adaptive temperature code was abandoned; with it, it was not ({figures})."
    if kept:
        return f"In this run code was not abandoned without adaptive temperature either ({figures})."
    if was_kept_without:
        return f"In this run code was abandoned with adaptive temperature and not without ({figures})."
    return f"In this run code was abandoned both ways: it works too rarely to pay ({figures})."
