"""Packed weights in the engine: followed, counted, given back, and never under deterministic."""

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import Prompt, SamplingParams
from thyme.kernels.native_step import NativeStep
from thyme.kernels.packed_product import has_products
from thyme.model import LoraConfig, Model, ModelConfig, add_adapters, build
from thyme.model.packed import PackedView, ShortView, packed_nbytes, packs

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)


@pytest.fixture(params=["ours", "oneDNN"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products a view has: oneDNN's are for processors that ours are not written for."""
    if request.param == "oneDNN":
        monkeypatch.setattr("thyme.model.packed.has_products", lambda dtype: False)
    return str(request.param)


@pytest.fixture
def model() -> Model:
    """Its head is its embedding."""
    text = tiny.text_config(tie_word_embeddings=True)
    return build(ModelConfig(model_type="qwen2", text=text, eos_token_ids=(2,)), seed=3)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_those_of_the_unpacked_engine(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, prompts: Any, dtype: torch.dtype
) -> None:
    """The vision tower and the tied head are packed as well."""
    if not packs(dtype):
        pytest.skip("this processor multiplies no bfloat16")
    model = build(vision_model.config, seed=4, dtype=dtype)
    image = make_image(4, 6, 1)
    cases = [Prompt(ids) for ids in prompts] + [Prompt([4, *shown(image), 5, 6], (image,))]
    params = SamplingParams(max_tokens=1, temperature=1.0, seed=7, banned_ids=(60, 61, 62, 63), ignore_eos=True)
    packed, plain = (make_engine(model, pack_weights=value).generate(cases, params) for value in (True, False))
    for a, b in zip(packed, plain, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        np.testing.assert_allclose(a.entropies, b.entropies, atol=tolerance)


@pytest.mark.usefixtures("products")
def test_products_are_packed(model: Model, make_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    make_engine(model, pack_weights=True).generate(prompts, GREEDY)
    assert not calls
    make_engine(model, pack_weights=False).generate(prompts, GREEDY)
    assert calls


@pytest.mark.skipif(not has_products(torch.float32), reason="not on this processor")
def test_a_step_is_one_call_of_its_layers(
    model: Model, make_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until adapters come, whose products are not packed."""
    calls = []
    run = NativeStep.run_layers
    monkeypatch.setattr(NativeStep, "run_layers", lambda *args: calls.append(args) or run(*args))
    engine = make_engine(model, pack_weights=True)
    engine.generate(prompts, GREEDY)
    assert len(calls) == engine.stats()["steps"] > 0
    add_adapters(model, LoraConfig(rank=2))
    calls.clear()
    engine.generate(prompts, GREEDY)
    assert not calls


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("says", [True, False], ids=["weights_updated", "nobody says"])
def test_new_weights_are_seen(model: Model, make_engine: Any, prompts: Any, says: bool) -> None:
    """In place, as an optimizer writes them; by a new parameter in a module; in an embedding tied to the head."""
    engine = make_engine(model, pack_weights=True, prefix_cache=False)
    before = engine.generate(prompts, GREEDY)
    with torch.no_grad():
        model.decoder.layers[0].mlp.down.weight.mul_(-1.5)
        new = model.decoder.layers[1].self_attn.qkv.weight.detach().flip(0).contiguous()
        model.decoder.layers[1].self_attn.qkv.weight = torch.nn.Parameter(new)
        model.decoder.embed_tokens.weight.add_(0.1)
    if says:
        engine.weights_updated()
    after = engine.generate(prompts, GREEDY)
    fresh = make_engine(model, pack_weights=True, prefix_cache=False).generate(prompts, GREEDY)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh] != [c.token_ids for c in before]


@pytest.mark.usefixtures("products")
def test_adapters_that_come_and_change(model: Model, make_engine: Any, prompts: Any) -> None:
    engine = make_engine(model, pack_weights=True, prefix_cache=False)
    before = engine.generate(prompts, GREEDY)
    add_adapters(model, LoraConfig(rank=2))
    assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == [c.token_ids for c in before]
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.down.lora_b.normal_()
    after = engine.generate(prompts, GREEDY)
    plain = make_engine(model, pack_weights=False, prefix_cache=False).generate(prompts, GREEDY)
    assert [c.token_ids for c in after] == [c.token_ids for c in plain] != [c.token_ids for c in before]


def test_the_model_is_left_alone(model: Model, make_engine: Any, prompts: Any) -> None:
    """What training holds: the same parameters, under the same names, and the products that it had."""
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    make_engine(model, pack_weights=True).generate(prompts, GREEDY)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (pointer, version, values) in before.items():
        assert (after[name].data_ptr(), after[name]._version) == (pointer, version)
        assert torch.equal(after[name], values)


@pytest.mark.usefixtures("products")
def test_memory_is_counted_and_given_back(model: Model, make_engine: Any, prompts: Any) -> None:
    engine = make_engine(model, pack_weights=True)
    assert engine.stats()["packed_bytes"] == 0
    first = engine.generate(prompts, GREEDY)
    matrices = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2)
    assert matrices <= engine.stats()["packed_bytes"] == packed_nbytes(model) < 2 * matrices
    engine.sleep()
    assert engine.stats()["packed_bytes"] == 0
    engine.wake()
    assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == [c.token_ids for c in first]
    engine.weights_updated()
    assert engine.stats()["packed_bytes"] == 0


def test_by_default_where_it_serves(model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_engine(model).runner.view) is PackedView
    assert type(make_engine(model, deterministic=True).runner.view) is ShortView
    assert make_engine(build(model.config, dtype=torch.float16)).runner.view is None
    monkeypatch.setattr("thyme.engine.model_runner._free_memory", lambda device: 100_000)
    assert type(make_engine(model).runner.view) is ShortView


def test_where_it_cannot_be_had(model: Model, make_engine: Any) -> None:
    with pytest.raises(ValueError, match="pack_weights does not go with deterministic"):
        make_engine(model, pack_weights=True, deterministic=True)
    with pytest.raises(ValueError, match=r"weights are packed in float32 on a CPU.*the model is in torch\.float16"):
        make_engine(build(model.config, dtype=torch.float16), pack_weights=True)


def test_a_processor_without_products_in_bfloat16(
    model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the packing itself raises: what nobody asked for is left out, and asking says why not."""
    monkeypatch.setattr("thyme.model.packed.packs", lambda dtype: dtype == torch.float32)
    narrow = build(model.config, dtype=torch.bfloat16)
    assert type(make_engine(narrow).runner.view) is ShortView
    assert type(make_engine(model).runner.view) is PackedView
    with pytest.raises(ValueError, match=r"one that multiplies bfloat16, the model is in torch\.bfloat16"):
        make_engine(narrow, pack_weights=True)
