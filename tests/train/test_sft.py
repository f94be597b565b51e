"""SFT in a few steps: it learns something, stops at its gate, and resumes to the same bits."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from thyme.data.rows import Demonstration
from thyme.model import Model, Processor, build, load
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations
from thyme.train import sft, train_sft
from thyme.train.config import SftConfig
from thyme.train.metrics import Metrics
from thyme.train.packing import TrainBatch
from thyme.train.sft import Gate, RowsRight


def row_stream(start: int, n: int, scenario: str = "crop") -> Sequence[Demonstration]:
    return demonstrations(0, n, {scenario: 1.0}, start=start)


def test_sft_trains_code_rows_under_each_rule(processor: Processor) -> None:
    for rule in ("paper", "all"):
        model = build(tiny_config(), processor, seed=0)
        config = SftConfig(steps=2, batch_size=2, loss_rule=rule)
        zoom = train_sft(model, processor, partial(row_stream, scenario="zoom"), config)
        assert zoom[1]["loss"] < zoom[0]["loss"]
        if rule == "paper":
            after_last_output = zoom[0]["batch/trained_tokens"]
        else:
            assert zoom[0]["batch/trained_tokens"] > 3 * after_last_output


def test_annealing_stops_at_its_gate(model: Model, processor: Processor) -> None:
    rows = partial(row_stream, scenario="arithmetic")
    heldout = demonstrations(0, 4, {"arithmetic": 1.0}, split="heldout")
    right = RowsRight(processor, heldout)
    config = SftConfig(steps=3, batch_size=2, loss_rule="all")
    gate = Gate(name="arithmetic", measure=right, goal=0.5, every=2)
    history = train_sft(model, processor, rows, config, name="anneal", gate=gate)
    assert len(history) == 3  # a model of three steps can't multiply
    assert ["gate/arithmetic" in entry for entry in history] == [False, True, True]
    passed = Gate(name="arithmetic", measure=right, goal=0.0, every=2)
    assert train_sft(model, processor, rows, config, name="anneal", gate=passed) == []


def test_micro_batches_do_not_change_a_step(processor: Processor) -> None:
    losses = []
    for max_tokens in (16_384, 100):
        model = build(tiny_config(), processor, seed=0)
        config = SftConfig(steps=2, batch_size=4, max_tokens_per_micro_batch=max_tokens)
        losses.append([entry["loss"] for entry in train_sft(model, processor, row_stream, config)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(processor: Processor, tmp_path: Path) -> None:
    def train(model: Model, **options: object) -> list[Metrics]:
        config = SftConfig(steps=4, batch_size=2, save_steps=2)
        return train_sft(model, processor, row_stream, config, run_dir=tmp_path, **options)  # type: ignore[arg-type]

    whole = build(tiny_config(), processor, seed=0)
    expected = train(whole)
    resumed = build(tiny_config(), processor, seed=7)
    history = train(resumed, resume_from=tmp_path / "checkpoints" / "sft_2")
    assert [entry["step"] for entry in history] == [2, 3]
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected[2:]]
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name
    # One line a step, although two steps were run twice; and the checkpoint's model loads like any other.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    loaded, _ = load(tmp_path / "checkpoints" / "sft_4" / "model")
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in whole.state_dict().items())


def test_resuming_from_what_is_no_checkpoint(model: Model, processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        train_sft(model, processor, row_stream, SftConfig(steps=1), resume_from=tmp_path)


def answer_with(monkeypatch: pytest.MonkeyPatch, module: ModuleType, wrong_rows: Sequence[int]) -> None:
    """Makes every model predict the true tokens of a batch, except in `wrong_rows`."""

    def logits(model: Model, batch: TrainBatch) -> torch.Tensor:
        predicted = batch.targets.clone()
        predicted[list(wrong_rows)] += 1
        return torch.nn.functional.one_hot(predicted, model.config.text.vocab_size).float()

    monkeypatch.setattr(module, "trained_logits", logits)


def test_row_gate_wants_every_token_of_a_row(
    model: Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = RowsRight(processor, demonstrations(0, 4, {"arithmetic": 1.0}))
    answer_with(monkeypatch, sft, wrong_rows=())
    assert gate(model) == 1.0
    answer_with(monkeypatch, sft, wrong_rows=(0, 1, 2))  # three slips, all in one row
    assert gate(model) == 0.75
    answer_with(monkeypatch, sft, wrong_rows=(0, -1))
    assert gate(model) == 0.5
