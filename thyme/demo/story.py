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
from dataclasses import asdict, replace
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thyme.config import RunConfig, load_recipe
from thyme.data.synthetic import captions, sft_rows
from thyme.demo import rivals
from thyme.demo.curve import Line, draw_curve
from thyme.demo.show import percent, scenario_table, show_traces
from thyme.demo.summary import Story
from thyme.evals import EvalResult, evaluate
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rollout.records import write_rollouts
from thyme.stages import (
    ANNEAL_GATE_ROWS,
    anneal_stream,
    caption_stream,
    heldout_questions,
    judge,
    open_loop,
    open_model,
    question_stream,
    row_stream,
    run_dir,
    save_model,
)
from thyme.train.base import train_base
from thyme.train.metrics import Metrics, ProgressLine
from thyme.train.rl import train_rl
from thyme.train.sft import train_anneal, train_sft

INTRO = (
    "[bold]Thyme demo.[/] A Qwen2.5-VL of 1.7 M parameters starts from random weights and learns to look closer: it "
    "writes Python that crops, rotates, stretches contrast and computes; a jailed sandbox runs it; GRPO-ATS rewards "
    "what works.\n[bold]What is toy about it:[/] the model sees every picture at 84 x 84 pixels; signs stand on a grid "
    "of sixths, one a picture, on a ground shaded so that position shows in color; the tokenizer has about 170 lexemes "
    "and prompts are short; a base stage on captions stands in for pre-training. Engine, kernels, sandbox, rewards and "
    "training loops are the real ones.\n"
)

NEXT = """
Curve {folder}/curve.png   figures {folder}/summary.json   rollouts {folder}/rollouts/

Next:
  thyme ask {folder}/checkpoints/rl PICTURE.png "What digit is on the red sign?"
  thyme demo --compare      a fragile cold start twice: adaptive temperature, and temperature 1 everywhere
  thyme demo --seed 1       another seed; --material digits | photos: handwriting, photographs
  thyme rl --help           every setting of a run"""


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


def demo_config(seed: int, material: str, threads: int, recipe: str = "demo") -> RunConfig:
    """The shipped recipe with the seed put wherever something is drawn."""
    config = load_recipe(Path(str(files("thyme.recipes") / f"{recipe}.toml")))
    data = replace(config.data, seed=seed, material=material)  # type: ignore[arg-type]
    return replace(config, seed=seed, threads=threads, data=data)


def run_demo(*, seed: int = 0, material: str = "glyphs", threads: int = 1) -> dict[str, Any]:
    """The whole story; returns what it writes to runs/demo/summary.json."""
    config = demo_config(seed, material, threads)
    console = Console(highlight=False)
    console.print(INTRO)
    clock, folder = Clock(), run_dir(config)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    checkpoints = folder / "checkpoints"
    with chapter(console, "1/5  Base stage: reading digits and locating signs, from captions"):
        model, processor, base = train_base_stage(config, folder)
        save_model(config, model, processor, checkpoints / "base")

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as second_core:
        torch.set_num_threads(1)
        full_sft = second_core.submit(rivals.train_full_sft, config, checkpoints / "base", folder)
        with chapter(console, "2/5  Cold start: SFT that mostly answers small signs without code; then arithmetic"):
            sft_clock = Clock()
            anneal = train_cold_start(config, model, processor, folder)
            cold_start_cpu_s = sft_clock.cpu_s
            save_model(config, model, processor, checkpoints / "sft")
        with chapter(console, f"3/5  Evaluation on {config.eval.num_questions} held-out questions"):
            before = evaluate_heldout(config, model, processor, console)
        with chapter(console, "4/5  GRPO-ATS: text at temperature 1, code at 0, reward for right answers"):
            rl_clock = Clock()
            history = train_policy(config, model, processor, folder)
            rl_cpu_s = rl_clock.cpu_s
            save_model(config, model, processor, checkpoints / "rl")
        with chapter(console, "5/5  Evaluation, the rival on the other core, the no-code control"):
            after = evaluate_heldout(config, model, processor, console)
            extra = second_core.submit(rivals.train_on, config, folder, full_sft.result(), rl_cpu_s)
            forbidden = rivals.train_control(config, checkpoints / "base")
            full = extra.result()
    story = Story(
        config=config, base=base, anneal=anneal, before=before, after=after, full=full, control=forbidden,
        history=history, cold_start_cpu_s=cold_start_cpu_s, rl_cpu_s=rl_cpu_s, wall_s=clock.wall_s, cpu_s=clock.cpu_s,
    )  # fmt: skip
    summary = story.to_json()
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_story(folder / "curve.png", story)
    for name, result in (("eval_sft", before), ("eval_rl", after)):
        rollouts = [r for group in result.rollouts for r in group]
        write_rollouts(folder / "rollouts" / f"{name}.jsonl", rollouts, [asdict(judge(r)) for r in rollouts])

    columns = {"cold start": before, "GRPO-ATS": after, "SFT, all code": full.result}
    console.print(scenario_table(columns, forbidden))
    console.print(story.in_words())
    show_traces(console, before, after, ("crop", "zoom", "rotate"))
    console.print(story.gate_lines())
    console.print(NEXT.format(folder=folder))
    return summary


@contextmanager
def chapter(console: Console, title: str) -> Iterator[None]:
    """Prints a title, then how long what followed took."""
    console.print(f"[bold]{title}[/]")
    clock = Clock()
    yield
    console.print(f"    {clock.wall_s:.0f} s", style="dim")


def train_base_stage(config: RunConfig, folder: Path) -> tuple[Model, Processor, Metrics]:
    """Random weights -> base model; the last metrics hold the gates."""
    model, processor = open_model(config)
    data = config.data
    heldout = captions(data.seed, config.base.gate_captions, data.material, mix=data.captions, split="heldout")
    shown = {"loss": "loss", "gate/ground": "locate", "gate/one": "read"}
    with ProgressLine(config.base.steps, "    base", shown) as line:
        history = train_base(
            model, processor, caption_stream(data), config.base, heldout=heldout, run_dir=folder, on_step=line
        )
    return model, processor, history[-1]


def train_cold_start(config: RunConfig, model: Model, processor: Processor, folder: Path) -> Metrics:
    """SFT that lacks the decision to write code, then math annealing; returns the last gate."""
    with ProgressLine(config.sft.steps, "    sft", {"loss": "loss"}) as line:
        train_sft(model, processor, row_stream(config.data), config.sft, run_dir=folder, on_step=line)
    heldout = sft_rows(config.data.seed, ANNEAL_GATE_ROWS, {"arithmetic": 1.0}, split="heldout")
    with ProgressLine(config.anneal.steps, "    anneal", {"loss": "loss", "gate/arithmetic": "held-out"}) as line:
        history = train_anneal(
            model, processor, anneal_stream(config.data), config.anneal, heldout=heldout, run_dir=folder, on_step=line
        )
    return history[-1] if history else {}


def train_policy(config: RunConfig, model: Model, processor: Processor, folder: Path) -> list[Metrics]:
    """GRPO-ATS, in place."""
    shown = {"reward/mean": "reward", "rollout/code_share": "code", "sandbox/success_rate": "code ok"}
    with (
        open_loop(config, model, processor) as loop,
        ProgressLine(config.rl.steps, "    rl", shown) as line,
    ):
        return train_rl(
            model, processor, loop, question_stream(config.data), config.rl,
            score=judge, seed=config.seed, run_dir=folder, on_step=line,
        )  # fmt: skip


def evaluate_heldout(config: RunConfig, model: Model, processor: Processor, console: Console) -> EvalResult:
    """Greedy, one rollout a question."""
    with open_loop(config, model, processor) as loop:
        result = evaluate(loop, heldout_questions(config), config.rollout.sampling(seed=config.eval.seed).greedy())
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
