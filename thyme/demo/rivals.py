"""What the demo's main line is compared with: one thread, quiet, results by value, fit for a process of its own.

Each function loads its starting point from a checkpoint folder, so that nothing but paths and configs crosses over.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thyme.evals import EvalResult, NoCodeControl, no_code_control
from thyme.toy.streams import demonstration_stream
from thyme.verbs import anneal, eval, sft
from thyme.verbs.opening import open_loop, open_model, save_model
from thyme.verbs.recipe import Recipe
from thyme.verbs.rows import heldout_questions

CODE_SCENARIOS = ("crop", "rotate", "contrast", "arithmetic", "zoom")
FOLDER = "sft_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalResult:
    """The rival after its extra SFT."""

    result: EvalResult
    """Without the rollouts."""
    extra_steps: int
    """SFT steps beyond those of the cold start."""
    extra_cpu_s: float
    """CPU seconds they took; the aim was RL's."""


def train_full_sft(config: Recipe, base: Path, folder: Path) -> float:
    """SFT and annealing as in the cold start, but with code in every demonstration that needs it.

    Returns:
        CPU seconds of one SFT step.
    """
    full = _from(config, base, no_code=0.0)
    opened = open_model(full)
    started = time.process_time()
    sft.train(full, opened, None, label=None)
    step_s = (time.process_time() - started) / full.sft.steps
    anneal.train(full, opened, None, label=None)
    save_model(opened, folder / "checkpoints" / FOLDER)
    return step_s


def train_on(config: Recipe, folder: Path, step_s: float, cpu_s: float) -> RivalResult:
    """More of the same SFT for about `cpu_s` CPU seconds on rows not seen before, then the held-out evaluation."""
    start = folder / "checkpoints" / FOLDER
    full = _from(config, start, no_code=0.0)
    opened = open_model(full)
    steps = max(1, round(cpu_s / step_s))
    rows, seen = demonstration_stream(full.toy), full.sft.steps * full.sft.batch_size
    more = replace(full, sft=replace(full.sft, steps=steps))
    started = time.process_time()
    sft.train(more, opened, None, rows=lambda at, n: rows(seen + at, n), label=None)
    spent = time.process_time() - started
    save_model(opened, start)
    result = eval.measure(full, opened)
    return RivalResult(result=replace(result, rollouts=[]), extra_steps=steps, extra_cpu_s=spent)


def train_control(config: Recipe, base: Path) -> NoCodeControl:
    """SFT in which most demonstrations of every code scenario answer at once with the truth; then code is forbidden."""
    control = _from(config, base, no_code=config.toy.no_code, no_code_scenarios=CODE_SCENARIOS)
    opened = open_model(control)
    sft.train(control, opened, None, label=None)
    with open_loop(control, opened) as loop:
        return no_code_control(loop, heldout_questions(control, control.eval.num_questions))


def _from(config: Recipe, folder: Path, **toy: object) -> Recipe:
    torch.set_num_threads(1)
    return replace(config, model=str(folder), threads=1, toy=replace(config.toy, **toy))  # type: ignore[arg-type]
