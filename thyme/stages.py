"""The verbs that run one stage of a RunConfig: base, sft, anneal, rl, rollout, eval. `thyme demo` is made of these.

A run writes runs/<name>/: config.toml (a recipe that repeats it), metrics.jsonl, rollouts/, images/, checkpoints/.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from thyme.config import RunConfig, to_toml
from thyme.data.config import DataConfig
from thyme.data.synthetic import Caption, SftRow, captions, questions, sft_rows
from thyme.engine import Engine
from thyme.evals import EvalResult, evaluate
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rewards import Reward, RuleJudge, score
from thyme.rollout.config import write_prompt_style
from thyme.rollout.records import write_rollouts
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox

RUNS = Path("runs")
ANNEAL_GATE_ROWS = 64
"""Held-out arithmetic rows behind the gate of math annealing."""


def run_dir(config: RunConfig) -> Path:
    """Makes runs/<name>/ and writes the resolved config into it."""
    folder = RUNS / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    return folder


def open_model(config: RunConfig) -> tuple[Model, Processor]:
    """The model of the run: a Hugging Face folder, or the embedded toy with random weights drawn from the seed.

    Raises:
        ValueError, FileNotFoundError: the folder is no model this project can load.
    """
    from thyme.model import build, load

    torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.model == "tiny":
        from thyme.data.tiny import tiny_config, tiny_processor

        toy = tiny_processor()
        return build(tiny_config(), toy, seed=config.seed, device=device), toy
    model, processor = load(config.model, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    if processor is None:
        raise ValueError(f"model {config.model}: no tokenizer: tokenizer.json belongs beside the weights")
    return model, processor


def save_model(config: RunConfig, model: Model, processor: Processor, folder: Path) -> Path:
    """A Hugging Face folder that also says how the model is to be prompted."""
    from thyme.model import save

    save(model, processor, folder)
    write_prompt_style(folder, config.rollout.prompt_style)
    return folder


@contextmanager
def open_loop(config: RunConfig, model: Model, processor: Processor) -> Iterator[RolloutLoop]:
    """Engine and sandbox around the model; the sandbox is closed at the end."""
    with Sandbox(config.sandbox) as sandbox:
        yield RolloutLoop(Engine(model, config.engine, processor=processor), sandbox, processor, config.rollout)


# Streams: (start, n) -> items start to start + n.


def caption_stream(data: DataConfig) -> Callable[[int, int], Sequence[Caption]]:
    return lambda start, n: captions(data.seed, n, data.material, mix=data.captions, start=start)


def row_stream(data: DataConfig) -> Callable[[int, int], Sequence[SftRow]]:
    return lambda start, n: sft_rows(
        data.seed,
        n,
        data.mix,
        material=data.material,
        no_code=data.no_code,
        no_code_scenarios=data.no_code_scenarios,
        no_code_answer=data.no_code_answer,
        box_noise=data.box_noise,
        start=start,
    )


def question_stream(data: DataConfig) -> Callable[[int, int], Sequence[Question]]:
    return lambda start, n: questions(data.seed, n, data.mix, material=data.material, start=start)


def heldout_questions(config: RunConfig) -> list[Question]:
    data = config.data
    return questions(data.seed, config.eval.num_questions, data.mix, "heldout", material=data.material)


def judge(rollout: Rollout) -> Reward:
    """Reward of a synthetic question: all by rules."""
    return score(rollout, RuleJudge())


# The verbs.


def base(config: RunConfig) -> None:
    """Stage 0: reading and locating, from captions."""
    from thyme.train.base import train_base
    from thyme.train.metrics import ProgressLine

    folder = run_dir(config)
    model, processor = open_model(config)
    heldout = captions(config.data.seed, config.base.gate_captions, config.data.material, split="heldout")
    with ProgressLine(config.base.steps, "base", {"loss": "loss", "gate/ground": "locate", "gate/one": "read"}) as line:
        train_base(
            model, processor, caption_stream(config.data), config.base, heldout=heldout, run_dir=folder, on_step=line
        )
    _report(save_model(config, model, processor, folder / "checkpoints" / "base"))


def sft(config: RunConfig) -> None:
    """SFT: the cold start, then math annealing behind its gate."""
    from thyme.train.metrics import ProgressLine
    from thyme.train.sft import train_sft

    folder = run_dir(config)
    model, processor = open_model(config)
    with ProgressLine(config.sft.steps, "sft", {"loss": "loss"}) as line:
        train_sft(model, processor, row_stream(config.data), config.sft, run_dir=folder, on_step=line)
    anneal(config, model, processor, folder)
    _report(save_model(config, model, processor, folder / "checkpoints" / "sft"))


def rl(config: RunConfig) -> None:
    """GRPO-ATS from a cold start."""
    from thyme.train.metrics import ProgressLine
    from thyme.train.rl import train_rl

    folder = run_dir(config)
    model, processor = open_model(config)
    shown = {"reward/mean": "reward", "reward/result/mean": "right", "sandbox/success_rate": "code ok"}
    with open_loop(config, model, processor) as loop, ProgressLine(config.rl.steps, "rl", shown) as line:
        train_rl(
            model, processor, loop, question_stream(config.data), config.rl,
            score=judge, run_dir=folder, on_step=line, seed=config.seed,
        )  # fmt: skip
    _report(save_model(config, model, processor, folder / "checkpoints" / "rl"))


def rollout(config: RunConfig) -> None:
    """Rollouts of training questions, with rewards, as JSONL and images."""
    folder = run_dir(config)
    model, processor = open_model(config)
    with open_loop(config, model, processor) as loop:
        groups = loop.run(
            question_stream(config.data)(0, config.rl.batch_size), config.rollout.sampling(seed=config.seed)
        )
    rollouts = [r for group in groups for r in group]
    path = folder / "rollouts" / "step_0.jsonl"
    write_rollouts(path, rollouts, rewards=[asdict(judge(r)) for r in rollouts])
    print(f"{len(rollouts)} rollouts of {len(groups)} questions: {path}")


def evaluation(config: RunConfig) -> EvalResult:
    """Held-out accuracy with 95 % intervals, printed and written to eval.json."""
    folder = run_dir(config)
    model, processor = open_model(config)
    with open_loop(config, model, processor) as loop:
        sampling = config.rollout.sampling(
            n=config.eval.samples,
            temperature=config.eval.temperature,
            code_temperature=config.eval.code_temperature,
            seed=config.eval.seed,
        )
        result = evaluate(loop, heldout_questions(config), sampling)
    (folder / "eval.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    for name, summary in [*result.scenarios.items(), ("all", result.overall)]:
        code = "no code" if summary.code_ok is None else f"code {summary.code_share:.0%}, ok {summary.code_ok:.0%}"
        interval = f"[{summary.low:.1%}, {summary.high:.1%}]"
        print(f"{name:<12} n {summary.n:>4}   accuracy {summary.accuracy:6.1%} {interval:<17} {code}")
    return result


def anneal(config: RunConfig, model: Model, processor: Processor, folder: Path) -> None:
    """Math annealing, in place."""
    from thyme.train.metrics import ProgressLine
    from thyme.train.sft import train_anneal

    data, arithmetic = config.data, {"arithmetic": 1.0}
    heldout = sft_rows(data.seed, ANNEAL_GATE_ROWS, arithmetic, split="heldout")
    with ProgressLine(config.anneal.steps, "anneal", {"loss": "loss", "gate/arithmetic": "held-out"}) as line:
        train_anneal(
            model, processor, anneal_stream(data), config.anneal, heldout=heldout, run_dir=folder, on_step=line
        )


def anneal_stream(data: DataConfig) -> Callable[[int, int], Sequence[SftRow]]:
    """Arithmetic rows, with a share of the others in every batch so that those are not forgotten."""
    rows = row_stream(data)
    arithmetic = {"arithmetic": 1.0}

    def stream(start: int, n: int) -> Sequence[SftRow]:
        others = n // 3
        return [*sft_rows(data.seed + 1, n - others, arithmetic, start=start), *rows(10**6 + start, others)]

    return stream


def _report(folder: Path) -> None:
    print(f"checkpoint: {folder}")


VERBS = {"base": base, "sft": sft, "rl": rl, "rollout": rollout, "eval": evaluation}
