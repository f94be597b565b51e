"""Sequences between their rounds: they keep their KV while nobody needs the room, and never hold up those that run."""

from typing import Any

import numpy as np
import pytest

from thyme.engine import Engine, SamplingParams, Sequence
from thyme.model import Model

GREEDY = SamplingParams(max_tokens=7, temperature=0.0, adaptive=False, banned_ids=(), ignore_eos=True, repetition=None)


def sampled(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n, seed=1, banned_ids=(), ignore_eos=True, repetition=None)


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, length).tolist()


def finish(engine: Engine) -> int:
    """Steps to the end."""
    steps = 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
    return steps


def parked(engine: Engine, count: int, length: int = 60) -> list[Sequence]:
    sequences = [engine.add(ids(length, 100 + i), sampled(15), hold=True) for i in range(count)]
    finish(engine)
    return sequences


# 80 blocks of 16; 16 requests of 60 + 60 tokens; each parked sequence has 5 blocks.
def steps_beside(model: Model, make_engine: Any, count: int) -> int:
    engine = make_engine(model, block_size=16, num_blocks=80, max_sequences=64)
    held = parked(engine, count)
    for i in range(16):
        engine.add(ids(60, i), sampled(60))
    steps = finish(engine)
    for sequence in held:
        engine.release(sequence)
    return steps


@pytest.mark.parametrize("count", [8, 12, 15])
def test_parked_sequences_hardly_cost_a_step(text_model: Model, make_engine: Any, count: int) -> None:
    assert steps_beside(text_model, make_engine, count) <= 1.1 * steps_beside(text_model, make_engine, 0)


def test_what_was_not_needed_is_not_computed_again(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, block_size=4, num_blocks=16, prefix_cache=False)
    held = engine.add(ids(16, 1), GREEDY, hold=True)
    finish(engine)
    assert engine.stats()["idle_blocks"] == 6
    engine.add(ids(42, 2), GREEDY)  # 12 of the 16 blocks: two are taken off the end
    finish(engine)
    stats = engine.stats()
    assert (stats["evictions"], stats["evicted_blocks"], stats["parked"], stats["idle_blocks"]) == (1, 2, 1, 4)
    engine.append(held, [9])
    finish(engine)
    assert engine.stats()["recomputed_tokens"] == 22 - 16
    whole = make_engine(text_model).generate([held.token_ids[: 16 + 7 + 1]], GREEDY)[0]
    assert held.token_ids[-7:] == whole.token_ids
    engine.release(held)


def test_who_is_away_for_longest_gives_first(text_model: Model, make_engine: Any) -> None:
    now = [0.0]
    engine: Engine = make_engine(text_model, block_size=4, num_blocks=24, prefix_cache=False, pin_seconds=None)
    engine.scheduler.parking.clock = lambda: now[0]
    sequences = [engine.add(ids(16, 0), GREEDY, hold=True)]
    finish(engine)
    now[0] = 1.0  # what a pause takes, as far as is known
    engine.append(sequences[0], [5], max_tokens=1)
    finish(engine)
    for i in (1, 2):
        now[0] = 10.0 * i
        sequences.append(engine.add(ids(16, i), GREEDY, hold=True))
        finish(engine)
    now[0] = 30.0
    engine.append(sequences[1], [5], max_tokens=1)  # it is away again, for the shortest time
    finish(engine)
    engine.add(ids(48, 9), GREEDY)  # 14 blocks, of which 6 are free
    finish(engine)
    blocks = [int(engine.table.num_blocks[sequence.row]) for sequence in sequences]
    assert blocks == [0, 6, 4]
    for sequence in sequences:
        engine.release(sequence)


def test_a_pin_ends_with_its_time(text_model: Model, make_engine: Any) -> None:
    """Full blocks are then in the prefix cache, where they are found for as long as nobody needs them."""
    now = [0.0]
    engine: Engine = make_engine(text_model, block_size=4, pin_seconds=5.0)
    engine.scheduler.parking.clock = lambda: now[0]
    held = engine.add(ids(16, 1), GREEDY, hold=True)
    finish(engine)
    now[0] = 5.0
    engine.generate([ids(3, 2)], GREEDY)
    assert engine.stats()["expired_pins"] == 0
    now[0] = 5.1
    engine.generate([ids(3, 3)], GREEDY)
    stats = engine.stats()
    assert (stats["expired_pins"], stats["parked"], stats["idle"], stats["blocks_used"]) == (1, 0, 0, 0)
    engine.append(held, [5])
    finish(engine)
    assert engine.stats()["recomputed_tokens"] == 22 - 20
    engine.release(held)


def test_a_budget_bounds_what_is_kept_but_not_what_is_shared(text_model: Model, make_engine: Any) -> None:
    engine: Engine = make_engine(text_model, block_size=4, num_blocks=100, pin_bytes=4 * 1536)  # four blocks
    assert engine.runner.kv_cache.nbytes == 100 * 1536
    group = engine.add_group(ids(32, 1), sampled(2, n=4), hold=True)
    other = engine.add([*ids(32, 1), 5], sampled(30))
    finish_some = [engine.step() for _ in range(4)]
    assert sum(map(len, finish_some)) == 4  # the group is parked, the other runs on
    assert engine.stats()["parked"] == 4
    assert engine.stats()["idle_blocks"] == 4  # each the block of its own; the prompt's eight are with the running one
    assert engine.stats()["evicted_blocks"] == 0
    engine.abort(other)
    engine.add([7], sampled(1))
    finish(engine)
    assert engine.stats()["idle_blocks"] <= 4 and engine.stats()["evicted_blocks"] > 0
    for sequence in group:
        engine.append(sequence, [9])
    finish(engine)
    for sequence in group:
        engine.release(sequence)


def test_a_running_sequence_copies_the_open_block_that_a_parked_one_claims(text_model: Model, make_engine: Any) -> None:
    engine: Engine = make_engine(text_model, block_size=16, deterministic=True)
    short, long = sampled(1), sampled(9)
    parked = engine.add(ids(10, 1), short, hold=True)  # ends with the step that computes the block they share
    running = engine.add(ids(10, 1), long)
    finish(engine)
    assert engine.stats()["prefilled_tokens"] == 10
    alone = make_engine(text_model, block_size=16, deterministic=True).generate([ids(10, 1)], long)[0]
    assert running.token_ids[10:] == alone.token_ids
    engine.append(parked, [9], max_tokens=8)  # it writes into the block that it claimed
    finish(engine)
    for sequence in (running, parked):  # and the prefix cache knows which is which
        prompt = sequence.token_ids[:18]
        fresh = make_engine(text_model, block_size=16, deterministic=True).generate([prompt], GREEDY)[0]
        assert engine.generate([prompt], GREEDY)[0].token_ids == fresh.token_ids
    engine.release(parked)
