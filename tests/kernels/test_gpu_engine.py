"""The engine on a GPU: its cache, attention and sampling compiled, siblings reading their prompt together, one wait."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.engine.batch import Batch
from thyme.kernels import attention_prefix
from thyme.model import Model, ModelConfig, TextConfig, build

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> Model:
    text = TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
        qk_norm=True,
    )
    return build(ModelConfig(model_type="qwen3", text=text), seed=1, device="cuda")


def engine(model: Model, attention: Any, **config: Any) -> Engine:
    sizes = dict(num_blocks=1000, max_sequences=16, max_batch_tokens=2048, quiet=True) | config
    return Engine(model, EngineConfig(attention=attention, **sizes))


def add_all(to: Engine, max_tokens: int) -> None:
    """Two groups whose prompts hold whole splits, and loners."""
    draw = np.random.default_rng(0)
    options: dict[str, Any] = dict(banned_ids=(), ignore_eos=True, repetition=None, max_tokens=max_tokens, seed=3)
    for length, n in ((700, 1), (1100, 4), (9, 1), (1030, 3)):
        to.add_group(draw.integers(0, 512, length).tolist(), SamplingParams(n=n, **options))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each launch of the prefix kernel the sizes of the groups it is given."""
    found: list[list[int]] = []
    kernel = attention_prefix._prefix_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                found.append(args[5].diff().tolist())
                kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(attention_prefix, "_prefix_kernel", Spy())
    return found


def test_the_same_tokens_as_by_the_reference(model: Model, launches: list[list[int]]) -> None:
    outputs = []
    for attention in ("triton", "reference"):
        runs = engine(model, attention)
        add_all(runs, max_tokens=8)
        done = []
        while runs.has_unfinished():
            done += runs.step()
        outputs.append(sorted(done, key=lambda completion: completion.sequence.id))
    for one, other in zip(*outputs, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs_raw, other.logprobs_raw, atol=1e-4)
    assert [1, 4, 1, 3] in launches


def test_deterministic_reads_nothing_together(model: Model, launches: list[list[int]]) -> None:
    runs = engine(model, "triton", deterministic=True)
    add_all(runs, max_tokens=3)
    while runs.has_unfinished():
        runs.step()
    assert launches == []


def test_a_step_waits_for_the_device_only_for_what_it_drew(model: Model) -> None:
    runs = engine(model, "triton")
    add_all(runs, max_tokens=6)
    for _ in range(4):  # everything is compiled, and the tables of frequencies are on the device
        runs.step()
    forward = runs.runner._forward

    def watched(batch: Batch) -> Tensor:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runs.runner._forward = watched  # type: ignore[method-assign]
    while runs.has_unfinished():
        runs.step()
