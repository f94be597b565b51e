"""The engine on a GPU: its cache, attention and sampling compiled, siblings reading their prompt together, one wait,
captured steps, one step ahead."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme.engine import Completion, Engine, EngineConfig, SamplingParams
from thyme.engine.batch import Batch
from thyme.kernels import attention_prefix
from thyme.model import Model, ModelConfig, TextConfig, build

pytestmark = pytest.mark.gpu


SHAPE = TextConfig(
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


@pytest.fixture(scope="module")
def model() -> Model:
    return build(ModelConfig(model_type="qwen3", text=SHAPE), seed=1, device="cuda")


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
        runs = engine(model, attention, decode_graphs=False)  # what launches is watched
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
    runs = engine(model, "triton", deterministic=True, decode_graphs=False)
    add_all(runs, max_tokens=3)
    while runs.has_unfinished():
        runs.step()
    assert launches == []


def test_a_step_waits_for_the_device_only_for_what_it_drew(model: Model) -> None:
    runs = engine(model, "triton", decode_graphs=False)
    add_all(runs, max_tokens=6)
    for _ in range(4):  # everything is compiled, and the tables of frequencies are on the device
        runs.step()
    forward = runs.runner._forward

    def watched(batch: Batch, sent: dict[str, Tensor]) -> Tensor:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(batch, sent)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runs.runner._forward = watched  # type: ignore[method-assign]
    while runs.has_unfinished():
        runs.step()


def finished(runs: Engine) -> list[Completion]:
    done: list[Completion] = []
    while runs.has_unfinished():
        done += runs.step()
    return sorted(done, key=lambda completion: completion.sequence.id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_are_those_that_are_launched(dtype: torch.dtype) -> None:
    """Other sizes are multiplied by other kernels of cuBLAS, so in the last bits log-probs may differ; ids are drawn
    from float32 logits far enough apart."""
    config = ModelConfig(model_type="qwen3", text=SHAPE)
    model = build(config, seed=1, device="cuda", dtype=dtype)
    outputs = []
    for decode_graphs in (False, True):
        runs = engine(model, "triton", decode_graphs=decode_graphs)
        add_all(runs, max_tokens=30)
        first = finished(runs)
        runs.sleep()
        runs.wake()
        add_all(runs, max_tokens=30)
        second = finished(runs)
        for a, b in zip(first, second, strict=True):
            assert a.token_ids == b.token_ids
        outputs.append(first)
    graphs = runs.runner.graphs
    assert graphs is not None and graphs.replayed > 40 and graphs.captured < 12
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for one, other in zip(*outputs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b), 30)
        assert same == 30 or dtype == torch.bfloat16
        np.testing.assert_allclose(one.logprobs_raw[:same], other.logprobs_raw[:same], atol=tolerance)


def test_weights_that_are_updated_in_place_are_replayed(model: Model) -> None:
    runs = engine(model, "triton")
    add_all(runs, max_tokens=12)
    before = finished(runs)
    with torch.no_grad():
        model.decoder.norm.weight.mul_(0.5)
    runs.weights_updated()
    plain = engine(model, "triton", decode_graphs=False)
    try:
        for one in (runs, plain):
            add_all(one, max_tokens=12)
        for a, b, c in zip(finished(runs), finished(plain), before, strict=True):
            np.testing.assert_allclose(a.logprobs_raw[:1], b.logprobs_raw[:1], atol=1e-4)
            assert abs(a.logprobs_raw[0] - c.logprobs_raw[0]) > 1e-4
    finally:
        with torch.no_grad():
            model.decoder.norm.weight.mul_(2.0)


@pytest.mark.parametrize("decode_graphs", [False, True])
def test_a_step_ahead_draws_the_same_and_its_launch_waits_for_nothing(model: Model, decode_graphs: bool) -> None:
    outputs = []
    for ahead in (False, True):
        runs = engine(model, "triton", decode_graphs=decode_graphs, run_ahead=ahead)
        add_all(runs, max_tokens=12)
        finished(runs)  # everything is compiled and captured
        launch = runs.runner.launch

        def watched(batch: Batch, bans: Any, launch: Any = launch) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(batch, bans)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runs.runner.launch = watched  # type: ignore[method-assign]
        add_all(runs, max_tokens=12)
        outputs.append(finished(runs))
    for one, other in zip(*outputs, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs_raw, other.logprobs_raw, atol=1e-4)
