"""The loops in two steps each: they learn something, stop where they should, and resume to the same bits."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from thyme.data.synthetic import Caption, SftRow, captions, sft_rows
from thyme.data.tiny import tiny_config
from thyme.model import Model, Processor, build, load
from thyme.train import gates, sft, train_anneal, train_base, train_sft
from thyme.train.base import gates_met
from thyme.train.config import AnnealConfig, BaseStageConfig, SftConfig
from thyme.train.gates import CaptionGate
from thyme.train.metrics import Metrics
from thyme.train.packing import TrainBatch
from thyme.train.sft import RowGate
from thyme.train.streams import endless


def caption_stream(start: int, n: int) -> Sequence[Caption]:
    return captions(0, n, start=start)


def row_stream(start: int, n: int, scenario: str = "crop") -> Sequence[SftRow]:
    return sft_rows(0, n, {scenario: 1.0}, start=start)


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
    heldout = sft_rows(0, 4, {"arithmetic": 1.0}, split="heldout")
    config = AnnealConfig(steps=3, batch_size=2, gate_steps=2, gate_accuracy=0.5)
    history = train_anneal(model, processor, rows, config, heldout=heldout)
    assert len(history) == 3  # a model of three steps can't multiply
    assert ["gate/arithmetic" in entry for entry in history] == [False, True, True]
    passed = AnnealConfig(steps=3, batch_size=2, gate_accuracy=0.0)
    assert train_anneal(model, processor, rows, passed, heldout=heldout) == []


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


def test_caption_gate_counts_digits_by_kind(
    model: Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = CaptionGate(processor, captions(0, 8, mix={"one": 1.0}) + captions(0, 4, mix={"ground": 1.0}))
    answer_with(monkeypatch, gates, wrong_rows=())
    assert gate(model) == {"one": 1.0, "ground": 1.0}
    # "The digit is ", the digit, ".", end of turn: row 1 is the first caption's digit, row 0 is none.
    answer_with(monkeypatch, gates, wrong_rows=(1,))
    assert gate(model)["one"] == 7 / 8
    answer_with(monkeypatch, gates, wrong_rows=(0, 2, 3))
    assert gate(model)["one"] == 1.0


def test_row_gate_wants_every_token_of_a_row(
    model: Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = RowGate(processor, sft_rows(0, 4, {"arithmetic": 1.0}))
    answer_with(monkeypatch, sft, wrong_rows=())
    assert gate(model) == 1.0
    answer_with(monkeypatch, sft, wrong_rows=(0, 1, 2))  # three slips, all in one row
    assert gate(model) == 0.75
    answer_with(monkeypatch, sft, wrong_rows=(0, -1))
    assert gate(model) == 0.5


def test_an_endless_stream_shows_every_item_once_an_epoch() -> None:
    stream = endless(list("abcde"), seed=3)
    first, second = stream(0, 5), stream(5, 5)
    assert sorted(first) == sorted(second) == list("abcde")
    assert first != second
    assert list(stream(3, 4)) == [*first[3:], *second[:2]]
    with pytest.raises(ValueError, match="empty"):
        endless([])
