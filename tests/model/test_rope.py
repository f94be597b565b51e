"""Positions against transformers' get_rope_index; frequencies against transformers' rotary modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thyme.model import mrope_positions
from thyme.model.hf import model_config_from_hf
from thyme.model.rope import Grid, inverse_frequencies

IMAGE = 10
sides = st.integers(1, 12).map(lambda n: 2 * n)
images = st.tuples(st.just(1), sides, sides)
# At least one text token between images: transformers reads neighbors as one image.
rounds = st.lists(st.tuples(images, st.integers(1, 9)), max_size=5)


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("hf_vision_model")().model


def positions(ids: list[int], grids: list[Grid], start: int = 0) -> tuple[np.ndarray, int]:
    return mrope_positions(ids, grids, image_token_id=IMAGE, spatial_merge_size=2, start=start)


def spell(lead: int, parts: list[tuple[Grid, int]]) -> tuple[list[int], list[Grid]]:
    ids = [5] * lead
    for (_, h, w), text in parts:
        ids += [IMAGE] * (h * w // 4) + [7] * text
    return ids, [grid for grid, _ in parts]


@settings(max_examples=80, deadline=None)
@given(lead=st.integers(1, 9), parts=rounds)
def test_positions_equal_transformers(reference: Any, lead: int, parts: list[tuple[Grid, int]]) -> None:
    ids, grids = spell(lead, parts)
    row = torch.tensor([ids])
    grid = torch.tensor(grids) if grids else None
    expected, delta = reference.get_rope_index(row, (row == IMAGE).int(), image_grid_thw=grid)
    ours, following = positions(ids, grids)
    assert np.array_equal(ours, expected[:, 0].numpy())
    assert following == len(ids) + delta.item()


@settings(max_examples=80, deadline=None)
@given(lead=st.integers(0, 9), first=rounds, second=rounds)
def test_appending_a_round_continues_the_positions(
    lead: int, first: list[tuple[Grid, int]], second: list[tuple[Grid, int]]
) -> None:
    head, head_grids = spell(lead, first)
    tail, tail_grids = spell(0, second)
    whole, end = positions(head + tail, head_grids + tail_grids)
    before, start = positions(head, head_grids)
    after, stop = positions(tail, tail_grids, start)
    assert np.array_equal(np.concatenate((before, after), axis=1), whole)
    assert stop == end


def test_neighboring_images_stay_two_images() -> None:
    ours, following = positions([IMAGE] * 8, [(1, 4, 4), (1, 4, 4)])
    assert ours[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ours[2].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert following == 4


def test_text_models_count() -> None:
    ours, following = mrope_positions([IMAGE, 3, 4], [], image_token_id=None, spatial_merge_size=1, start=6)
    assert ours.tolist() == [[6, 7, 8]] * 3
    assert following == 9


@pytest.mark.parametrize(
    "ids, grids, message",
    [
        ([5, IMAGE], [], "1 image tokens in the ids, but the 0 grids ask for 0"),
        ([5, IMAGE, IMAGE], [(1, 4, 4)], "2 image tokens in the ids, but the 1 grids ask for 4"),
        ([IMAGE, IMAGE, 5, IMAGE, IMAGE], [(1, 4, 4)], "the 4 tokens of the image at token 0 are interrupted"),
    ],
)
def test_image_tokens_that_do_not_match(ids: list[int], grids: list[Grid], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positions(ids, grids)


@pytest.mark.parametrize("family", ["llama3", "llama", "qwen3"])
def test_frequencies_equal_transformers(family: str, hf_text_model: Callable[[str], Any]) -> None:
    model = hf_text_model(family)
    ours = inverse_frequencies(model_config_from_hf(model.config.to_dict()).text)
    theirs = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    if family == "llama3":  # the case has a stretched, a blended and a kept frequency
        plain = 10000.0 ** -(torch.arange(len(ours)) / len(ours))
        ratio = ours / plain
        assert ratio.max() > 0.999 and ratio.min() < 0.1251 and ((ratio > 0.13) & (ratio < 0.99)).any()
