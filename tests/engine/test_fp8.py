"""fp8 in the engine alone: what it draws, what it leaves as it was, what it counts, and what it refuses."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import EngineConfig, Prompt, SamplingParams
from thyme.kernels import library
from thyme.kernels.fp8 import dequantize_heads, dequantize_weight, quantize_heads, quantize_weight
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.model import LoraConfig, Model, ModelConfig, add_adapters, build
from thyme.model.fp8 import fp8_nbytes

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, banned_ids=(60, 61, 62, 63), ignore_eos=True)


@pytest.fixture
def model() -> Model:
    """Rows and columns that no block divides; its head is its embedding."""
    text = tiny.text_config(tie_word_embeddings=True, hidden_size=132, intermediate_size=150)
    return build(ModelConfig(model_type="qwen2", text=text, eos_token_ids=(2,)), seed=3)


def rounded(model: Model) -> Model:
    """The same model, the decoder's projections as 8 bits have them, in its own dtype."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.decoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantize_weight(*quantize_weight(module.weight), module.weight.dtype))
    return twin


@pytest.mark.parametrize("head_dtype", ["float32", "model"])
def test_it_draws_what_a_model_of_the_rounded_weights_does(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, prompts: Any, head_dtype: str
) -> None:
    """Log-probs equal up to rounding, with a picture too; and they are not those of the model itself."""
    image = make_image(4, 6, 1)
    cases = [Prompt(ids) for ids in prompts] + [Prompt([4, *shown(image), 5, 6], (image,))]
    ours = make_engine(vision_model, weight_dtype="fp8", head_dtype=head_dtype).generate(cases, DRAWN)
    exact = make_engine(rounded(vision_model), pack_weights=False, head_dtype=head_dtype).generate(cases, DRAWN)
    plain = make_engine(vision_model, pack_weights=False).generate(cases, DRAWN)
    for a, b in zip(ours, exact, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
    assert max(abs(a.entropies[0] - b.entropies[0]) for a, b in zip(ours, plain, strict=True)) > 1e-3


def test_bfloat16_too(model: Model, make_engine: Any, prompts: Any) -> None:
    narrow = build(model.config, seed=3, dtype=torch.bfloat16)
    one = SamplingParams(max_tokens=1, temperature=1.0, seed=7, banned_ids=(), ignore_eos=True)
    ours = make_engine(narrow, weight_dtype="fp8").generate(prompts, one)
    exact = make_engine(rounded(narrow), pack_weights=False).generate(prompts, one)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a.entropies, b.entropies, atol=0.1)


@pytest.mark.parametrize("says", [True, False], ids=["weights_updated", "nobody says"])
def test_new_weights_are_seen(model: Model, make_engine: Any, prompts: Any, says: bool) -> None:
    """In place, as an optimizer writes them, and by a new parameter in a module; the copy stays where it is."""
    engine = make_engine(model, weight_dtype="fp8", prefix_cache=False)
    before = engine.generate(prompts, GREEDY)
    lay = [part.data_ptr() for linear in engine.runner.view._linears for part in linear._packed]
    with torch.no_grad():
        model.decoder.layers[0].mlp.down.weight.mul_(-1.5)
        new = model.decoder.layers[1].self_attn.qkv.weight.detach().flip(0).contiguous()
        model.decoder.layers[1].self_attn.qkv.weight = torch.nn.Parameter(new)
    if says:
        engine.weights_updated()
    after = engine.generate(prompts, GREEDY)
    assert [part.data_ptr() for linear in engine.runner.view._linears for part in linear._packed] == lay
    fresh = make_engine(model, weight_dtype="fp8", prefix_cache=False).generate(prompts, GREEDY)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh]
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


def test_a_write_that_torch_does_not_count_is_seen_when_it_is_said(
    model: Model, make_engine: Any, prompts: Any
) -> None:
    engine = make_engine(model, weight_dtype="fp8", prefix_cache=False)
    before = engine.generate(prompts, GREEDY)
    model.decoder.layers[0].mlp.down.weight.data.mul_(-1.5)
    engine.weights_updated()
    after = engine.generate(prompts, GREEDY)
    fresh = make_engine(model, weight_dtype="fp8", prefix_cache=False).generate(prompts, GREEDY)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh]
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


def test_adapters_are_not_rounded(model: Model, make_engine: Any, prompts: Any) -> None:
    """They come while the engine is there, and count as they are beside a base in 8 bits."""
    engine = make_engine(model, weight_dtype="fp8", prefix_cache=False)
    before = engine.generate(prompts, DRAWN)
    add_adapters(model, LoraConfig(rank=2))
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.down.lora_b.normal_(std=0.3)
    after = engine.generate(prompts, DRAWN)
    exact = make_engine(rounded(model), pack_weights=False, prefix_cache=False).generate(prompts, DRAWN)
    for a, b in zip(after, exact, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=5e-5)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


def test_the_model_is_left_alone(model: Model, make_engine: Any, prompts: Any) -> None:
    """What training holds: the same parameters, bit by bit, under the same names, in the same modules."""
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    engine = make_engine(model, weight_dtype="fp8")
    engine.generate(prompts, GREEDY)
    engine.weights_updated()
    engine.generate(prompts, GREEDY)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (pointer, version, values) in before.items():
        assert (after[name].data_ptr(), after[name]._version) == (pointer, version)
        assert torch.equal(after[name], values)


def test_memory_is_counted_and_given_back(model: Model, make_engine: Any, prompts: Any) -> None:
    engine = make_engine(model, weight_dtype="fp8")
    assert engine.stats()["packed_bytes"] == 0
    first = engine.generate(prompts, GREEDY)
    projections = [m.weight for m in model.decoder.modules() if isinstance(m, torch.nn.Linear)]
    numbers = sum(weight.numel() for weight in projections)
    scales = sum(-(-weight.shape[0] // 128) * -(-weight.shape[1] // 128) for weight in projections)
    assert engine.stats()["packed_bytes"] == numbers + 4 * scales == fp8_nbytes(model)
    engine.sleep()
    assert engine.stats()["packed_bytes"] == 0
    engine.wake()
    assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == [c.token_ids for c in first]


def test_deterministic_holds(model: Model, make_engine: Any, prompts: Any) -> None:
    """Bits of a sequence alone, and of the same among others, in chunks."""
    options = dict(weight_dtype="fp8", deterministic=True, prefix_cache=False)
    together = make_engine(model, prefill_chunk=3, max_batch_tokens=40, **options).generate(prompts, DRAWN)
    for prompt, among in list(zip(prompts, together, strict=True))[::4]:
        (alone,) = make_engine(model, **options).generate([prompt], DRAWN)
        assert alone.token_ids == among.token_ids
        assert alone.logprobs.tobytes() == among.logprobs.tobytes()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weight_dtype": "int4"}, "EngineConfig.weight_dtype must be model or fp8, got 'int4'"),
    "cache": ({"kv_dtype": "e5m2"}, "EngineConfig.kv_dtype must be model or fp8, got 'e5m2'"),
    "packed": (
        {"weight_dtype": "fp8", "pack_weights": True},
        "EngineConfig.pack_weights does not go with weight_dtype fp8",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**given)


def test_by_default_nothing_is_packed_beside_it(model: Model, make_engine: Callable[..., Any]) -> None:
    assert [type(linear).__name__ for linear in make_engine(model, weight_dtype="fp8").runner.view._linears] == [
        "Fp8Linear"
    ] * 8


# The KV cache in 8 bits.


def test_a_whole_prompt_and_its_chunks_see_the_same_cache(model: Model, make_engine: Any, prompts: Any) -> None:
    """Chunks, prefix cache, preemption and padding change no bit: codes depend on their token alone. Without
    deterministic a key that is rounded otherwise may have another code, which is far more than its rounding."""
    exact = dict(kv_dtype="fp8", deterministic=True)
    whole = make_engine(model, prefix_cache=False, **exact).generate(prompts, DRAWN)
    ways = (
        {"prefill_chunk": 3, "max_batch_tokens": 33},
        {"num_blocks": 24, "max_context": 60},
        {"decode_graphs": True},
    )
    for way in ways:
        for a, b in zip(whole, make_engine(model, **exact, **way).generate(prompts, DRAWN), strict=True):
            assert a.token_ids == b.token_ids, way
            assert a.logprobs.tobytes() == b.logprobs.tobytes(), way


def test_the_cache_is_read_as_it_was_rounded(
    model: Model, make_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an engine whose cache is float32 and holds what 8 bits have made of keys and values."""
    ours = make_engine(model, kv_dtype="fp8").generate(prompts, DRAWN)
    monkeypatch.setattr("thyme.engine.model_runner.mrope_write_kv", _write_rounded)
    monkeypatch.setattr(library, "watch", lambda name, run, args, kwargs: run(*args, **kwargs))  # op by op
    rounded_cache = make_engine(model).generate(prompts, DRAWN)
    monkeypatch.undo()
    plain = make_engine(model).generate(prompts, DRAWN)
    for a, b in zip(ours, rounded_cache, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
    assert max(abs(a.entropies[0] - b.entropies[0]) for a, b in zip(ours, plain, strict=True)) > 1e-4


def _write_rounded(qkv: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, slots: Any) -> Any:
    q = mrope_write_kv(qkv, cos, sin, k_cache, v_cache, slots)
    for cache in (k_cache, v_cache):
        rows = cache.view(-1, *cache.shape[2:])
        rows[slots] = dequantize_heads(*quantize_heads(rows[slots]), torch.float32)
    return q


def test_copies_take_their_scales_along(model: Model, make_engine: Any) -> None:
    """Samples of one prompt write to copies of its last block."""
    prompt = list(range(3, 13))
    exact = dict(kv_dtype="fp8", deterministic=True)
    together = make_engine(model, **exact).generate([prompt], replace(DRAWN, n=3))
    for i, among in enumerate(together):
        (alone,) = make_engine(model, **exact).generate([prompt], replace(DRAWN, seed=7 + i))
        assert alone.token_ids == among.token_ids
        assert alone.logprobs.tobytes() == among.logprobs.tobytes()


def test_both_under_deterministic(model: Model, make_engine: Any, prompts: Any) -> None:
    options = dict(weight_dtype="fp8", kv_dtype="fp8", deterministic=True)
    together = make_engine(model, prefill_chunk=3, max_batch_tokens=40, **options).generate(prompts, DRAWN)
    for prompt, among in list(zip(prompts, together, strict=True))[::4]:
        (alone,) = make_engine(model, prefix_cache=False, **options).generate([prompt], DRAWN)
        assert alone.token_ids == among.token_ids
        assert alone.logprobs.tobytes() == among.logprobs.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_know_what_they_take(model: Model, make_engine: Any, prompts: Any, dtype: torch.dtype) -> None:
    """Two layers, keys and values, two heads of 12 numbers and a scale."""
    narrow = build(model.config, seed=3, dtype=dtype)
    engine, plain = (make_engine(narrow, kv_dtype=kind, num_blocks=None, kv_bytes=100_000) for kind in ("fp8", "model"))
    block = 4 * 2 * 2 * 2 * (12 + 1)
    assert engine.blocks.num_blocks == 100_000 // block
    assert engine.stats()["kv_bytes"] == 100_000 // block * block
    assert plain.blocks.num_blocks == 100_000 // (4 * 2 * 2 * 2 * 12 * dtype.itemsize)
    engine.generate(prompts, GREEDY)
    engine.sleep()
    assert engine.stats()["kv_bytes"] == 0
    engine.wake()
    assert engine.stats()["kv_bytes"] == 100_000 // block * block


def test_flash_attention_is_refused_by_name(model: Model, make_engine: Any) -> None:
    with pytest.raises(ValueError, match="attention 'flash_attn' cannot run: it reads no cache in fp8"):
        make_engine(model, kv_dtype="fp8", attention="flash_attn")
