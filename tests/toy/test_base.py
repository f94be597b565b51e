"""The base stage in a few steps: it learns, checks its gates, goes on while one is missed, and stops when asked."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from thyme.model import Model, Processor
from thyme.toy import gates
from thyme.toy.base import gates_met, train_base
from thyme.toy.captions import Caption, captions
from thyme.toy.config import BaseStageConfig
from thyme.toy.gates import CaptionGate
from thyme.train.metrics import Metrics
from thyme.train.packing import TrainBatch


def caption_stream(start: int, n: int) -> Sequence[Caption]:
    return captions(0, n, start=start)


def held_captions() -> Sequence[Caption]:
    return captions(0, 8, split="heldout", mix={"ground": 0.5, "one": 0.5})


def test_base_stage_learns_and_checks_its_gates(model: Model, processor: Processor, tmp_path: Path) -> None:
    config = BaseStageConfig(steps=4, batch_size=4, gate_steps=2, gate_ground=0.0, gate_one=0.0, decay_share=0.5)
    seen: list[Metrics] = []
    history = train_base(
        model, processor, caption_stream, config, heldout=held_captions(), run_dir=tmp_path, on_step=seen.append
    )
    assert [entry["step"] for entry in history] == [0, 1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert ["gate/ground" in entry for entry in history] == [False, True, False, True]
    assert seen == history
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [entry["loss"] for entry in history]


def test_base_stage_goes_on_while_a_gate_is_missed(model: Model, processor: Processor) -> None:
    config = BaseStageConfig(steps=2, max_steps=5, batch_size=2, gate_steps=9, decay_share=0.5, gate_one=1.0)
    history = train_base(model, processor, caption_stream, config, heldout=held_captions())
    assert len(history) == 5
    assert not gates_met(history[-1], config)
    # Every extension is one more decay, and each ends with a check.
    assert ["gate/one" in entry for entry in history] == [False, True, True, True, True]


def test_base_stage_needs_captions_for_its_gates(model: Model, processor: Processor) -> None:
    with pytest.raises(ValueError, match="of kind ground"):
        train_base(model, processor, caption_stream, BaseStageConfig(), heldout=captions(0, 2, mix={"one": 1.0}))


def test_base_stage_stops_when_asked(model: Model, processor: Processor) -> None:
    config = BaseStageConfig(steps=9, batch_size=2)
    history = train_base(
        model, processor, caption_stream, config, heldout=held_captions(), on_step=lambda m: m["step"] == 1
    )
    assert len(history) == 2


def test_caption_gate_counts_digits_by_kind(
    model: Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = CaptionGate(processor, captions(0, 8, mix={"one": 1.0}) + captions(0, 4, mix={"ground": 1.0}))
    answer_with(monkeypatch, wrong_rows=())
    assert gate(model) == {"one": 1.0, "ground": 1.0}
    # "The digit is ", the digit, ".", end of turn: row 1 is the first caption's digit, row 0 is none.
    answer_with(monkeypatch, wrong_rows=(1,))
    assert gate(model)["one"] == 7 / 8
    answer_with(monkeypatch, wrong_rows=(0, 2, 3))
    assert gate(model)["one"] == 1.0


def answer_with(monkeypatch: pytest.MonkeyPatch, wrong_rows: Sequence[int]) -> None:
    """Makes every model predict the true tokens of a batch, except in `wrong_rows`."""

    def logits(model: Model, batch: TrainBatch) -> torch.Tensor:
        predicted = batch.targets.clone()
        predicted[list(wrong_rows)] += 1
        return torch.nn.functional.one_hot(predicted, model.config.text.vocab_size).float()

    monkeypatch.setattr(gates, "trained_logits", logits)
