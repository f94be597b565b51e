"""GRPO-ATS steps of a published shape with random weights, on one GPU: what fits, how long each phase takes.

    python bench/grpo_step.py --model qwen2.5-vl-7b --lora 64 [--steps 3] [--json OUT.json]
    python bench/grpo_step.py --model qwen2.5-vl-3b --checkpointing

The whole loop is `thyme rl`'s: questions with a picture, rollouts by the engine, the sandbox, advantages, the fused
head's loss, the optimizer. Random weights write no code and end nothing, so each rollout has the length it is allowed;
rewards are made up. The memory that was planned is printed beside the peak, and a second step's times, which compile
nothing.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import product
import torch
from rollout_throughput import noise, random_model

from thyme.data.streams import endless
from thyme.model.config import LoraConfig
from thyme.model.sizes import SIZES
from thyme.rewards import Reward, RuleScorer
from thyme.rollout.config import RolloutConfig
from thyme.rollout.dialect import Dialect
from thyme.rollout.types import Question, Rollout
from thyme.train.config import RlConfig
from thyme.train.memory import GIB, plan
from thyme.train.metrics import Metrics
from thyme.train.rl import train_rl
from thyme.verbs import rl
from thyme.verbs.jobs import job_of
from thyme.verbs.kv_size import beside_training
from thyme.verbs.opening import Opened, adapted, open_loop

SHOWN = (
    "time/rollout",
    "time/logprob",
    "time/train",
    "time/sync",
    "rollout/tokens_per_s",
    "batch/trained_tokens",
    "mismatch/kl",
    "actor/ratio_max",
    "actor/entropy",
    "optim/grad_norm",
    "loss",
)


def configured(options: argparse.Namespace) -> rl.Config:
    settings: dict[str, Any] = dict(
        steps=options.steps,
        batch_size=options.questions,
        max_tokens_per_micro_batch=options.micro_batch,
        activation_checkpointing=options.checkpointing,
        optimizer_offload=options.offload,
        kl_coef=options.kl_coef,
        learning_rate=1e-6,
        warmup_steps=0,
    )
    context = options.prompt + options.side**2 // 784 + options.new + 64
    return rl.Config(
        model=options.model,
        engine=replace(
            rl.Config().engine,
            max_sequences=options.questions * options.group,
            max_batch_tokens=8_192,
            max_context=context,
            quiet=True,
        ),
        sandbox=replace(rl.Config().sandbox, max_sessions=options.questions * options.group),
        rollout=RolloutConfig(group_size=options.group, max_tokens=options.new, prompt_style="short"),
        rl=RlConfig(**settings),
        lora=LoraConfig(rank=options.lora),
    )


def questions(options: argparse.Namespace) -> list[Question]:
    image = noise(options.side, options.side)
    return [
        Question(id=f"q{at}", image=image, image_path="q.png", question="a" * options.prompt, solution="1")
        for at in range(options.questions * options.steps)
    ]


def made_up(rollout: Rollout) -> Reward:
    """Half of a group is right."""
    return Reward(total=float(rollout.index % 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try things out")
    for name, value in (("questions", 8), ("group", 8), ("prompt", 200), ("new", 512), ("side", 896), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: every weight is trained")
    parser.add_argument("--micro-batch", type=int, default=16_384, help="tokens")
    parser.add_argument("--kl-coef", type=float, default=0.001)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="the optimizer's state")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config, processor = configured(options), product.processor()
    shape = SIZES[options.model]
    if options.layers:
        shape = replace(shape, text=replace(shape.text, num_hidden_layers=options.layers))
    model = random_model(shape, harness.DEVICE, processor)
    given = Opened(model=model, processor=processor, own_processor=processor, dialect=Dialect(prompt_style="short"))
    opened = adapted(given, config)
    engine = beside_training(config.engine, opened.model, config.rl, config.lora)
    job = job_of(config, "rl", itemsize=model.dtype.itemsize)
    if options.layers:
        job = replace(job, model=shape)
    phases = {phase: sum(items.values()) / GIB for phase, items in plan(job).phases.items()}
    phases["rollout"] += (engine.kv_bytes or 0) / GIB
    found: dict[str, Any] = {"planned_gib": phases, "options": {k: str(v) for k, v in vars(options).items()}}
    if harness.GPU:
        torch.cuda.reset_peak_memory_stats()
    steps: list[dict[str, Any]] = []
    started = time.perf_counter()

    def on_step(metrics: Metrics) -> bool:
        nonlocal started
        row = {name: metrics[name] for name in SHOWN if name in metrics} | {"seconds": time.perf_counter() - started}
        if harness.GPU:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        steps.append(row)
        print(json.dumps(row), flush=True)
        started = time.perf_counter()
        return False

    with open_loop(replace(config, engine=engine), opened) as loop:
        train_rl(
            model,
            processor,
            loop,
            endless(questions(options)),
            config.rl,
            scorer=RuleScorer(made_up),
            on_step=on_step,
        )
        found["engine"] = asdict(loop.timing) if hasattr(loop.timing, "__dataclass_fields__") else str(loop.timing)
        found["stats"] = loop.engine.stats()
    found["steps"] = steps
    last = steps[-1]
    sampled = options.questions * options.group * options.new
    found |= {
        "rollout_tok_per_s": sampled / last["time/rollout"],
        "step_tok_per_s": sampled / last["seconds"],
        "peak_of_plan": last.get("peak_gib", 0.0) / max(phases.values()),
    }
    print(json.dumps(found, indent=1, default=str))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
