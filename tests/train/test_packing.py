"""Packing: rows are aligned to predictions, images are shared, micro-batches respect the budget."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from thyme.model import ImageInputs, Processor
from thyme.train.packing import Sample, pack
from thyme.train.tokenization import positions

Picture = Callable[[int], ImageInputs]


def sample(processor: Processor, ids: list[int], trained: list[int], images: tuple[ImageInputs, ...] = ()) -> Sample:
    expanded = np.asarray(processor.expand(ids, images))
    weights = np.zeros(len(expanded), dtype=np.float32)
    weights[trained] = 1.0
    return Sample(token_ids=expanded, positions=positions(processor, expanded, images), weights=weights, images=images)


def test_rows_predict_the_trained_tokens_within_each_sequence(processor: Processor) -> None:
    first = sample(processor, [10, 11, 12, 13], trained=[2, 3])
    second = sample(processor, [20, 21, 22, 23, 24], trained=[1, 4])
    (batch,) = pack([first, second], image_token_id=processor.image_token_id)
    assert batch.lengths == (4, 5)
    assert batch.targets.tolist() == [12, 13, 21, 24]
    # Each row is the token before its target; token 20, the first of its sequence, is no target of token 13.
    assert batch.input_ids[batch.rows].tolist() == [11, 12, 20, 23]
    assert batch.input_ids[batch.rows + 1].tolist() == batch.targets.tolist()
    assert batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.pixel_values is None and batch.advantages is None


def test_per_token_arrays_follow_their_tokens(processor: Processor) -> None:
    base = sample(processor, [10, 11, 12, 13], trained=[1, 3])
    values = np.arange(4, dtype=np.float32)
    full = replace(base, advantages=values, temperatures=values + 10, rollout_logprobs=-values)
    (batch,) = pack([full, full], image_token_id=processor.image_token_id)
    assert batch.advantages is not None and batch.advantages.tolist() == [1, 3, 1, 3]
    assert batch.temperatures is not None and batch.temperatures.tolist() == [11, 13, 11, 13]
    assert batch.rollout_logprobs is not None and batch.rollout_logprobs.tolist() == [-1, -3, -1, -3]
    with pytest.raises(ValueError, match="only some samples of the batch carry advantages"):
        pack([full, base], image_token_id=processor.image_token_id)


def test_an_image_shared_by_rollouts_is_encoded_once(processor: Processor, picture: Picture) -> None:
    pad = processor.image_token_id
    assert pad is not None
    shared, own = picture(0), picture(1)
    samples = [
        sample(processor, [5, pad, 6, pad, 7], trained=[20], images=(shared, own)),
        sample(processor, [5, pad, 6], trained=[10], images=(shared,)),
        sample(processor, [8, 9], trained=[1]),
    ]
    (batch,) = pack(samples, image_token_id=pad)
    assert batch.pixel_values is not None and batch.pixel_values.shape[0] == 2 * 36
    assert len(batch.grids) == 2
    assert batch.image_positions is not None and batch.feature_rows is not None
    assert len(batch.image_positions) == len(batch.feature_rows) == 3 * 9
    # Sorted by length: no image, then `shared` alone, then `shared` and `own`.
    assert batch.feature_rows.tolist() == [*range(9), *range(18)]
    assert (batch.input_ids[batch.image_positions] == pad).all()
    assert int((batch.input_ids == pad).sum()) == len(batch.image_positions)


def test_images_and_image_tokens_must_match(processor: Processor, picture: Picture) -> None:
    pad = processor.image_token_id
    assert pad is not None
    good = sample(processor, [5, pad, 6], trained=[10], images=(picture(0),))
    with pytest.raises(ValueError, match="9 image tokens for 0 images of 0 features"):
        pack([replace(good, images=())], image_token_id=pad)


def test_micro_batches_keep_order_and_budget(processor: Processor) -> None:
    samples = [sample(processor, list(range(10, 10 + n)), trained=[1]) for n in (4, 4, 9, 3, 4)]
    batches = pack(samples, image_token_id=processor.image_token_id, max_tokens=8)
    # 9 tokens exceed the budget and stand alone; the others fill up in order.
    assert [batch.lengths for batch in batches] == [(4, 4), (9,), (3, 4)]
    assert sum(float(batch.weights.sum()) for batch in batches) == 5
    assert [batch.num_weighted for batch in batches] == [2, 1, 2]


def test_a_sample_without_training_is_left_out(processor: Processor) -> None:
    idle = sample(processor, [10, 11], trained=[])
    assert pack([idle], image_token_id=None) == []
    (batch,) = pack([idle, sample(processor, [10, 11, 12], trained=[1])], image_token_id=None)
    assert batch.lengths == (3,)


def test_positions_are_those_of_each_sequence(processor: Processor) -> None:
    samples = [sample(processor, [10, 11, 12], trained=[1]), sample(processor, [10, 11, 12, 13], trained=[1])]
    (batch,) = pack(samples, image_token_id=None)
    assert torch.equal(batch.positions[0], torch.tensor([0, 1, 2, 0, 1, 2, 3]))


def test_bad_samples(processor: Processor) -> None:
    good = sample(processor, [10, 11, 12], trained=[1])
    with pytest.raises(ValueError, match="first token can't be trained"):
        replace(good, weights=np.ones(3, dtype=np.float32))
    with pytest.raises(ValueError, match="advantages has 2 entries for 3 tokens"):
        replace(good, advantages=np.ones(2, dtype=np.float32))
