"""KV in host memory: what sequences that do not run have lost comes back bit by bit instead of being computed again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from thyme.engine import Completion, Engine, EngineConfig, Prompt, SamplingParams, Sequence
from thyme.model import Model

ROOM = 1 << 20
SAMPLED = SamplingParams(max_tokens=40, seed=1, banned_ids=(), ignore_eos=True, repetition=None)


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, length).tolist()


def finish(engine: Engine) -> list[Completion]:
    done = []
    while engine.has_unfinished():
        done += engine.step()
        engine.scheduler.check_integrity()
    return done


def same_bits(one: Completion, other: Completion) -> bool:
    records = ("logprobs", "logprobs_raw", "entropies", "temperatures", "kept_mass")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in records)
    return one.token_ids == other.token_ids and equal


def tight(engine: Engine) -> list[Completion]:
    """Six sequences of at most 105 tokens, of which 160 fit at once."""
    engine.scheduler.host.tradeoff = None  # copy whatever there is
    for i in range(6):
        engine.add(ids(50 + i, i), replace(SAMPLED, max_tokens=50))
    return sorted(finish(engine), key=lambda completion: completion.sequence.id)


def test_preempted_siblings_compute_nothing_again(text_model: Model, make_engine: Any) -> None:
    """617 tokens without host memory."""
    engine = make_engine(text_model, block_size=16, num_blocks=40, host_kv_bytes=ROOM)
    engine.add_group(ids(105, 1), replace(SAMPLED, max_tokens=100, n=16))
    finish(engine)
    stats = engine.stats()
    assert stats["preemptions"] > 0 and stats["restored_tokens"] == 16 * stats["evicted_blocks"] > 0
    assert stats["prefilled_tokens"] == stats["unique_tokens"] == 105
    assert stats["host_blocks_out"] == stats["host_blocks_in"] == stats["evicted_blocks"]


def test_siblings_that_wait_share_one_copy_of_what_they_had_in_common(text_model: Model, make_engine: Any) -> None:
    """Their prompt is taken while all of them are between two rounds; the first that goes on is not the last it was
    taken from."""
    engine = make_engine(text_model, block_size=4, num_blocks=30, host_kv_bytes=ROOM, deterministic=True)
    group = engine.add_group(ids(41, 1), replace(SAMPLED, max_tokens=3, n=4), hold=True)
    finish(engine)
    engine.generate([ids(100, 2)], replace(SAMPLED, max_tokens=18))  # all blocks
    assert all(engine.table.num_blocks[sequence.row] == 0 for sequence in group)
    assert engine.stats()["host_blocks"] == 10 + 4  # the prompt's ten, and each one's own
    prefilled = engine.stats()["prefilled_tokens"]
    for sequence in group:
        engine.append(sequence, [5, 6], max_tokens=4)
    finish(engine)
    stats = engine.stats()
    assert stats["prefilled_tokens"] - prefilled == 4 * 2
    assert (stats["host_blocks"], stats["host_blocks_dropped"], stats["recomputed_tokens"]) == (0, 0, 0)
    for sequence in group:
        alone = replace(sequence.params, max_tokens=4)
        whole = make_engine(text_model, deterministic=True).generate([sequence.token_ids[:-4]], alone)[0]
        assert sequence.token_ids[-4:] == whole.token_ids
        engine.release(sequence)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"prefill_chunk": 5},
        {"kv_dtype": "fp8"},
        {"speculation": "all"},
        {"decode_graphs": True},
        {"host_kv_bytes": 2 * 1536},
        {"pin_seconds": 0.0},
    ],
    ids=str,
)
def test_tokens_and_log_probs_have_the_bits_they_have_without(
    text_model: Model, make_engine: Any, options: dict[str, Any]
) -> None:
    config = {"num_blocks": 40, "host_kv_bytes": ROOM, "deterministic": True} | options
    engine = make_engine(text_model, **config)
    found = tight(engine)
    assert engine.stats()["preemptions"] > 0 and engine.stats()["host_blocks_in"] > 0
    expected = tight(make_engine(text_model, **(config | {"host_kv_bytes": 0})))
    assert all(map(same_bits, found, expected))
    stats = engine.stats()
    assert stats["host_blocks"] == stats["host_kv_bytes"] == 0
    assert (stats["host_blocks_dropped"] > 0) == (config["host_kv_bytes"] < ROOM)
    assert (stats["recomputed_tokens"] == 0) == (config["host_kv_bytes"] == ROOM)


def held(engine: Engine, prompt: Any = None) -> Sequence:
    """Between two rounds, all of its KV in host memory."""
    sequence = engine.add(ids(30, 1) if prompt is None else prompt, replace(SAMPLED, max_tokens=7), hold=True)
    finish(engine)
    fills_the_cache(engine)
    assert engine.table.num_blocks[sequence.row] == 0
    return sequence


def fills_the_cache(engine: Engine) -> None:
    engine.generate([ids(100, 2)], replace(SAMPLED, max_tokens=4 * engine.blocks.num_blocks - 102))


def test_a_picture_comes_back_without_being_encoded_again(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    image = make_image(4, 6, 1)
    prompt = Prompt([*ids(9, 1), *shown(image), *ids(4, 2)], (image,))
    config = dict(num_blocks=30, deterministic=True, image_cache_bytes=0)
    engine = make_engine(vision_model, host_kv_bytes=ROOM, **config)
    sequence = held(engine, prompt)
    engine.append(sequence, ids(6, 3), max_tokens=5)
    done = finish(engine)[0]
    assert engine.stats()["images_encoded"] == 1 and engine.stats()["recomputed_tokens"] == 0
    engine.release(sequence)
    other = make_engine(vision_model, **config)
    sequence = held(other, prompt)
    other.append(sequence, ids(6, 3), max_tokens=5)
    assert same_bits(done, finish(other)[0])
    assert other.stats()["recomputed_tokens"] > 0
    other.release(sequence)


def test_a_branch_has_what_its_source_has(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM, deterministic=True)
    source = held(engine)
    engine.append(source, ids(5, 3), max_tokens=6)
    finish(engine)
    fills_the_cache(engine)
    prefilled = engine.stats()["prefilled_tokens"]
    branches = engine.branch(source, 0, [1, 9]) + engine.branch(source, 1, [3], max_tokens=4)
    done = {completion.sequence.id: completion for completion in finish(engine)}
    assert engine.stats()["prefilled_tokens"] == prefilled
    for branch in branches:
        drawn = done[branch.id]
        start = len(branch) - len(drawn.token_ids)
        params = replace(branch.params, max_tokens=len(drawn.token_ids))
        whole = make_engine(text_model, deterministic=True).generate([branch.token_ids[:start]], params)[0]
        assert same_bits(drawn, whole)
        engine.release(branch)
    assert engine.stats()["host_blocks"] > 0  # the source's
    engine.release(source)
    assert engine.stats()["host_blocks"] == 0


def test_what_the_prefix_cache_finds_is_not_copied(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, num_blocks=60, host_kv_bytes=ROOM, pin_seconds=0.0)
    sequence = engine.add(ids(30, 1), replace(SAMPLED, max_tokens=3), hold=True)
    finish(engine)
    engine.generate([ids(4, 2)], replace(SAMPLED, max_tokens=2))
    stats = engine.stats()
    assert (stats["expired_pins"], stats["idle_blocks"], stats["host_blocks"]) == (1, 0, 0)  # 32 tokens: none is open
    engine.append(sequence, [5], max_tokens=2)
    finish(engine)
    assert engine.stats()["recomputed_tokens"] == engine.stats()["host_blocks_out"] == 0
    engine.release(sequence)


def changed(engine: Engine) -> None:
    engine.weights_updated()


def aborted(engine: Engine) -> None:
    for sequence in filter(None, list(engine.table.sequences)):
        engine.abort(sequence)


def broken(engine: Engine) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("planted")

    forward = engine.runner._forward
    engine.runner._forward = fails  # type: ignore[method-assign, assignment]
    sequence = engine.add([3], SAMPLED)
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    engine.runner._forward = forward  # type: ignore[method-assign]
    engine.abort(sequence)


@pytest.mark.parametrize("event", [changed, aborted, broken])
def test_what_is_stale_or_wanted_by_nobody_is_given_up(text_model: Model, make_engine: Any, event: Any) -> None:
    engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM)
    sequence = held(engine)
    assert engine.stats()["host_kv_bytes"] == 9 * engine.runner.block_bytes
    event(engine)
    engine.scheduler.check_integrity()
    assert engine.stats()["host_blocks"] == 0
    if sequence.row is not None:
        engine.append(sequence, [5], max_tokens=3)
        finish(engine)
        assert engine.stats()["restored_tokens"] == 0 and engine.stats()["recomputed_tokens"] == 36
        engine.release(sequence)


def test_tokens_drawn_under_new_weights_never_follow_on_kv_of_old_ones(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM)
    sequence = engine.add(ids(30, 1), replace(SAMPLED, max_tokens=7), hold=True)
    finish(engine)
    engine.weights_updated()  # what it has stays, and is computed anew once it is taken
    fills_the_cache(engine)
    assert engine.stats()["host_blocks_out"] == 0
    engine.append(sequence, [5], max_tokens=3)
    finish(engine)
    fills_the_cache(engine)
    assert engine.stats()["host_blocks_out"] == engine.stats()["host_blocks"] == 10
    engine.release(sequence)


@pytest.mark.parametrize("step_first", [False, True])
def test_host_memory_outlasts_sleep(text_model: Model, make_engine: Any, step_first: bool) -> None:
    """But for what was to be copied with the next step, which the cache no longer has."""
    engine: Engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM, deterministic=True, pin_seconds=5.0)
    now = [0.0]
    engine.scheduler.parking.clock, engine.scheduler.host.tradeoff = lambda: now[0], None
    sequence = held(engine)
    other = engine.add(ids(30, 4), replace(SAMPLED, max_tokens=4), hold=True)
    finish(engine)
    now[0] = 9.0
    assert engine.scheduler.schedule() is None  # a pin expires: its open block is to be copied
    assert engine.stats()["host_blocks"] == 10
    if step_first:
        engine.generate([[3]], replace(SAMPLED, max_tokens=1))
    engine.pause()
    with engine.asleep():
        assert engine.stats()["host_blocks"] == 9 + step_first
    engine.runner.kv_cache.fill_(torch.nan)
    engine.resume()
    for each in (sequence, other):
        engine.append(each, [5], max_tokens=4)
    finish(engine)
    assert engine.stats()["restored_tokens"] == 36 + step_first
    for each in (sequence, other):
        alone = replace(SAMPLED, max_tokens=4)
        whole = make_engine(text_model, deterministic=True).generate([each.token_ids[:-4]], alone)[0]
        assert each.token_ids[-4:] == whole.token_ids
        engine.release(each)


def test_what_costs_less_to_compute_is_not_copied(text_model: Model, make_engine: Any) -> None:
    engine: Engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM)
    host = engine.scheduler.host
    tradeoff = host.tradeoff
    assert tradeoff is not None and tradeoff.copies(0, 4) and not replace(tradeoff, bytes_per_s=1.0).copies(0, 4)
    # What comes late in a sequence takes longer to compute, and not longer to copy: the first five blocks stay out.
    rate = 2 * tradeoff.block_bytes * tradeoff.flops_per_s
    seconds = 4 * tradeoff.token_flops + (4 * 18 + 10) * tradeoff.pair_flops
    host.tradeoff = replace(tradeoff, bytes_per_s=rate / seconds)
    sequence = held(engine)
    assert engine.stats()["host_blocks"] == 9 - 5
    engine.append(sequence, [5], max_tokens=3)
    finish(engine)
    assert engine.stats()["recomputed_tokens"] == 20 and engine.stats()["restored_tokens"] == 16
    engine.release(sequence)


def test_room_for_less_than_a_block_is_an_error(text_model: Model) -> None:
    with pytest.raises(ValueError, match=r"host_kv_bytes \(100\) has no room for a block of 1536 bytes: raise it"):
        Engine(text_model, EngineConfig(block_size=4, num_blocks=30, host_kv_bytes=100, quiet=True))
    with pytest.raises(ValueError, match="host_kv_bytes must be at least 0"):
        EngineConfig(host_kv_bytes=-1)


def test_a_prompt_that_came_back_whole_leads_nobody(text_model: Model, make_engine: Any) -> None:
    """A branch that only has to draw is admitted before a group with its prompt, which has no one else to follow."""
    engine = make_engine(text_model, num_blocks=30, host_kv_bytes=ROOM, deterministic=True)
    sequence = held(engine)
    branch = engine.branch(sequence, 0, [7])[0]
    group = engine.add_group(ids(30, 1), replace(SAMPLED, max_tokens=7, n=3))
    done = finish(engine)
    assert {one.sequence.id for one in done} == {one.id for one in (branch, *group)}
    alone = make_engine(text_model, deterministic=True).generate([ids(30, 1)], replace(SAMPLED, max_tokens=7, n=3))
    assert [one.token_ids for one in done if one.sequence in group] == [one.token_ids for one in alone]
    for one in (sequence, branch):
        engine.release(one)
