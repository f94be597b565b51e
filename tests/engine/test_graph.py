"""Replayed decode steps on a CPU, where a replay calls the same function on the same buffers: what is drawn is what it
is without, whatever the sizes, late joiners, stops, appended rounds, preemption, sharing, and where buffers lie."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thyme.engine import Completion, Engine, EngineConfig, SamplingParams
from thyme.engine.graph import DecodeGraphs, padded_size
from thyme.model import Model, build
from thyme.toy.model import tiny_config, tiny_processor


@pytest.fixture(scope="module")
def model() -> Model:
    return build(tiny_config(), tiny_processor(), seed=0)


def engine(model: Model, decode_graphs: bool, **config: Any) -> Engine:
    sizes: dict[str, Any] = dict(num_blocks=26, max_sequences=40, max_batch_tokens=64, deterministic=True, quiet=True)
    return Engine(model, EngineConfig(decode_graphs=decode_graphs, **sizes | config))


def finish(runs: Engine) -> list[Completion]:
    done: list[Completion] = []
    while runs.has_unfinished():
        done += runs.step()
    return sorted(done, key=lambda completion: completion.sequence.id)


def work(runs: Engine) -> list[tuple[list[int], list[float]]]:
    """Groups, loners that come later, a preemption, and a second round of each held sequence."""
    draw = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return draw.integers(0, 90, length).tolist()

    options: dict[str, Any] = dict(ignore_eos=True, stop_at_tags=False, repetition=None)
    held = [runs.add(prompt(20), SamplingParams(max_tokens=12, seed=9, **options), hold=True)]
    runs.add_group(prompt(40), SamplingParams(n=6, max_tokens=50, seed=1, **options))
    for seed in range(24):
        runs.add(prompt(int(draw.integers(1, 30))), SamplingParams(max_tokens=5 + 2 * seed, seed=seed, **options))
    done = []
    for _ in range(30):
        done += runs.step()
    runs.append(held[0], prompt(7))
    runs.add(prompt(9), SamplingParams(max_tokens=20, seed=77, **options))
    done += finish(runs)
    runs.release(held[0])
    done.sort(key=lambda completion: (completion.sequence.id, len(completion.token_ids)))
    return [(completion.token_ids, completion.logprobs_raw) for completion in done]


@pytest.mark.parametrize("num_blocks", [26, 300], ids=["preempted", "of several sizes"])
def test_replayed_steps_have_the_bits_of_plain_ones(model: Model, num_blocks: int) -> None:
    sizes = {"num_blocks": num_blocks, "max_batch_tokens": 64 if num_blocks == 26 else 1000}
    plain, replayed = (engine(model, replays, **sizes) for replays in (False, True))
    expected, found = work(plain), work(replayed)
    assert len(found) == len(expected) > 30
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(found, expected, strict=True):
        assert list(ids) == list(expected_ids)
        np.testing.assert_array_equal(logprobs, expected_logprobs)
    graphs = replayed.runner.graphs
    assert graphs is not None and graphs.replayed > 40 and graphs.captured < 10
    assert plain.stats()["preemptions"] == replayed.stats()["preemptions"]
    assert plain.stats()["preemptions"] > 0 if num_blocks == 26 else graphs.captured > 1


def test_sizes() -> None:
    sizes = {padded_size(count, 300) for count in range(1, 301)}
    assert all(padded_size(count, 300) >= count for count in range(1, 301))
    assert len(sizes) <= 30 and {1, 2, 4, 8, 300} <= sizes
    assert padded_size(3, 300, least=16) == 16
    assert padded_size(5, 6) == 6 and padded_size(9, 300) == 16


def test_buffers_that_move_and_a_cache_that_is_given_back_are_captured_anew(model: Model) -> None:
    runs = engine(model, True, max_sequences=4, num_blocks=200)
    options: dict[str, Any] = dict(ignore_eos=True, repetition=None, stop_at_tags=False, seed=0, temperature=0.0)
    graphs = runs.runner.graphs
    assert graphs is not None
    first = runs.generate([list(range(20))], SamplingParams(max_tokens=8, **options))
    captured = graphs.captured
    assert captured
    again = runs.generate([list(range(20))], SamplingParams(max_tokens=8, **options))
    assert graphs.captured == captured and again[0].token_ids == first[0].token_ids
    runs.sleep()
    runs.wake()
    third = runs.generate([list(range(20))], SamplingParams(max_tokens=8, **options))
    assert graphs.captured > captured and third[0].token_ids == first[0].token_ids
    address = runs.runner._upload.address
    long = [np.random.default_rng(1).integers(0, 90, 2000).tolist()]
    runs.generate(long, SamplingParams(max_tokens=2, **options))  # many tokens of one step: the buffer grows
    runs.runner._upload._target = torch.empty_like(runs.runner._upload._target)
    assert runs.runner._upload.address != address
    last = runs.generate([list(range(20))], SamplingParams(max_tokens=8, **options))
    assert last[0].token_ids == first[0].token_ids


def test_weights_that_lie_elsewhere_are_captured_anew(model: Model) -> None:
    runs = engine(model, True)
    options: dict[str, Any] = dict(ignore_eos=True, repetition=None, stop_at_tags=False, seed=0)
    runs.generate([[1, 2, 3]], SamplingParams(max_tokens=4, **options))
    graphs = runs.runner.graphs
    assert graphs is not None and graphs._replays
    runs.weights_updated()
    runs.generate([[1, 2, 3]], SamplingParams(max_tokens=4, **options))
    runs.weights_updated()  # nothing has moved
    assert graphs._replays
    norm = model.decoder.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
    runs.weights_updated()
    assert not graphs._replays


def test_a_key_is_called_with_what_was_captured() -> None:
    graphs = DecodeGraphs(torch.device("cpu"))
    x = torch.zeros(3)
    first = graphs.run("a", lambda: x + 1)
    x += 5
    assert torch.equal(first, torch.ones(3)) and torch.equal(graphs.run("a", lambda: x - 100), x + 1)
    graphs.forget()
    assert torch.equal(graphs.run("a", lambda: x - 100), x - 100)


class Captured(TorchDispatchMode):
    """Refuses what a capture does: reading a value of the device, and shapes that depend on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forbidden = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if forbidden or by_mask or func.overloadpacket is torch.ops.aten.is_nonzero:
            raise RuntimeError(f"{func} cannot be captured")
        self.count += 1
        return func(*args, **(kwargs or {}))


PLANTS: dict[str, Callable[[torch.Tensor], object]] = {
    "a value read": lambda hidden: hidden[0, 0].item(),
    "a branch": lambda hidden: 1 if hidden.sum() > 0 else 0,
    "a shape": lambda hidden: hidden.nonzero(),
    "a mask": lambda hidden: hidden[hidden > 0],
}


@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_what_is_captured_reads_nothing_and_has_no_shape_of_what_it_computes(
    model: Model, monkeypatch: pytest.MonkeyPatch, plant: str | None
) -> None:
    runs, captured = engine(model, True), Captured()
    assert runs.runner.graphs is not None

    def capture(key: object, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with captured:
            hidden = call()
            if plant is not None:
                PLANTS[plant](hidden)
            return hidden

    # Ops look at the values of their arguments on a CPU, and on a device do not.
    monkeypatch.setattr("thyme.kernels.checks.values_visible", lambda tensor: False)
    monkeypatch.setattr(runs.runner.graphs, "run", capture)
    params = SamplingParams(n=3, max_tokens=4, seed=1, ignore_eos=True, repetition=None)
    if plant is None:
        runs.generate([[5, 6, 7]], params)
        assert captured.count > 3 * 10
        return
    with pytest.raises(RuntimeError, match="cannot be captured"):
        runs.generate([[5, 6, 7]], params)
