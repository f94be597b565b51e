"""SFT: the cold start from demonstrations with code. Math annealing is the same loop behind a gate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import torch

from thyme import trace
from thyme.data.rows import Demonstration
from thyme.data.streams import Stream
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rollout.prompts import PromptStyle, build_prompt
from thyme.train.balance import share_of
from thyme.train.config import LossRule, SftConfig
from thyme.train.metrics import Metrics
from thyme.train.objective import trained_logits
from thyme.train.optim import rate_share
from thyme.train.packing import Sample, pack
from thyme.train.sharding import trained_model
from thyme.train.stage import Stage, StageOptions
from thyme.train.supervised import supervised_step
from thyme.train.tokenization import supervised_sample
from thyme.train.trainable import fuses_head, trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure that ends a stage once it reaches its goal."""

    name: str
    """The figure is `gate/<name>` in the metrics."""
    measure: Callable[[Model], float]
    """Looks at the model as it is."""
    goal: float
    """What the figure must reach."""
    every: int
    """Steps between two looks."""


def train_sft(
    model: Model,
    processor: Processor,
    samples: Stream[Sample],
    config: SftConfig,
    *,
    name: str = "sft",
    gate: Gate | None = None,
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    """Trains `model` in place on `config.steps` batches of rows, or until the gate is passed.

    Args:
        model: the model to train.
        processor: its tokenizer and picture processor.
        samples: the stream (`row_samples`), the same on every rank: each trains its share of a batch.
        config: steps and rates.
        name: of the stage, in metrics and checkpoints.
        gate: looked at before the first step, every `gate.every` steps and after the last one.
        options: where the stage writes, and from where it resumes: `thyme.train.stage.StageOptions`.

    Returns:
        The metrics of every step; no step at all where the model already passes the gate.
    """
    trained = trained_model(model, options.get("world"))
    world = trained.world
    passed = gate is not None and world.from_main(gate.measure(model)) >= gate.goal
    with (
        trainable(trained.module, config, are_masters=trained.are_masters) as optimizer,
        Stage(name, trained, processor, optimizer, config, memory={"passed": passed}, **options) as stage,
    ):
        while stage.step < config.steps and not stage.memory["passed"] and not stage.stopped:
            with trace.span("steps", f"step {stage.step}"):
                with world.phase("update"):
                    with trace.span("steps", "wait for data"):
                        batch = samples(stage.step * config.batch_size, config.batch_size)
                    kept = [s for s in batch if not config.max_row_tokens or len(s.token_ids) <= config.max_row_tokens]
                    metrics, unfit = supervised_step(
                        trained,
                        processor,
                        optimizer,
                        share_of(kept, [len(sample.token_ids) for sample in kept], world),
                        rate=rate_share(config, stage.step, config.steps),
                        max_tokens=config.max_tokens_per_micro_batch,
                        fused_head=fuses_head(model, config),
                    )
                    if config.max_row_tokens:
                        metrics["batch/too_long"] = float(len(batch) - len(kept))
                if gate is not None and ((stage.step + 1) % gate.every == 0 or stage.step + 1 == config.steps):
                    trained.publish()
                    metrics[f"gate/{gate.name}"] = world.from_main(gate.measure(model))
                    stage.memory["passed"] = metrics[f"gate/{gate.name}"] >= gate.goal
                stage.end_step(metrics, unfit)
    return stage.history


def row_samples(
    processor: Processor, rows: Stream[Demonstration], rule: LossRule, style: PromptStyle
) -> Stream[Sample]:
    """The samples of a stream of rows; an error in one names its row. Arguments as for `row_sample`."""

    def sample(row: Demonstration) -> Sample:
        try:
            return row_sample(processor, row, rule, style)
        except ValueError as error:
            raise ValueError(f"row {row.question.id}: {error}") from error

    def samples(start: int, n: int) -> list[Sample]:
        with trace.span("data", "prepare rows", first=start, count=n):
            return [sample(row) for row in rows(start, n)]

    return samples


def sample_bytes(sample: Sample) -> int:
    """What a sample that waits takes: its pictures' pixels, beside which the tokens are little."""
    return sum(image.pixel_values.nbytes for image in sample.images) + 5 * sample.token_ids.nbytes


def row_sample(processor: Processor, row: Demonstration, rule: LossRule, style: PromptStyle) -> Sample:
    """The supervised sample of one demonstration.

    Args:
        processor: encodes prompt and response and prepares the pictures.
        row: the demonstration.
        rule: which rounds are trained (`thyme.train.masks`).
        style: of the prompt, whose ids are those that a rollout of the same question begins with.
    """
    prompt_ids = build_prompt(row.question, style, processor).token_ids
    assert not isinstance(prompt_ids, str)
    images = [processor.preprocess(image) for image in row.images]
    sample = supervised_sample(processor, prompt_ids, row.response, images, rule=rule)
    return replace(sample, name=row.question.id, source=row.scenario)


class RowsRight:
    """Share of held-out rows whose every trained token is the model's first choice given the true text before.

    For such a row greedy decoding writes exactly this response, as long as the sandbox returns what the row says.
    """

    def __init__(self, processor: Processor, heldout: Sequence[Demonstration], style: PromptStyle) -> None:
        if not heldout:
            raise ValueError("the gate needs held-out rows")
        samples = [row_sample(processor, row, "all", style) for row in heldout]
        (self._batch,) = pack(samples, image_token_id=processor.image_token_id)

    @torch.no_grad()
    def __call__(self, model: Model) -> float:
        batch = self._batch.to(model.device)
        right = trained_logits(model, batch).argmax(-1) == batch.targets
        wrong_until = torch.cat((right.new_zeros(1, dtype=torch.int64), (~right).long().cumsum(0)))
        ends = batch.cu_seqlens.long()
        return float((wrong_until[ends[1:]] == wrong_until[ends[:-1]]).float().mean())
