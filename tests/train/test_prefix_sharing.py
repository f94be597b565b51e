"""What samples share is found in their tokens, laid out once, and packed so that every row still finds its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_packing import sample
from thyme.model import ImageInputs, Processor
from thyme.model.prefix_tree import PrefixTree
from thyme.train.packing import Sample, TrainBatch, pack, token_keys
from thyme.train.prefix_sharing import Keys, Trie, distinct_tokens, micro_batches
from thyme.train.sharing_metrics import Shared

Picture = Callable[[int], ImageInputs]


def keys_of(ids: list[int]) -> Keys:
    """Text: positions count, there is no picture."""
    places = np.arange(len(ids))
    return np.stack([np.array(ids), places, places, places, np.full(len(ids), -1)], axis=1)


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8)


@given(SEQUENCES)
def test_a_trie_has_each_prefix_once_and_gives_each_sequence_its_tokens(sequences: list[list[int]]) -> None:
    trie, known = Trie(), []
    for ids in sequences:
        assert trie.shared(keys_of(ids)) == sum(tuple(ids[: n + 1]) in prefixes(known) for n in range(len(ids)))
        trie.insert(keys_of(ids))
        known.append(ids)
        assert trie.size == len(prefixes(known))
    assert distinct_tokens([keys_of(ids) for ids in sequences]) == trie.size
    tree, places = trie.layout()  # which also says that it is depth first
    assert sum(tree.lengths) == trie.size
    token_of: dict[int, tuple[int, ...]] = {}
    for ids, place in zip(sequences, places, strict=True):
        for n, t in enumerate(place.tolist()):
            assert token_of.setdefault(t, tuple(ids[: n + 1])) == tuple(ids[: n + 1])
        node = int(np.searchsorted(np.cumsum(tree.lengths), place[-1], side="right"))
        way = np.concatenate([np.arange(tree.lengths[n]) + tree.starts[n] for n in tree.path(node)])
        np.testing.assert_array_equal(way[: len(place)], place)
    assert sorted(token_of) == list(range(trie.size))
    # A node ends where sequences part or one ends, so no two neighbors could be one.
    for node, parent in enumerate(tree.parents):
        if parent >= 0 and tree.parents.count(parent) == 1:
            assert any(place[-1] == tree.starts[node] - 1 for place in places)


@settings(max_examples=40)
@given(SEQUENCES, st.integers(4, 20), st.data())
def test_micro_batches_hold_what_they_may_and_whole_groups_where_they_can(
    sequences: list[list[int]], limit: int, data: st.DataObject
) -> None:
    keys = [keys_of(ids) for ids in sequences]
    rows = [data.draw(st.integers(1, len(ids))) for ids in sequences]
    steps = [data.draw(st.integers(0, 1)) for _ in sequences]
    groups = np.cumsum(steps).tolist()
    parts = micro_batches(keys, rows, groups, limit)
    assert [i for part in parts for i in part] == list(range(len(sequences)))
    for part in parts:
        tokens, trained = len(prefixes([sequences[i] for i in part])), sum(rows[i] for i in part)
        assert len(part) == 1 or (tokens <= limit and trained <= limit)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        fits = len(prefixes([sequences[i] for i in members])) <= limit and sum(rows[i] for i in members) <= limit
        if fits:
            assert sum(bool(set(members) & set(part)) for part in parts) == 1
    assert micro_batches(keys, rows, groups, None) == [list(range(len(sequences)))]


def test_what_a_rollout_shares_is_packed_once(processor: Processor) -> None:
    """Two rollouts of one prompt that agree on their first word, a third that ends inside of it, another question."""
    samples = [
        sample(processor, [5, 6, 7, 20, 21, 22], trained=[3, 4, 5]),
        sample(processor, [5, 6, 7, 20, 31], trained=[3, 4]),
        sample(processor, [5, 6, 7, 20], trained=[3]),
        sample(processor, [8, 6, 7, 20], trained=[2, 3]),
    ]
    (batch,) = pack(samples, image_token_id=processor.image_token_id, share_prefixes=True)
    assert batch.tree is not None
    assert batch.lengths == batch.tree.lengths == (4, 2, 1, 4) and batch.tree.parents == (-1, 0, 0, -1)
    assert batch.input_ids.tolist() == [5, 6, 7, 20, 21, 22, 31, 8, 6, 7, 20]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 3]
    # Each sample has its own rows, also where two predict the same token from the same place.
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8]
    assert batch.rows.tolist() == [2, 3, 4, 2, 3, 2, 8, 9]
    assert batch.targets.tolist() == [20, 21, 22, 20, 31, 20, 7, 20]


def test_per_token_arrays_stay_each_samples_own(processor: Processor) -> None:
    base = sample(processor, [10, 11, 12, 13], trained=[1, 3])
    values = np.arange(4, dtype=np.float32)
    one, two = (replace(base, advantages=values + n, temperatures=values, rollout_logprobs=-values - n) for n in (0, 7))
    (batch,) = pack([one, two], image_token_id=None, share_prefixes=True)
    assert batch.lengths == (4,)
    assert batch.advantages is not None and batch.advantages.tolist() == [1, 3, 8, 10]
    assert batch.rollout_logprobs is not None and batch.rollout_logprobs.tolist() == [-1, -3, -8, -10]
    assert batch.rows.tolist() == [0, 2, 0, 2]


@pytest.fixture
def illustrated(processor: Processor, picture: Picture) -> Callable[..., Sample]:
    """A prompt with a picture, and what follows it, pads of other pictures too."""
    pad = processor.image_token_id

    def make(number: int, after: list[int], *more: int) -> Sample:
        ids = [5, pad, 6, *after]
        last = len(ids) - 1 + (1 + after.count(pad)) * 8
        return sample(processor, ids, [last], (picture(number), *(picture(n) for n in more)))

    return make


def layout(batch: TrainBatch) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    return batch.lengths, None if batch.tree is None else batch.tree.parents


def test_pictures_are_shared_by_what_they_show(processor: Processor, illustrated: Callable[..., Sample]) -> None:
    """Prompts of the same ids with other pictures part where the pictures begin; a sandbox's picture is a branch's."""
    pad = processor.image_token_id
    samples = [
        illustrated(0, [20]),
        illustrated(0, [21, pad, 22], 1),
        illustrated(2, [20]),
        illustrated(0, [21, pad, 22], 2),
    ]
    (batch,) = pack(samples, image_token_id=pad, share_prefixes=True)
    # 5 | picture 0, 6 | 20, and 21 with picture 1 or 2 | picture 2, 6, 20
    assert layout(batch) == ((1, 10, 1, 1, 10, 10, 11), (-1, 0, 1, 1, 3, 3, 0))
    assert batch.pixel_values is not None and batch.feature_rows is not None and batch.image_positions is not None
    assert len(batch.grids) == 3 and len(batch.pixel_values) == 3 * 36  # each once, whoever shows it
    shown = batch.feature_rows.view(4, 9)[:, 0].tolist()
    assert shown == [0, 9, 18, 18]  # picture 2 stands in two places
    assert batch.image_positions.view(4, 9)[:, 0].tolist() == [1, 13, 23, 33]


def test_a_shifted_position_is_another_token(processor: Processor, illustrated: Callable[..., Sample]) -> None:
    one, two = illustrated(0, [20, 21]), illustrated(0, [20, 22])
    moved = two.positions.copy()
    moved[0, 4:] += 1
    (batch,) = pack([one, replace(two, positions=moved)], image_token_id=processor.image_token_id, share_prefixes=True)
    assert layout(batch) == ((4, 9, 9), (-1, 0, 0))
    with pytest.raises(ValueError, match="9 image tokens for 0 images"):
        pack([replace(one, images=())], image_token_id=processor.image_token_id, share_prefixes=True)


def test_nothing_shared_is_packed_as_without_sharing(processor: Processor) -> None:
    samples = [sample(processor, list(range(start, start + n)), trained=[1]) for start, n in ((10, 5), (20, 3))]
    for share in (False, True):
        (batch,) = pack(samples, image_token_id=processor.image_token_id, share_prefixes=share)
        assert layout(batch) == ((3, 5), None)
        assert batch.input_ids.tolist() == [20, 21, 22, 10, 11, 12, 13, 14]


def test_groups_are_cut_only_where_they_must_be_and_it_is_counted(processor: Processor) -> None:
    def group(number: int, prompt: list[int], tails: int) -> list[Sample]:
        made = [sample(processor, [*prompt, 40 + t, 50 + t], trained=[len(prompt)]) for t in range(tails)]
        return [replace(s, group=number) for s in made]

    samples = [*group(0, [5, 6, 7], 3), *group(1, [5, 8, 9], 3), *group(2, [5, 9, 9], 5)]
    idle = replace(sample(processor, [5, 6], trained=[]), group=2)
    parts = pack([*samples, idle], image_token_id=None, max_tokens=12, share_prefixes=True)
    # 9 distinct tokens a group of three, 8 beside another one: none fits beside another. The last is of 13.
    assert [layout(batch)[0] for batch in parts] == [(3, 2, 2, 2), (3, 2, 2, 2), (3, 2, 2, 2, 2), (5,)]
    shared = Shared.of([*samples, idle], parts, None)
    assert (shared.tokens, shared.unique, shared.computed) == (55, 9 + 8 + 12, 9 + 9 + 11 + 5)
    assert Shared.metrics([shared])["batch/computed_per_unique"] == 34 / 29
    whole = pack(samples, image_token_id=None, share_prefixes=True)
    assert Shared.of(samples, whole, None).computed == 29
    apart = pack(samples, image_token_id=None)
    assert Shared.metrics([Shared.of(samples, apart, None)]) == {
        "batch/tokens": 55,
        "batch/unique_tokens": 29,
        "batch/computed_per_unique": 55 / 29,
        "batch/shared_frac": 0.0,
    }
    assert Shared.metrics([Shared()]) == Shared.metrics([]) == {}


def test_pictures_are_counted(processor: Processor, illustrated: Callable[..., Sample]) -> None:
    pad = processor.image_token_id
    samples = [illustrated(0, [20]), illustrated(0, [21]), illustrated(1, [20])]
    for limit, encoded in ((None, 2), (13, 2), (12, 3)):
        parts = pack(samples, image_token_id=pad, max_tokens=limit, share_prefixes=True)
        metrics = Shared.metrics([Shared.of(samples, parts, pad)])
        assert metrics["batch/encoded_per_picture"] == encoded / 2
    assert len(token_keys(samples, pad)) == 3


def test_the_place_of_a_packed_token_in_its_sequences() -> None:
    """A prompt of 3, two that go on by 2 and 4, one of these again by 2, and another root."""
    tree = PrefixTree(lengths=(3, 2, 4, 2, 5), parents=(-1, 0, 0, 2, -1))
    assert [tree.place_of(token) for token in range(16)] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4]
