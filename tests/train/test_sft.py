"""SFT in a few steps: it learns something, stops at its gate, and resumes to the same bits."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.sft_material import train_rows
from thyme.data.rows import Demonstration
from thyme.model import Model, Processor, build, load
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations
from thyme.train import sft, supervised, trainable
from thyme.train.config import SftConfig
from thyme.train.metrics import Metrics
from thyme.train.optim import Optimizer, build_optimizer
from thyme.train.packing import TrainBatch
from thyme.train.sft import Gate, RowsRight


def row_stream(start: int, n: int, scenario: str = "crop") -> Sequence[Demonstration]:
    return demonstrations(0, n, {scenario: 1.0}, start=start)


def test_sft_trains_code_rows_under_each_rule(processor: Processor) -> None:
    for rule in ("paper", "all"):
        model = build(tiny_config(), processor, seed=0)
        config = SftConfig(steps=2, batch_size=2, loss_rule=rule)
        zoom = train_rows(model, processor, partial(row_stream, scenario="zoom"), config)
        assert zoom[1]["loss"] < zoom[0]["loss"]
        if rule == "paper":
            after_last_output = zoom[0]["batch/trained_tokens"]
        else:
            assert zoom[0]["batch/trained_tokens"] > 3 * after_last_output


def test_annealing_stops_at_its_gate(model: Model, processor: Processor) -> None:
    rows = partial(row_stream, scenario="arithmetic")
    heldout = demonstrations(0, 4, {"arithmetic": 1.0}, split="heldout")
    right = RowsRight(processor, heldout, "short")
    config = SftConfig(steps=3, batch_size=2, loss_rule="all")
    gate = Gate(name="arithmetic", measure=right, goal=0.5, every=2)
    history = train_rows(model, processor, rows, config, name="anneal", gate=gate)
    assert len(history) == 3  # a model of three steps can't multiply
    assert ["gate/arithmetic" in entry for entry in history] == [False, True, True]
    passed = Gate(name="arithmetic", measure=right, goal=0.0, every=2)
    assert train_rows(model, processor, rows, config, name="anneal", gate=passed) == []


def test_micro_batches_do_not_change_a_step(processor: Processor) -> None:
    losses = []
    for max_tokens in (16_384, 100):
        model = build(tiny_config(), processor, seed=0)
        config = SftConfig(steps=2, batch_size=4, max_tokens_per_micro_batch=max_tokens)
        losses.append([entry["loss"] for entry in train_rows(model, processor, row_stream, config)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(processor: Processor, tmp_path: Path) -> None:
    def train(model: Model, **options: object) -> list[Metrics]:
        config = SftConfig(steps=4, batch_size=2, save_steps=2)
        return train_rows(model, processor, row_stream, config, run_dir=tmp_path, **options)  # type: ignore[arg-type]

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
    loaded, _ = load(tmp_path / "checkpoints" / "sft_4")
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in whole.state_dict().items())


def test_resuming_from_what_is_no_checkpoint(model: Model, processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no manifest\.json"):
        train_rows(model, processor, row_stream, SftConfig(steps=1), resume_from=tmp_path)


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
    gate = RowsRight(processor, demonstrations(0, 4, {"arithmetic": 1.0}), "short")
    answer_with(monkeypatch, sft, wrong_rows=())
    assert gate(model) == 1.0
    answer_with(monkeypatch, sft, wrong_rows=(0, 1, 2))  # three slips, all in one row
    assert gate(model) == 0.75
    answer_with(monkeypatch, sft, wrong_rows=(0, -1))
    assert gate(model) == 0.5


def test_the_loss_is_also_told_by_source(model: Model, processor: Processor) -> None:
    mixed = [*row_stream(0, 2), *row_stream(0, 2, "arithmetic")]
    (metrics,) = train_rows(model, processor, lambda start, n: mixed, SftConfig(steps=1, batch_size=4, loss_rule="all"))
    alone = {}
    for scenario in ("crop", "arithmetic"):
        fresh, rows = build(tiny_config(), processor, seed=0), row_stream(0, 2, scenario)
        (alone[scenario],) = train_rows(
            fresh, processor, lambda start, n, rows=rows: rows, SftConfig(steps=1, batch_size=2, loss_rule="all")
        )
        assert not [name for name in alone[scenario] if name.startswith("loss/source")]  # it has one source
        assert metrics[f"loss/source/{scenario}"] == pytest.approx(alone[scenario]["loss"], rel=1e-4)
    weights = [alone[scenario]["batch/trained_tokens"] for scenario in ("crop", "arithmetic")]
    losses = [metrics[f"loss/source/{scenario}"] for scenario in ("crop", "arithmetic")]
    assert metrics["loss"] == pytest.approx(sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights))


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int], part: str) -> None:
    """Makes the loss of these steps not a number, or their gradient alone."""
    true, count = supervised.supervised_losses, iter(range(1000))

    def spoilt(*args: object, **kwargs: object) -> Tensor:
        loss = true(*args, **kwargs)  # type: ignore[arg-type]
        if next(count) not in steps:
            return loss
        if part == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss
        return loss * torch.nan

    monkeypatch.setattr(supervised, "supervised_losses", spoilt)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(
    part: str, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = SftConfig(steps=4, batch_size=2, save_steps=1)
    rows = row_stream(2, 2)
    spoil(monkeypatch, [1], part)
    model = build(tiny_config(), processor, seed=0)
    history = train_rows(model, processor, row_stream, config, run_dir=tmp_path)
    assert [step["optim/skipped"] for step in history] == [0, 1, 0, 0]
    assert all(p.isfinite().all() for p in model.parameters())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "sft step 2: " in line and "nan" in line and all(row.question.id in line for row in rows)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["sft_1", "sft_3", "sft_4"]


def test_too_many_in_a_row_end_the_stage_and_leave_the_last_good_checkpoint(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(1, 1000), "loss")
    model = build(tiny_config(), processor, seed=0)
    config = SftConfig(steps=9, batch_size=2, save_steps=1, max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match=r"sft step 4: loss nan.*3 in a row.*before it are good"):
        train_rows(model, processor, row_stream, config, run_dir=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["sft_1"]
    kept, _ = load(tmp_path / "checkpoints" / "sft_1")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["optim/skipped"] for line in logged] == [0, 1, 1, 1]


def test_a_stage_does_not_end_well_on_a_step_that_was_none(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, [1], "loss")
    with pytest.raises(FloatingPointError, match=r"sft step 2: .* that was the last step"):
        train_rows(
            build(tiny_config(), processor, seed=0),
            processor,
            row_stream,
            SftConfig(steps=2, batch_size=2),
        )


@pytest.mark.soak
@pytest.mark.parametrize("rate", [5e-7, 1e-5])
def test_a_bfloat16_model_is_trained_as_a_float32_one(rate: float, processor: Processor) -> None:
    """At these rates (Thyme's RL and SFT) most updates of a bfloat16 weight round to nothing; its master has them."""
    config = SftConfig(steps=12, batch_size=4, optimizer="adamw", learning_rate=rate, warmup_steps=0, decay_share=0)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(tiny_config(), processor, seed=0).to(dtype)
        held: list[Optimizer] = []

        def build_and_keep(*args: Any, held: list[Optimizer] = held, **kwargs: Any) -> Optimizer:
            held.append(build_optimizer(*args, **kwargs))
            return held[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainable, "build_optimizer", build_and_keep)
            start = [p.detach().float().clone() for p in model.parameters()]
            train_rows(model, processor, row_stream, config)
        ends = [held[0]._masters.get(p, p) for p in model.parameters()]
        moved[dtype] = torch.cat([(e.detach() - s).flatten() for e, s in zip(ends, start, strict=True)])
    assert torch.nn.functional.cosine_similarity(moved[torch.float32], moved[torch.bfloat16], dim=0) > 0.99
