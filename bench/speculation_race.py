"""Rollout rounds with guessed tokens against without, in turns in one process.

    python bench/speculation_race.py MODEL

MODEL is a checkpoint of the toy (`thyme demo` leaves runs/demo/checkpoints/rl). Groups of each size draw the first
round of held-out questions, text at temperature 1 and code at 0, a question at a time and twice over, as epochs do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from thyme.engine import Engine, EngineConfig, Prompt, SamplingParams
from thyme.model import Model, load
from thyme.rollout.prompts import build_prompt
from thyme.toy.scenarios import demonstrations

MIX = {"crop": 1.0, "zoom": 1.0, "arithmetic": 1.0}
COUNTERS = ("steps", "verifications", "drafted_tokens", "accepted_tokens")


@dataclass
class Arm:
    """What one way of drawing took and gave."""

    seconds: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def draw(model: Model, prompts: list[Prompt], size: int, config: EngineConfig, arm: Arm) -> None:
    """All groups twice over, by an engine that has seen nothing."""
    engine, drawn = Engine(model, config), []
    start = time.perf_counter()
    for epoch in range(2):
        for number, prompt in enumerate(prompts):
            params = SamplingParams(n=size, max_tokens=96, seed=1000 * epoch + number, temperature=1.0)
            drawn += [completion.token_ids for completion in engine.generate([prompt], params)]
    arm.seconds.append(time.perf_counter() - start)
    stats = engine.stats()
    arm.token_ids, arm.counts = drawn, {name: stats[name] for name in COUNTERS}


def main() -> None:
    """Prints a row a group size and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    prompts = []
    for row in demonstrations(7, args.questions, MIX):
        built = build_prompt(row.question, "short", processor)
        prompts.append(
            Prompt(built.token_ids, tuple(processor.preprocess(image) for _, image in row.question.pictures))
        )
    print(f"{args.questions} questions, 2 epochs, medians of {args.turns} turns; gain: time without / time with")
    for size in args.sizes:
        arms = {name: Arm() for name in ("off", "greedy", "all")}
        for _ in range(args.turns):
            for name, arm in arms.items():
                config = EngineConfig(
                    num_blocks=2048,
                    max_sequences=32,
                    max_context=512,
                    deterministic=args.deterministic,
                    speculation=name,  # type: ignore[arg-type]
                    quiet=True,
                )
                draw(model, prompts, size, config, arm)
        off = arms["off"]
        for name in ("greedy", "all"):
            arm = arms[name]
            gain = statistics.median(a / b for a, b in zip(off.seconds, arm.seconds, strict=True))
            same = sum(a == b for a, b in zip(off.token_ids, arm.token_ids, strict=True))
            verified = max(1, arm.counts["verifications"])
            print(
                f"groups of {size:2d}  {name:6s}  gain {gain:.2f}  "
                f"steps {off.counts['steps']} -> {arm.counts['steps']}  "
                f"tokens a verification {1 + arm.counts['accepted_tokens'] / verified:.2f}  "
                f"equal {same} of {len(off.token_ids)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
