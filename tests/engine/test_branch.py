"""Branches: a sequence goes on from where a round of another one began, on its KV, and nothing is computed again."""

from typing import Any

import numpy as np
import pytest

from thyme.engine import Completion, Engine, Prompt, SamplingParams, Sequence
from thyme.model import Model

BASE = dict(max_tokens=7, banned_ids=(60, 61, 62, 63), ignore_eos=True, repetition=None)
SEED = 11


def finish(engine: Engine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while engine.has_unfinished():
        done |= {completion.sequence.id: completion for completion in engine.step()}
        engine.scheduler.check_integrity()
    return done


def three_rounds(engine: Engine, make_image: Any, shown: Any) -> tuple[Sequence, list[Completion]]:
    """A picture in the prompt, one in what is appended, and text."""
    first, second = make_image(4, 6, 1), make_image(2, 4, 2)
    trunk = engine.add(Prompt([3, *shown(first), 5], (first,)), SamplingParams(seed=SEED, **BASE), hold=True)
    rounds = [finish(engine)[trunk.id]]
    for ids, images in (([10, *shown(second), 11], (second,)), ([12, 13], ())):
        engine.append(trunk, ids, images)
        rounds.append(finish(engine)[trunk.id])
    return trunk, rounds


def same_bits(one: Completion, other: Completion) -> bool:
    names = ("logprobs", "logprobs_raw", "entropies", "temperatures", "kinds")
    return one.token_ids == other.token_ids and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


SIZES: list[dict[str, Any]] = [
    {},
    dict(prefill_chunk=3),
    dict(prefix_cache=False),
    dict(block_size=1),
    dict(block_size=8),
    dict(max_sequences=4, max_batch_tokens=16),
    dict(decode_graphs=True),
]


@pytest.mark.parametrize("config", SIZES, ids=str)
def test_a_branch_under_the_same_seed_is_the_round_that_was_drawn(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, config: dict[str, Any]
) -> None:
    engine = make_engine(vision_model, deterministic=True, **config)
    trunk, rounds = three_rounds(engine, make_image, shown)
    before = engine.stats()
    branches = [engine.branch(trunk, number, [SEED])[0] for number in range(3)]
    assert engine.stats()["blocks_used"] == before["blocks_used"]  # nothing is copied before it is written
    done = finish(engine)
    after = engine.stats()
    for branch, drawn in zip(branches, rounds, strict=True):
        assert same_bits(done[branch.id], drawn)
        assert branch.token_ids == trunk.token_ids[: len(branch)]
    assert after["prefilled_tokens"] == before["prefilled_tokens"]
    assert after["recomputed_tokens"] == before["recomputed_tokens"] == 0
    assert after["sampled_tokens"] == before["sampled_tokens"] + 21
    for sequence in (trunk, *branches):
        engine.release(sequence)


@pytest.mark.parametrize("config", [{}, dict(block_size=1, prefix_cache=False), dict(num_blocks=26)], ids=str)
def test_branches_draw_what_a_replay_from_the_start_draws(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any, config: dict[str, Any]
) -> None:
    """Four at each round at once, then one more round of all, also where there is room for few of them; the replay has
    an engine of its own and the prefix as its prompt."""
    engine = make_engine(vision_model, deterministic=True, **config)
    trunk, _ = three_rounds(engine, make_image, shown)
    seeds = list(range(100, 104))
    prefixes = [trunk.token_ids[: start.length] for start in trunk.starts]
    families = [engine.branch(trunk, number, seeds) for number in range(3)]
    drawn = finish(engine)
    for branch in (branch for family in families for branch in family):
        engine.append(branch, [14, 15])
    engine.append(trunk, [14, 15])
    went_on = finish(engine)
    other = make_engine(vision_model, deterministic=True)
    for prefix, family in zip(prefixes, families, strict=True):
        for branch, seed in zip(family, seeds, strict=True):
            again = other.add(Prompt(prefix, tuple(branch.images)), SamplingParams(seed=seed, **BASE), hold=True)
            assert same_bits(finish(other)[again.id], drawn[branch.id])
            other.append(again, [14, 15])
            assert same_bits(finish(other)[again.id], went_on[branch.id])
            other.release(again)
    replayed = other.add(Prompt(trunk.token_ids[:-7], tuple(trunk.images)), SamplingParams(seed=SEED, **BASE))
    assert same_bits(finish(other)[replayed.id], went_on[trunk.id])  # what branched off has not written to its blocks
    for sequence in (trunk, *(branch for family in families for branch in family)):
        engine.release(sequence)


def test_branches_refer_to_the_blocks_and_copy_the_last(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, prefix_cache=False)
    trunk = engine.add(list(range(3, 21)), SamplingParams(seed=SEED, **BASE), hold=True)  # 18 tokens, blocks of 4
    finish(engine)
    used = engine.stats()["blocks_used"]
    branches = engine.branch(trunk, 0, [1, 2, 3])
    engine.step()
    assert engine.stats()["blocks_used"] == used  # drawn from the hidden state that was kept
    engine.step()
    assert engine.stats()["blocks_used"] == used + 3
    tables = [engine.table.blocks(sequence.row) for sequence in (trunk, *branches)]
    assert len({tuple(table[:4]) for table in tables}) == 1 and len({table[4] for table in tables}) == 4
    finish(engine)
    for sequence in (*branches, trunk):
        engine.release(sequence)


def test_a_branch_of_a_branch_and_of_one_that_runs(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, deterministic=True)
    trunk = engine.add([3, 4, 5, 6, 7], SamplingParams(seed=SEED, **BASE), hold=True)
    engine.step()
    engine.step()
    (early,) = engine.branch(trunk, 0, [SEED])  # the trunk is at its second token
    (later,) = engine.branch(early, 0, [SEED])
    done = finish(engine)
    assert same_bits(done[early.id], done[trunk.id]) and same_bits(done[later.id], done[trunk.id])
    engine.append(early, [8, 9])
    first = finish(engine)[early.id]
    (again,) = engine.branch(early, 1, [SEED])
    assert same_bits(finish(engine)[again.id], first)
    engine.release(trunk)  # a branch outlives what it branched from
    engine.append(later, [8, 9])
    assert same_bits(finish(engine)[later.id], first)
    for sequence in (early, later, again):
        engine.release(sequence)


def test_what_is_kept_is_not_used_under_other_weights(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, deterministic=True)
    trunk = engine.add(list(range(3, 12)), SamplingParams(seed=SEED, **BASE), hold=True)
    first = finish(engine)[trunk.id]
    (queued,) = engine.branch(trunk, 0, [SEED])
    engine.weights_updated()
    (later,) = engine.branch(trunk, 0, [SEED])
    done = finish(engine)
    # One token each, of which there is KV, is computed again for its hidden state; the weights are in truth the same.
    assert engine.stats()["recomputed_tokens"] == 2
    for branch in (queued, later):
        assert same_bits(done[branch.id], first) and set(done[branch.id].weight_version.tolist()) == {1}
    for sequence in (trunk, queued, later):
        engine.release(sequence)


def test_a_branch_whose_blocks_were_taken_computes_them_again(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, deterministic=True, num_blocks=10, prefix_cache=False)
    trunk = engine.add(list(range(3, 21)), SamplingParams(seed=SEED, **BASE), hold=True)
    first = finish(engine)[trunk.id]
    engine.generate([list(range(30, 56))], SamplingParams(seed=1, **BASE))
    assert engine.stats()["evicted_blocks"] > 0
    (branch,) = engine.branch(trunk, 0, [SEED])
    assert same_bits(finish(engine)[branch.id], first)
    assert engine.stats()["recomputed_tokens"] > 0
    engine.release(trunk)
    engine.release(branch)


def test_what_cannot_branch_is_refused(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model)
    trunk = engine.add([3, 4], SamplingParams(seed=SEED, **BASE), hold=True)
    with pytest.raises(ValueError, match="is WAITING and has no KV"):
        engine.branch(trunk, 0, [1])
    finish(engine)
    with pytest.raises(ValueError, match="has rounds 0 to 0, not 1"):
        engine.branch(trunk, 1, [1])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        engine.branch(trunk, 0, [1], max_tokens=0)
    engine.append(trunk, [])
    finish(engine)
    with pytest.raises(ValueError, match="goes on inside the one before"):
        engine.branch(trunk, 1, [1])
    engine.release(trunk)
    with pytest.raises(ValueError, match="is FINISHED and has no KV"):
        engine.branch(trunk, 0, [1])
    engine.sleep()
    with pytest.raises(ValueError, match="the engine sleeps"):
        engine.branch(trunk, 0, [1])
    engine.wake()


def test_a_published_block_is_copied_also_by_the_last_that_holds_it(text_model: Model, make_engine: Any) -> None:
    """The trunk's first block is full and published, of which the branch has three tokens; then the trunk lets go."""
    engine = make_engine(text_model, deterministic=True)
    trunk = engine.add([3, 4, 5], SamplingParams(seed=SEED, **BASE), hold=True)
    first = finish(engine)[trunk.id]
    (branch,) = engine.branch(trunk, 0, [SEED + 1])
    engine.release(trunk)
    other = finish(engine)[branch.id]
    assert other.token_ids[0] != first.token_ids[0]
    prompt = [3, 4, 5, *first.token_ids]
    (found,) = engine.generate([prompt], SamplingParams(seed=SEED, **BASE))
    assert engine.stats()["cached_tokens"] >= 4
    (alone,) = make_engine(text_model, deterministic=True).generate([prompt], SamplingParams(seed=SEED, **BASE))
    assert same_bits(found, alone)
    engine.release(branch)


@pytest.mark.parametrize("prompt_len", range(57, 64))
@pytest.mark.parametrize("released", [False, True], ids=["source held", "source released"])
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["published", "private"])
def test_a_branch_as_large_as_the_cache_needs_no_block_for_a_copy(
    vision_model: Model, make_engine: Any, prompt_len: int, released: bool, prefix_cache: bool
) -> None:
    """Eleven blocks, and a context of all of them: there is no twelfth to copy a block to that both have in part."""
    engine = make_engine(
        vision_model, block_size=6, num_blocks=11, max_context=66, prefix_cache=prefix_cache, deterministic=True
    )
    prompt = [3 + i % 50 for i in range(prompt_len)]
    params = SamplingParams(seed=SEED, **BASE | {"max_tokens": 66 - prompt_len})
    trunk = engine.add(prompt, params, hold=True)
    drawn = finish(engine)[trunk.id]
    (branch,) = engine.branch(trunk, 0, [SEED])
    if released:
        engine.release(trunk)
    assert same_bits(finish(engine)[branch.id], drawn)
    engine.release(branch)
    if not released:
        engine.release(trunk)
