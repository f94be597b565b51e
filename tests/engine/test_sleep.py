"""An engine that sleeps has given its KV cache back, and goes on as if it had not slept."""

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from thyme.engine import Engine, Prompt, SamplingParams
from thyme.model import ImageInputs, Model

PARAMS = SamplingParams(max_tokens=6, seed=1, banned_ids=(), ignore_eos=True, repetition=None)


def test_its_memory_is_free_while_it_sleeps(
    text_model: Model, make_engine: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(text_model, deterministic=True)
    size, caches = engine.runner.kv_cache.nbytes, [weakref.ref(cache) for cache in engine.runner._layers[0]]
    before = [c.token_ids for c in engine.generate(prompts, PARAMS)]
    assert engine.stats()["kv_bytes"] == size == 2 * 2 * 1600 * 2 * 12 * 4
    engine.sleep()
    assert engine.stats()["kv_bytes"] == 0
    assert all(cache() is None for cache in caches)
    with pytest.raises(ValueError, match="wake it first"):
        engine.add([3, 4])
    with pytest.raises(ValueError, match="wake it first"):
        engine.generate(prompts, PARAMS)
    engine.wake()
    engine.wake()
    engine.runner.kv_cache.fill_(torch.nan)  # nothing of before may be read
    assert [c.token_ids for c in engine.generate(prompts, PARAMS)] == before


def test_prefixes_are_gone_with_the_cache(text_model: Model, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(text_model)
    prompt = list(range(3, 44))
    engine.generate(prompt, PARAMS)
    engine.generate(prompt, PARAMS)
    cached = engine.stats()["cached_tokens"]
    assert cached == 40
    with engine.asleep():
        assert engine.is_asleep
    engine.generate(prompt, PARAMS)
    assert engine.stats()["cached_tokens"] == cached


def test_images_are_encoded_again(
    vision_model: Model,
    make_engine: Callable[..., Engine],
    make_image: Callable[[int, int, int], ImageInputs],
    shown: Callable[[ImageInputs], Sequence[int]],
) -> None:
    engine = make_engine(vision_model, deterministic=True)
    image = make_image(4, 6, 0)
    prompt = Prompt([5, *shown(image)], (image,))
    (before,) = engine.generate(prompt, PARAMS)
    with engine.asleep():
        pass
    (after,) = engine.generate(prompt, PARAMS)
    assert after.token_ids == before.token_ids and engine.stats()["images_encoded"] == 2


def test_it_does_not_sleep_while_sequences_are_in_it(text_model: Model, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(text_model)
    sequence = engine.add([3, 4, 5], PARAMS, hold=True)
    for _ in range(20):
        with pytest.raises(ValueError, match="unfinished or held"):
            engine.sleep()
        engine.step()
    assert not engine.has_unfinished()  # held
    with pytest.raises(ValueError, match="unfinished or held"), engine.asleep():
        pass
    assert not engine.is_asleep
    engine.append(sequence, [7])
    while engine.has_unfinished():
        engine.step()
    engine.release(sequence)
    engine.sleep()
    engine.wake()


def test_memory_is_given_back_and_taken_by_its_name(
    text_model: Model, make_engine: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(text_model, pack_weights=True)
    before = [c.token_ids for c in engine.generate(prompts, PARAMS)]
    kv, packed = engine.stats()["kv_bytes"], engine.stats()["packed_bytes"]
    assert kv > 0 and packed > 0
    cached = engine.stats()["cached_tokens"]
    engine.sleep(["weights"])
    assert (engine.stats()["kv_bytes"], engine.stats()["packed_bytes"]) == (kv, 0) and engine.is_asleep
    with pytest.raises(ValueError, match="wake it first"):
        engine.add(prompts[0], PARAMS)
    engine.wake("weights")
    assert not engine.is_asleep
    assert [c.token_ids for c in engine.generate(prompts, PARAMS)] == before
    assert engine.stats()["cached_tokens"] > cached  # the cache was not touched
    engine.sleep(["kv_cache"])
    assert (engine.stats()["kv_bytes"], engine.stats()["packed_bytes"]) == (0, packed)
    engine.sleep(["weights"])
    engine.wake(["weights"])
    assert engine.is_asleep and engine.stats()["kv_bytes"] == 0
    engine.wake(["kv_cache"])
    assert [c.token_ids for c in engine.generate(prompts, PARAMS)] == before
    for call in (engine.sleep, engine.wake):
        with pytest.raises(ValueError, match="no memory is called kv: there are kv_cache, weights"):
            call(["kv"])  # type: ignore[operator]
