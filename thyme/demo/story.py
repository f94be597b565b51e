"""`thyme demo`: from random weights to a model that writes code because code pays, in minutes on two CPU cores.

Base stage, a cold start that lacks the decision to write code, evaluation, GRPO-ATS with the real engine and the real
sandbox, evaluation. Beside the main line a second process trains the rival: the same base given code in every
demonstration for the CPU time of cold start and RL together. At the end comes the control that shows that the answers
can't be read without code.
"""

import json
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thyme.demo import rivals
from thyme.demo.curve import Line, draw_curve
from thyme.demo.show import percent, scenario_table, show_traces
from thyme.demo.summary import Story
from thyme.evals import EvalResult
from thyme.rollout.records import write_rollouts
from thyme.verbs import anneal, base, eval, rl, sft
from thyme.verbs.folders import run_dir
from thyme.verbs.opening import Opened, open_loop, open_model, save_model
from thyme.verbs.recipe import Recipe

INTRO = (
    "[bold]Thyme demo.[/] A Qwen2.5-VL of 1.7 M parameters starts from random weights and learns to look closer: it "
    "writes Python that crops, rotates, stretches contrast and computes; a jailed sandbox runs it; GRPO-ATS rewards "
    "what works.\n[bold]What is toy about it:[/] the model sees every picture at 84 x 84 pixels; signs stand on a grid "
    "of sixths, one a picture, on a ground shaded so that position shows in color; the tokenizer has about 170 lexemes "
    "and prompts are short; a base stage on captions, some with the code that cuts a place out, stands in for "
    "pre-training. Engine, kernels, sandbox, rewards and training loops are the real ones.\n"
)

NEXT = """
Curve {folder}/curve.png   figures {folder}/summary.json   rollouts {folder}/rollouts/

Next:
  thyme view {folder}       look at it: curves, rollouts with their pictures, tokens in colours (extra `view`)
  thyme ask {folder}/checkpoints/rl PICTURE.png "What digit is on the red sign?"
  thyme demo --compare      a fragile cold start twice: adaptive temperature, and temperature 1 everywhere
  thyme demo --seed 1       another seed; --material digits | photos: handwriting, photographs
  thyme rl --help           what a run can be told"""


class Clock:
    """Wall and CPU seconds, sandbox children included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._cpu_now()

    @staticmethod
    def _cpu_now() -> float:
        parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(part.ru_utime + part.ru_stime for part in parts)

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        return self._cpu_now() - self._cpu


def run_demo(config: Recipe) -> dict[str, Any]:
    """The whole story; returns what it writes to runs/demo/summary.json."""
    with run_dir(config) as folder:
        return _told(config, folder)


def _told(config: Recipe, folder: Path) -> dict[str, Any]:
    console = Console(highlight=False)
    console.print(INTRO)
    clock = Clock()
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    checkpoints = folder / "checkpoints"
    with chapter(console, "1/5  Base stage: reading digits and locating signs, from captions"):
        opened = open_model(config)
        captioned = base.train(config, opened, folder, label="    base")
        save_model(opened, checkpoints / "base")

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as second_core:
        torch.set_num_threads(1)
        full_sft = second_core.submit(rivals.train_full_sft, config, checkpoints / "base", folder)
        with chapter(console, "2/5  Cold start: SFT that mostly answers small signs without code; then arithmetic"):
            sft_clock = Clock()
            sft.train(config, opened, folder, label="    sft")
            annealed = anneal.train(config, opened, folder, label="    anneal")
            cold_start_cpu_s = sft_clock.cpu_s
            save_model(opened, checkpoints / "sft")
        with chapter(console, f"3/5  Evaluation on {config.eval.num_questions} held-out questions"):
            before = evaluate_heldout(config, opened, console)
        with chapter(console, "4/5  GRPO-ATS: text at temperature 1, code at 0, reward for right answers"):
            rl_clock = Clock()
            with open_loop(config, opened) as loop:
                history = rl.train(config, opened, loop, folder, label="    rl")
            rl_cpu_s = rl_clock.cpu_s
            save_model(opened, checkpoints / "rl")
        with chapter(console, "5/5  Evaluation, the rival on the other core, the no-code control"):
            after = evaluate_heldout(config, opened, console)
            extra = second_core.submit(rivals.train_on, config, folder, full_sft.result(), rl_cpu_s)
            forbidden = rivals.train_control(config, checkpoints / "base")
            full = extra.result()
    story = Story(
        config=config,
        base=captioned[-1],
        anneal=annealed[-1] if annealed else {},
        before=before,
        after=after,
        full=full,
        control=forbidden,
        history=history,
        cold_start_cpu_s=cold_start_cpu_s,
        rl_cpu_s=rl_cpu_s,
        wall_s=clock.wall_s,
        cpu_s=clock.cpu_s,
    )
    tell(story, folder, console)
    return story.to_json()


def tell(story: Story, folder: Path, console: Console) -> None:
    """Writes summary.json, curve.png and the rollouts of both evaluations, and prints what they come to."""
    (folder / "summary.json").write_text(json.dumps(story.to_json(), indent=2) + "\n")
    draw_story(folder / "curve.png", story)
    for name, result in (("eval_sft", story.before), ("eval_rl", story.after)):
        rollouts = [r for group in result.rollouts for r in group]
        write_rollouts(folder / "rollouts" / f"{name}.jsonl", rollouts, [asdict(rl.reward(r)) for r in rollouts])
    columns = {"cold start": story.before, "GRPO-ATS": story.after, "SFT, all code": story.full.result}
    console.print(scenario_table(columns, story.control))
    console.print(story.in_words())
    show_traces(console, story.before, story.after, ("crop", "zoom", "rotate"))
    console.print(story.gate_lines())
    console.print(NEXT.format(folder=folder))


@contextmanager
def chapter(console: Console, title: str) -> Iterator[None]:
    """Prints a title, then how long what followed took."""
    console.print(f"[bold]{title}[/]")
    clock = Clock()
    yield
    console.print(f"    {clock.wall_s:.0f} s", style="dim")


def evaluate_heldout(config: Recipe, opened: Opened, console: Console) -> EvalResult:
    """Greedy, one rollout a question; says the accuracy."""
    result = eval.measure(config, opened)
    console.print(f"    accuracy {percent(result.overall)} %, code in {result.overall.code_share:.0%} of the rollouts")
    return result


def draw_story(path: Path, story: Story) -> None:
    """The learning curve of RL, between the evaluations that frame it."""
    steps = [m["step"] + 1 for m in story.history]
    ends = (0, len(steps))
    full = story.full.result.overall.accuracy
    draw_curve(
        path,
        f"GRPO-ATS, seed {story.config.seed}: right answers and code, by step",
        [
            Line("right answers, sampled rollouts", steps, [m["reward/result/mean"] for m in story.history]),
            Line("share of rollouts with code", steps, [m["rollout/code_share"] for m in story.history]),
            Line("held-out, greedy", ends, [story.before.overall.accuracy, story.after.overall.accuracy]),
            Line("SFT with all code, same CPU", ends, [full, full], dashed=True),
        ],
        "optimizer step",
    )
