"""What the demo's main line is compared with: one thread, quiet, results by value, fit for a process of its own.

Each function loads its starting point from a checkpoint folder, so that nothing but paths and configs crosses over.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thyme.config import RunConfig
from thyme.data.synthetic import sft_rows
from thyme.evals import EvalResult, NoCodeControl, evaluate, no_code_control
from thyme.stages import (
    ANNEAL_GATE_ROWS,
    anneal_stream,
    heldout_questions,
    open_loop,
    open_model,
    row_stream,
    save_model,
)
from thyme.train.sft import train_anneal, train_sft

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


def train_full_sft(config: RunConfig, base: Path, folder: Path) -> float:
    """SFT and annealing as in the cold start, but with code in every demonstration that needs it.

    Returns:
        CPU seconds of one SFT step.
    """
    full = _from(config, base, no_code=0.0)
    model, processor = open_model(full)
    started = time.process_time()
    train_sft(model, processor, row_stream(full.data), full.sft)
    step_s = (time.process_time() - started) / full.sft.steps
    heldout = sft_rows(full.data.seed, ANNEAL_GATE_ROWS, {"arithmetic": 1.0}, split="heldout")
    train_anneal(model, processor, anneal_stream(full.data), full.anneal, heldout=heldout)
    save_model(full, model, processor, folder / "checkpoints" / FOLDER)
    return step_s


def train_on(config: RunConfig, folder: Path, step_s: float, cpu_s: float) -> RivalResult:
    """More of the same SFT for about `cpu_s` CPU seconds on rows not seen before, then the held-out evaluation."""
    start = folder / "checkpoints" / FOLDER
    full = _from(config, start, no_code=0.0)
    model, processor = open_model(full)
    steps = max(1, round(cpu_s / step_s))
    rows, seen = row_stream(full.data), full.sft.steps * full.sft.batch_size
    started = time.process_time()
    train_sft(model, processor, lambda at, n: rows(seen + at, n), replace(full.sft, steps=steps))
    spent = time.process_time() - started
    save_model(full, model, processor, start)
    with open_loop(full, model, processor) as loop:
        result = evaluate(loop, heldout_questions(full))
    return RivalResult(result=replace(result, rollouts=[]), extra_steps=steps, extra_cpu_s=spent)


def train_control(config: RunConfig, base: Path) -> NoCodeControl:
    """SFT in which most demonstrations of every code scenario answer at once with the truth; then code is forbidden."""
    control = _from(config, base, no_code=config.data.no_code, no_code_scenarios=CODE_SCENARIOS)
    model, processor = open_model(control)
    train_sft(model, processor, row_stream(control.data), control.sft)
    with open_loop(control, model, processor) as loop:
        return no_code_control(loop, heldout_questions(control))


def _from(config: RunConfig, folder: Path, **data: object) -> RunConfig:
    torch.set_num_threads(1)
    return replace(config, model=str(folder), threads=1, data=replace(config.data, **data))  # type: ignore[arg-type]
