"""Encoded pictures: so many in a step, kept while there is room, the tokens the same."""

from typing import Any

import pytest
import torch

from thyme.engine import Prompt, SamplingParams
from thyme.model import Model

PARAMS = SamplingParams(max_tokens=5, seed=1, banned_ids=(60, 61, 62, 63), repetition=None, ignore_eos=True)


@pytest.mark.parametrize("budget", [1, 12, 13, 18, None])
def test_a_step_encodes_no_more_than_its_budget(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, budget: int | None
) -> None:
    images = [make_image(4, 6, i) for i in range(7)]  # 6 tokens each
    prompts = [Prompt([3, *shown(image), 5 + i], (image,)) for i, image in enumerate(images[:4])]
    prompts.append(
        Prompt([4, *shown(images[4]), 5, *shown(images[5]), *shown(images[0]), 6], (*images[4:6], images[0]))
    )
    prompts.append(Prompt([7, 8, 9]))
    expected = [
        completion.token_ids for completion in make_engine(vision_model, encoder_budget=None).generate(prompts, PARAMS)
    ]
    engine = make_engine(vision_model, encoder_budget=budget)
    sequences = [engine.add(prompt, PARAMS) for prompt in prompts]
    counts = []
    while engine.has_unfinished():
        before = engine.runner.images.num_encoded
        engine.step()
        counts.append(engine.runner.images.num_encoded - before)
        engine.scheduler.check_integrity()
    assert [s.token_ids[s.prompt_len :] for s in sequences] == expected
    assert sum(counts) == 6
    assert max(counts) == {1: 1, 12: 2, 13: 2, 18: 3, None: 6}[budget]


def test_those_that_decode_go_on_while_pictures_wait(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    engine = make_engine(vision_model, encoder_budget=6)
    text = engine.add([3, 4, 5], SamplingParams(max_tokens=20, seed=1, banned_ids=(60, 61, 62, 63), ignore_eos=True))
    engine.step()
    for i in range(5):
        engine.add(Prompt([3, *shown(make_image(4, 6, i))], (make_image(4, 6, i),)), PARAMS)
    for steps in range(1, 6):
        engine.step()
        assert (engine.runner.images.num_encoded, len(text)) == (steps, 3 + 1 + steps)
    while engine.has_unfinished():
        engine.step()


def test_an_equal_picture_is_not_encoded_again_while_there_is_room(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    images = [make_image(4, 6, i) for i in range(3)]
    prompts = [Prompt([3, *shown(image)], (image,)) for image in images]
    size = 6 * 48 * 4
    engine = make_engine(vision_model, prefix_cache=False, image_cache_bytes=2 * size)
    for number, encoded in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):  # 1 was unused for longest
        engine.generate(prompts[number], PARAMS)
        assert engine.stats()["images_encoded"] == encoded
    assert engine.stats()["image_cache_bytes"] == 2 * size
    engine.weights_updated()
    assert engine.stats()["image_cache_bytes"] == 0
    engine.generate(prompts[1], PARAMS)
    assert engine.stats()["images_encoded"] == 5
    none = make_engine(vision_model, prefix_cache=False, image_cache_bytes=0)
    for _ in range(2):
        none.generate(prompts[0], PARAMS)
    assert none.stats()["images_encoded"] == 2 and none.stats()["image_cache_bytes"] == 0


def test_a_picture_cut_by_new_weights_is_encoded_again(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    engine = make_engine(vision_model, prefill_chunk=3, encoder_budget=6)
    sequences = [engine.add(Prompt([3, *shown(make_image(4, 6, i))], (make_image(4, 6, i),)), PARAMS) for i in range(3)]
    engine.step()
    engine.step()
    engine.weights_updated()
    while engine.has_unfinished():
        engine.step()
    assert all(len(sequence) == sequence.prompt_len + 5 for sequence in sequences)
    assert torch.isfinite(engine.runner.kv_cache).any()
