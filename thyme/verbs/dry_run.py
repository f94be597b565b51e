"""What `--dry-run` says of a training run beside its config: rows, steps, tokens, memory; nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from thyme.data.rows import Demonstration, Question
    from thyme.data.sources import DataSet
    from thyme.model.processor import Processor
    from thyme.rollout.prompts import PromptStyle
    from thyme.verbs.config import TrainingConfig

SAMPLED_ROWS = 48
"""Rows whose tokens are counted, evenly spaced over the data set."""
GIB = 2**30


def described(config: TrainingConfig, stage: Literal["sft", "anneal", "rl"]) -> Iterator[str]:
    """Lines on rows, steps, tokens and memory; what cannot be told is said in its place, and why.

    Args:
        config: of the verb.
        stage: its table in `config`.
    """
    try:
        yield from _rows(config, stage)
    except (ValueError, FileNotFoundError) as error:
        yield f"rows: {error}"
    try:
        yield _memory(config, stage)
    except (ValueError, FileNotFoundError) as error:
        yield f"memory: {error}"


def _rows(config: TrainingConfig, stage: str) -> Iterator[str]:
    from thyme.data.sources import open_data
    from thyme.verbs.rows import require_training_rows
    from thyme.verbs.training import with_epochs

    settings = getattr(config, stage)
    if not config.data.train:
        require_training_rows(config)
        yield f"rows: the toy world's; {settings.steps:,} steps of {settings.batch_size}"
        return
    rows: DataSet[Demonstration] | DataSet[Question]
    rows = open_data(config.data.train, config.data, "rl" if stage == "rl" else "sft")
    steps = with_epochs(settings, len(rows)).steps
    passes = steps * settings.batch_size / len(rows)
    yield f"rows: {rows.summary()}"
    yield f"steps: {steps:,} of {settings.batch_size}, {passes:.3g} passes over the rows"
    yield _tokens(config, rows, settings)


def _tokens(config: TrainingConfig, rows: DataSet[Demonstration] | DataSet[Question], settings: Any) -> str:
    from thyme.model.processor import Processor
    from thyme.rollout.dialect import read_dialect
    from thyme.toy.model import tiny_processor
    from thyme.verbs.config import EMBEDDED
    from thyme.verbs.folders import model_folder

    style: PromptStyle = config.rollout.prompt_style
    if config.model == EMBEDDED:
        processor, style = tiny_processor(), "short"
    else:
        folder = model_folder(Path(config.model))
        processor, said = Processor.load(folder), read_dialect(folder)
        style = style if said is None else said.prompt_style
    if config.max_pixels is not None:
        processor = processor.with_max_pixels(config.max_pixels)
    places = range(0, len(rows), math.ceil(len(rows) / SAMPLED_ROWS))
    counts = sorted(_count(rows[place], processor, style) for place in places)
    what = "prompt" if hasattr(settings, "kl_coef") else "row"
    of = f"of {len(counts)} rows spread over the data"
    spread = f"mean {mean(counts):,.0f}, 95 % within {counts[math.ceil(0.95 * len(counts)) - 1]:,}, most {counts[-1]:,}"
    limit = getattr(settings, "max_row_tokens", 0)
    over = sum(count > limit for count in counts) if limit else 0
    rest = f"; {over} over max_row_tokens = {limit:,}" if over else ""
    return f"tokens: {what} {spread} ({of}){rest}; a step about {mean(counts) * settings.batch_size:,.0f}"


def _count(row: Demonstration | Question, processor: Processor, style: PromptStyle) -> int:
    """Tokens of a demonstration with its response, or of a question's prompt."""
    from thyme.data.rows import Demonstration
    from thyme.rollout.prompts import build_prompt
    from thyme.train.sft import row_sample

    if isinstance(row, Demonstration):
        return len(row_sample(processor, row, "all", style).token_ids)
    prompt = build_prompt(row, style, processor)
    pictures = [processor.preprocess(picture) for _, picture in row.pictures]
    assert not isinstance(prompt.token_ids, str)
    return len(processor.expand(prompt.token_ids, pictures))


def _memory(config: TrainingConfig, stage: Literal["sft", "anneal", "rl"]) -> str:
    from thyme.train.memory import plan
    from thyme.verbs.jobs import job_of

    found = plan(job_of(config, stage))
    phases = ", ".join(f"{phase} {found.total(phase) / GIB:.1f}" for phase in found.phases)
    return f"memory on one GPU in bfloat16, GiB without KV cache: {phases} (`thyme plan` says more)"
