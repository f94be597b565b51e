"""Siblings of a group: the prompt computed once, its blocks shared, nothing written that another one reads."""

from typing import Any

import numpy as np
import pytest
import torch

from thyme.engine import Prompt, SamplingParams
from thyme.model import Model

BASE = dict(max_tokens=12, seed=11, banned_ids=(), ignore_eos=True, repetition=None)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)


# 15 to 17: the last block partly filled, full, with one token of the next.
@pytest.mark.parametrize("length", [1, 3, 15, 16, 17])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_group_is_prefilled_once_and_draws_as_single_sequences(
    text_model: Model, make_engine: Any, length: int, chunk: int | None
) -> None:
    ids = list(range(3, 3 + length))
    engine = make_engine(text_model, prefill_chunk=chunk, prefix_cache=False, deterministic=True)
    group = engine.generate([ids], SamplingParams(n=6, **BASE))
    assert engine.stats()["prefilled_tokens"] == engine.stats()["unique_tokens"] == length
    assert [completion.index for completion in group] == list(range(6))
    single = make_engine(text_model, prefix_cache=False, deterministic=True)
    for i, completion in enumerate(group):
        alone = single.generate([ids], SamplingParams(**{**BASE, "seed": 11 + i}))[0]
        assert completion.token_ids == alone.token_ids
        assert completion.sequence.params == alone.sequence.params
    assert len({tuple(completion.token_ids) for completion in group}) > 1


def test_several_groups_count_each_prompt_once(text_model: Model, make_engine: Any, prompts: Any) -> None:
    engine = make_engine(text_model, prefix_cache=False, max_sequences=8, max_batch_tokens=40)
    completions = engine.generate(prompts, SamplingParams(n=3, **BASE))
    assert engine.stats()["prefilled_tokens"] == sum(map(len, prompts))
    assert [(c.sequence.token_ids[: c.sequence.prompt_len], c.index) for c in completions] == [
        (ids, i) for ids in prompts for i in range(3)
    ]


def test_siblings_hold_the_prompts_blocks_together(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    group = engine.add_group(list(range(3, 21)), SamplingParams(n=5, **BASE))  # 18 tokens: 4 full blocks and half a one
    engine.step()
    assert engine.stats()["blocks_used"] == 5
    engine.step()  # all but the last holder copy the half block
    assert engine.stats()["blocks_used"] == 4 + 5
    engine.scheduler.check_integrity()
    tables = [engine.table.blocks(sequence.row) for sequence in group]
    assert len({tuple(table[:4]) for table in tables}) == 1
    assert len({table[4] for table in tables}) == 5
    for sequence in group:
        engine.abort(sequence)


def test_copy_on_write_never_writes_a_shared_block(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    engine.add_group(list(range(3, 21)), SamplingParams(n=5, **BASE))
    engine.add_group(list(range(7, 36)), SamplingParams(n=4, **{**BASE, "max_tokens": 3}))
    cache = engine.runner.kv_cache
    cache.zero_()
    while engine.has_unfinished():
        before = cache.clone()
        batch = engine.scheduler.schedule()
        written = set((batch.slot_mapping // 4).tolist())
        held: dict[int, int] = {}
        for sequence in engine.scheduler.running:
            for block in engine.table.blocks(sequence.row):
                held[block] = held.get(block, 0) + 1
        prefilled = set(batch.slot_mapping[np.repeat(batch.counts > 1, batch.counts)] // 4)
        # Only a prompt in the act of being computed for all its siblings is written while it is shared.
        assert all(held[block] == 1 for block in written - prefilled)
        for sequence in batch.started:
            engine.stopping.open(sequence)
        step = engine.runner.launch(batch, engine.reader.bans)
        engine.scheduler.commit(batch)
        sampled = step.result()
        engine.table.fill(batch.sample_rows, sampled, 0)
        engine.scheduler.drew(batch.sample_rows)
        for row, reason, what in engine.stopping.check(batch.sample_rows, sampled.token_ids, sampled.events):
            engine._end_round(row, reason, what)
        touched = (before != cache).flatten(3).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
        assert set(touched) <= written | set(batch.copies[1].tolist())


def test_a_group_with_images_encodes_each_once(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    image = make_image(4, 6, 3)
    ids = [3, *shown(image), 9, 9, *shown(image), 4]
    engine = make_engine(vision_model)
    params = SamplingParams(n=4, max_tokens=6, seed=2, banned_ids=(60, 61, 62, 63), repetition=None)
    engine.generate([Prompt(ids, (image, image))] * 2, params)
    stats = engine.stats()
    assert stats["images_encoded"] == 1
    assert stats["prefilled_tokens"] == stats["unique_tokens"] == len(ids)  # two equal groups are one


def test_preempted_siblings_go_on_alone(text_model: Model, make_engine: Any) -> None:
    ids = list(range(3, 21))
    params = SamplingParams(n=6, **{**BASE, "max_tokens": 20})
    expected = make_engine(text_model, deterministic=True).generate([ids], params)
    engine = make_engine(text_model, num_blocks=20, deterministic=True)
    completions = engine.generate([ids], params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert engine.stats()["preemptions"] > 0


def test_the_leader_may_be_aborted_before_and_while_it_prefills(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, prefill_chunk=4, prefix_cache=False)
    ids = list(range(3, 21))
    expected = make_engine(text_model).generate([ids], GREEDY)[0].token_ids
    for steps in (0, 2):
        group = engine.add_group(ids, SamplingParams(n=4, **{**_fields(GREEDY)}))
        for _ in range(steps):
            engine.step()
        assert engine.abort(group[0]).finish_reason == "abort"
        assert engine.abort(group[2]).token_ids == []
        done = []
        while engine.has_unfinished():
            done += engine.step()
        assert [(c.sequence.id, c.token_ids) for c in done] == [(group[i].id, expected) for i in (1, 3)]


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__ if name != "n"}


def test_a_group_that_cannot_run_at_once_is_refused(text_model: Model, make_engine: Any) -> None:
    with pytest.raises(ValueError, match=r"n=5 .* max_sequences \(4\)"):
        make_engine(text_model, max_sequences=4).add_group([3], SamplingParams(n=5))


def test_drawn_seeds_are_recorded_and_replay(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, deterministic=True)
    params = SamplingParams(n=3, **{**BASE, "seed": None})
    first = engine.generate([[5, 6]], params)
    seeds = [completion.sequence.params.seed for completion in first]
    assert seeds == list(range(seeds[0], seeds[0] + 3))
    again = engine.generate([[5, 6]], SamplingParams(n=3, **{**BASE, "seed": seeds[0]}))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    other = engine.generate([[5, 6]], params)
    assert other[0].sequence.params.seed != seeds[0]
    assert torch.equal(torch.tensor(first[0].logprobs), torch.tensor(again[0].logprobs))
