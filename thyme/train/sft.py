"""SFT: the cold start from demonstrations with code, and math annealing as a stage of its own behind a gate."""

from collections.abc import Sequence
from pathlib import Path

import torch

from thyme.data.synthetic import SftRow
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.train.config import AnnealConfig, LossRule, SftConfig
from thyme.train.metrics import Metrics, OnStep
from thyme.train.objective import trained_logits
from thyme.train.optim import build_optimizer, rate_share
from thyme.train.packing import Sample, pack
from thyme.train.stage import Stage
from thyme.train.streams import Stream
from thyme.train.supervised import supervised_step
from thyme.train.tokenization import supervised_sample


def train_sft(
    model: Model,
    processor: Processor,
    rows: Stream[SftRow],
    config: SftConfig,
    *,
    system: str | None = None,
    run_dir: Path | None = None,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
) -> list[Metrics]:
    """Trains `model` in place on `config.steps` batches of rows; each row is seen once.

    Args:
        rows: the stream; `thyme.train.streams.endless` makes one of a finite data set.
        system: the system prompt the rows are to be learned under, if any.
        run_dir, resume_from, on_step: see `thyme.train.stage.Stage`.

    Returns:
        The metrics of every step.
    """
    optimizer = build_optimizer(model, config)
    with Stage(
        "sft", model, processor, optimizer, config, run_dir=run_dir, resume_from=resume_from, on_step=on_step
    ) as stage:
        while stage.step < config.steps and not stage.stopped:
            batch = rows(stage.step * config.batch_size, config.batch_size)
            metrics = supervised_step(
                model, processor, optimizer,
                [row_sample(processor, row, config.loss_rule, system) for row in batch],
                rate=rate_share(config, stage.step, config.steps),
                max_tokens=config.max_tokens_per_micro_batch,
                fused_head=config.fused_head,
            )  # fmt: skip
            stage.end_step(metrics)
    return stage.history


def train_anneal(
    model: Model,
    processor: Processor,
    rows: Stream[SftRow],
    config: AnnealConfig,
    *,
    heldout: Sequence[SftRow],
    system: str | None = None,
    run_dir: Path | None = None,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
) -> list[Metrics]:
    """Math annealing: goes on until held-out arithmetic passes the gate, for at most `config.steps` steps.

    Args:
        rows: arithmetic rows, perhaps with others mixed in so that those are not forgotten.
        heldout: arithmetic rows for the gate, none of them in the stream.

    Returns:
        The metrics of every step; those with a gate check have `gate/arithmetic` in [0, 1]. No step at all when the
        model already passes.
    """
    optimizer = build_optimizer(model, config)
    gate = RowGate(processor, heldout, system)
    with Stage(
        "anneal", model, processor, optimizer, config,
        memory={"passed": gate(model) >= config.gate_accuracy},
        run_dir=run_dir, resume_from=resume_from, on_step=on_step,
    ) as stage:  # fmt: skip
        while stage.step < config.steps and not stage.memory["passed"] and not stage.stopped:
            batch = rows(stage.step * config.batch_size, config.batch_size)
            metrics = supervised_step(
                model, processor, optimizer,
                [row_sample(processor, row, config.loss_rule, system) for row in batch],
                rate=rate_share(config, stage.step, config.steps),
                max_tokens=config.max_tokens_per_micro_batch,
                fused_head=config.fused_head,
            )  # fmt: skip
            if (stage.step + 1) % config.gate_steps == 0 or stage.step + 1 == config.steps:
                metrics["gate/arithmetic"] = gate(model)
                stage.memory["passed"] = metrics["gate/arithmetic"] >= config.gate_accuracy
            stage.end_step(metrics)
    return stage.history


def row_sample(processor: Processor, row: SftRow, rule: LossRule, system: str | None = None) -> Sample:
    """The supervised sample of one demonstration."""
    prompt_ids = processor.encode(processor.chat(row.prompt, system))
    images = [processor.preprocess(image) for image in row.images]
    return supervised_sample(processor, prompt_ids, row.response, images, rule=rule)


class RowGate:
    """Share of held-out rows whose every trained token is the model's first choice given the true text before.

    For such a row greedy decoding writes exactly this response, as long as the sandbox returns what the row says.
    """

    def __init__(self, processor: Processor, heldout: Sequence[SftRow], system: str | None = None) -> None:
        if not heldout:
            raise ValueError("the gate needs held-out rows")
        samples = [row_sample(processor, row, "all", system) for row in heldout]
        (self._batch,) = pack(samples, image_token_id=processor.image_token_id)

    @torch.no_grad()
    def __call__(self, model: Model) -> float:
        batch = self._batch.to(model.device)
        right = trained_logits(model, batch).argmax(-1) == batch.targets
        wrong_until = torch.cat((right.new_zeros(1, dtype=torch.int64), (~right).long().cumsum(0)))
        ends = batch.cu_seqlens.long()
        return float((wrong_until[ends[1:]] == wrong_until[ends[:-1]]).float().mean())
