"""Training with adapters: they alone move, engine and trainer agree to the bit, and a run is resumed from them."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.rl_material import by_index, make_loop
from tests.train.sft_material import train_rows
from tests.train.test_rl import RL
from thyme.data.streams import endless
from thyme.model import LoraConfig, Model, Processor, add_adapters, load_model
from thyme.model.lora import is_adapter
from thyme.rewards import RuleScorer
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox
from thyme.toy.scenarios import demonstrations
from thyme.train.config import SftConfig, StageConfig
from thyme.train.optim import build_optimizer
from thyme.train.rl import train_rl

LORA = LoraConfig(rank=4, alpha=16.0)
SFT = SftConfig(steps=4, batch_size=2, optimizer="adamw", learning_rate=1e-2, save_steps=2)


@pytest.fixture
def adapted(model: Model) -> Model:
    add_adapters(model, LORA)
    return model


def values(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: Model, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_rl_moves_the_adapters_alone_and_the_base_is_the_reference(
    adapted: Model, processor: Processor, sandbox: Sandbox, tmp_path: Path
) -> None:
    questions: list[Question] = [row.question for row in demonstrations(0, 2, {"arithmetic": 0.5, "crop": 0.5})]
    before = values(adapted)
    loop = make_loop(adapted, sandbox)
    history = train_rl(adapted, processor, loop, endless(questions), RL, scorer=RuleScorer(by_index), run_dir=tmp_path)
    assert moved(adapted, before) == {name for name in before if is_adapter(name)}
    for metrics in history:
        assert metrics["actor/ratio"] == metrics["actor/ratio_max"] == 1.0
        assert metrics["mismatch/kl"] == 0.0  # the engine runs the very module that is trained
    assert history[0]["actor/kl_ref"] == 0.0 < history[1]["actor/kl_ref"]


def test_the_cache_is_given_back_for_the_update_and_is_there_again_for_the_rollout(
    adapted: Model, processor: Processor, sandbox: Sandbox
) -> None:
    questions: list[Question] = [row.question for row in demonstrations(0, 2, {"arithmetic": 1.0})]
    loop, during = make_loop(adapted, sandbox), []
    (first, *_) = [p for name, p in adapted.named_parameters() if is_adapter(name)]
    first.register_hook(lambda _: during.append(loop.engine.stats()["kv_bytes"]))
    train_rl(adapted, processor, loop, endless(questions), RL, scorer=RuleScorer(by_index))
    assert during and set(during) == {0}
    assert loop.engine.stats()["kv_bytes"] > 0 and not loop.engine.is_asleep


def test_sft_with_adapters_is_resumed_to_the_bit(adapted: Model, processor: Processor, tmp_path: Path) -> None:
    rows = endless(demonstrations(0, 4, {"arithmetic": 1.0}))
    start = copy.deepcopy(adapted)
    history = train_rows(adapted, processor, rows, SFT, run_dir=tmp_path)
    assert history[-1]["loss"] < history[0]["loss"]
    again = train_rows(
        start,
        processor,
        rows,
        SFT,
        resume_from=tmp_path / "checkpoints" / "sft_2",
    )
    assert len(again) == 2
    assert all(torch.equal(p, q) for p, q in zip(adapted.parameters(), start.parameters(), strict=True))
    merged = load_model(tmp_path / "checkpoints" / "sft_4")
    assert not any(is_adapter(name) for name, _ in merged.named_parameters())


def test_the_optimizer_holds_the_adapters_alone_and_muon_none_of_them(model: Model) -> None:
    add_adapters(model.bfloat16(), LORA)
    optimizer = build_optimizer(model, StageConfig(optimizer="muon"))
    trained = [p for name, p in model.named_parameters() if is_adapter(name)]
    assert optimizer.parameters == trained
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    state = optimizer.state_dict()
    assert "Muon" not in state
    held = sum(t.nbytes for t in tensors(state) if t.ndim)
    assert held == 12 * sum(p.numel() for p in trained)  # a master and two moments, float32


def tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)
