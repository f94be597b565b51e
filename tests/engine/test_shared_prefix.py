"""Siblings read their prompt's keys together: what the kernel is given, and that no token changes."""

from typing import Any

import numpy as np
import pytest

from tests import tiny
from thyme.engine import Completion, Engine, SamplingParams
from thyme.kernels import attention_prefix, attention_tiles
from thyme.model import Model, ModelConfig, build

SPLIT = 64  # tokens; the least that tiles of keys allow
BLOCK = 16
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def params(n: int = 1, max_tokens: int = 3) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=max_tokens, seed=5, banned_ids=(), ignore_eos=True, repetition=None)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, length).tolist()


class PrefixKernel:
    """Passes on what it is launched with, and remembers each step's groups: (sequences, whole splits they share)."""

    def __init__(self, kernel: Any, num_layers: int) -> None:
        self.kernel, self.num_layers = kernel, num_layers
        self.launches: list[list[tuple[int, int]]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            sizes, blocks = args[5].diff().tolist(), args[6].tolist()
            splits = [count * constants["BLOCK_SIZE"] // constants["SPLIT"] for count in blocks]
            self.launches.append([(size, split) for size, split in zip(sizes, splits, strict=True) if split])
            self.kernel[grid](*args, **constants)

        return launch

    @property
    def steps(self) -> list[list[tuple[int, int]]]:
        """Of the steps that had any; every layer is given the same."""
        steps = self.launches[:: self.num_layers]
        assert self.launches == [step for step in steps for _ in range(self.num_layers)]
        return steps


@pytest.fixture(scope="module")
def model() -> Model:
    """Two query heads and one of keys: the interpreter takes its time for each."""
    text = tiny.text_config(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    return build(ModelConfig(model_type="qwen2", text=text), seed=3)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, model: Model) -> PrefixKernel:
    monkeypatch.setattr(attention_tiles, "SPLIT", SPLIT)
    spy = PrefixKernel(attention_prefix._prefix_kernel, model.config.text.num_hidden_layers)
    monkeypatch.setattr(attention_prefix, "_prefix_kernel", spy)
    return spy


def run(engine: Engine) -> list[Completion]:
    done = []
    while engine.has_unfinished():
        done += engine.step()
    return sorted(done, key=lambda completion: completion.sequence.id)


@pytest.fixture
def engines(model: Model, make_engine: Any) -> Any:
    """(in Triton, by the reference), each with these settings."""

    def make(**config: Any) -> tuple[Engine, Engine]:
        sizes = dict(block_size=BLOCK, num_blocks=100) | config
        return tuple(make_engine(model, attention=name, **sizes) for name in ("triton", "reference"))  # type: ignore

    return make


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [completion.token_ids for completion in ours] == [completion.token_ids for completion in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs_raw, other.logprobs_raw, atol=2e-5)


def test_two_groups_beside_loners(kernel: PrefixKernel, engines: Any) -> None:
    """Of one split and of two, the rest of each prompt in blocks that siblings copy, as soon as they differ."""
    outputs = []
    for engine in engines():
        for length, n in ((20, 1), (70, 3), (130, 1), (133, 2)):
            engine.add_group(prompt(length, seed=length), params(n))
        outputs.append(run(engine))
    assert_same(*outputs)
    assert len({tuple(completion.token_ids) for completion in outputs[0][1:4]}) > 1
    assert kernel.steps == [[(3, 1), (2, 2)]] * 2  # the first of three tokens is drawn where the prompt is computed


def test_one_of_a_group_ends_early(kernel: PrefixKernel, engines: Any) -> None:
    """The middle one first; the last alone has nobody to read with."""
    outputs = []
    for engine in engines():
        group = engine.add_group(prompt(66, seed=1), params(4, max_tokens=6))
        for leaving in (group[1], group[0], group[3]):
            engine.step()
            engine.step()
            engine.abort(leaving)
        outputs.append([*run(engine)])
    assert_same(*outputs)
    assert kernel.steps == [[(4, 1)], [(3, 1)], [(3, 1)], [(2, 1)], [(2, 1)]]


def test_siblings_are_neighbors_again_after_their_tools(kernel: PrefixKernel, engines: Any) -> None:
    """Appended to in another order than they stand in, and a younger request comes in between."""
    outputs = []
    for engine in engines():
        group = engine.add_group(prompt(66, seed=2), params(3, max_tokens=1), hold=True)
        run(engine)
        for sequence in (group[2], group[0], group[1]):
            engine.append(sequence, [4, 5, sequence.index + 6], max_tokens=4)
            engine.step()
            if sequence is group[2]:
                engine.add(prompt(9, seed=3), params(max_tokens=8))
        outputs.append(run(engine))
        for sequence in group:
            engine.release(sequence)
    assert_same(*outputs)
    # The third comes back while two decode; then all three do, until the first two have their four tokens.
    assert kernel.steps == [[(2, 1)], [(3, 1)], [(2, 1)]]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_sibling(kernel: PrefixKernel, engines: Any, prefix_cache: bool) -> None:
    """It loses the end of its blocks, which nobody shares, and comes back to its siblings."""
    outputs = []
    for engine in engines(block_size=4, num_blocks=21, prefix_cache=prefix_cache):
        group = engine.add_group(prompt(64, seed=4), params(3, max_tokens=10))
        while not engine.stats()["preemptions"]:
            engine.step()
        engine.abort(group[0])
        outputs.append(run(engine))
        assert engine.stats()["preemptions"] == 1
    assert_same(*outputs)
    assert kernel.steps == [[(3, 1)]] * 4 + [[(2, 1)]] * 5


def test_unrelated_requests_that_begin_alike(kernel: PrefixKernel, engines: Any) -> None:
    """Found in the prefix cache; what follows differs, also within a block."""
    outputs = []
    for engine in engines():
        common = prompt(64, seed=6)
        engine.generate([*common, 7], params(max_tokens=1))
        engine.add([*common, 9, 10], params())
        engine.add([*common, 11], params())
        engine.add(prompt(70, seed=8), params())
        outputs.append(run(engine))
    assert_same(*outputs)
    assert kernel.steps == [[(2, 1)]] * 2


def test_less_than_a_split_is_not_shared(kernel: PrefixKernel, engines: Any) -> None:
    ours, reference = engines()
    outputs = [engine.generate([prompt(60, seed=9)], params(3, max_tokens=2)) for engine in (ours, reference)]
    assert_same(*outputs)
    assert kernel.launches == []


def test_deterministic_reads_nothing_together(kernel: PrefixKernel, engines: Any) -> None:
    ours, _ = engines(deterministic=True)
    ours.generate([prompt(66, seed=10)], params(2, max_tokens=2))
    assert kernel.launches == []
