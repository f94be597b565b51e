"""Records of engine steps: bytes and flops by hand, kinds, times, and no work where there is no recorder."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.trace_rules import assert_consistent
from thyme import trace
from thyme.engine import Engine, EngineConfig, Prompt, SamplingParams, step_record
from thyme.engine.step_cost import Ceilings, StepCost, causal_pairs
from thyme.engine.step_record import StepRecord, StepRecorder
from thyme.model import ImageInputs, Model
from thyme.trace import Trace, tracing

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True, repetition=None, seed=0)
# tests/tiny.py: two layers of 48, MLP 80, four query and two key heads of 12, 64 words, head not tied, float32.
ATTENTION_WEIGHTS = 48 * (4 + 2 * 2) * 12 + 4 * 12 * 48
MATRICES = 2 * (ATTENTION_WEIGHTS + 3 * 48 * 80)
VECTORS = 2 * ((4 + 2 * 2) * 12 + 2 * 48) + 48  # biases of q, k, v and two norms a layer; the last norm
HEAD = 64 * 48
KV_TOKEN = 2 * 2 * 2 * 12 * 4
PAIR = 4 * 2 * 4 * 12


def engine_of(model: Model, **config: Any) -> Engine:
    return Engine(model, EngineConfig(num_blocks=32, max_sequences=4, quiet=True, **config))


def test_bytes_and_flops_are_those_of_a_count_by_hand(text_model: Model) -> None:
    engine = engine_of(text_model)
    engine.add([5, 6, 7], PARAMS)
    engine.add([8, 9, 10, 11, 12], replace(PARAMS, seed=1))
    recorder = StepRecorder(engine)
    engine.step()
    engine.step()
    first, second = recorder.records
    assert (first.kind, first.tokens, first.sequences, first.samples) == ("prefill", 8, 2, 2)
    weights = 4 * (MATRICES + VECTORS + HEAD)
    assert first.bytes == weights + 8 * 48 * 4 + KV_TOKEN * (8 + 8)
    assert first.flops == 2 * MATRICES * 8 + PAIR * (1 + 2 + 3 + 1 + 2 + 3 + 4 + 5) + 2 * HEAD * 2
    assert (second.kind, second.tokens) == ("decode", 2)
    assert second.bytes == weights + 2 * 48 * 4 + KV_TOKEN * (4 + 6 + 2)
    assert second.flops == 2 * MATRICES * 2 + PAIR * (4 + 6) + 2 * HEAD * 2


def test_a_step_that_decodes_beside_a_prefill_is_mixed_and_without_draws_reads_no_head(text_model: Model) -> None:
    engine = engine_of(text_model, prefill_chunk=4, max_batch_tokens=8)
    recorder = StepRecorder(engine)
    engine.add([5, 6], PARAMS)
    engine.step()
    engine.add(list(range(5, 15)), replace(PARAMS, seed=1))
    engine.step()
    kinds = [(record.kind, record.tokens, record.samples) for record in recorder.records]
    assert kinds == [("prefill", 2, 1), ("mixed", 5, 1)]
    alone = engine_of(text_model, prefill_chunk=4)
    recorder = StepRecorder(alone)
    alone.add(list(range(5, 15)), PARAMS)
    alone.step()
    (record,) = recorder.records
    assert record.samples == 0
    assert record.flops == 2 * MATRICES * 4 + PAIR * (1 + 2 + 3 + 4)
    assert record.bytes == 4 * (MATRICES + VECTORS) + 4 * 48 * 4 + KV_TOKEN * (4 + 4)


def test_pictures_are_counted_where_they_are_encoded(vision_model: Model) -> None:
    """Two blocks of 32 over 16 patches: one in windows of 16 patches, one over the whole picture; 6 MLP rows of 48."""
    pixels = np.random.default_rng(0).standard_normal((16, 1176)).astype(np.float32)
    image = ImageInputs(pixels, (1, 4, 4), 4, "one")
    cost = StepCost(vision_model, 16)
    block = 3 * 32 * 32 + 32 * 32 + 3 * 32 * 48
    merger = 128 * 128 + 128 * 48
    flops = 2 * ((1176 * 32 + 2 * block) * 16 + merger * 4) + 4 * 32 * (16 * 16 + 16 * 16)
    assert cost.pictures([image.grid]).flops == flops
    engine = engine_of(vision_model)
    recorder = StepRecorder(engine)
    prompt = Prompt([61, *[60] * 4, 62, 5], (image,))
    engine.generate([prompt], replace(PARAMS, max_tokens=1))
    engine.generate([prompt], replace(PARAMS, max_tokens=1))
    first, again = recorder.records
    assert first.bytes - again.bytes == cost.pictures([image.grid]).bytes  # it is kept, and not encoded again
    assert first.flops - again.flops == flops


def test_shared_blocks_are_read_once_where_attention_does_so() -> None:
    counts, contexts = np.array([1, 1, 1]), np.array([36, 40, 20], dtype=np.int32)
    assert causal_pairs(counts, contexts.astype(np.int64)) == 96
    tables = np.array([[0, 1, 5, 9], [0, 1, 6, 9], [2, 3, 9, 9]], dtype=np.int32)
    batch: Any = type("Batch", (), {"block_tables": tables})
    for shares, read in ((False, 96), (True, 96 - 2 * 16)):
        cost = StepCost.__new__(StepCost)
        cost._shares, cost._block_size = shares, 16
        assert cost._keys_read(batch, contexts.astype(np.int64)) == read


def test_the_roofline_ratio_is_the_least_time_of_the_time_it_took(text_model: Model) -> None:
    engine = engine_of(text_model)
    told: list[StepRecord] = []
    recorder = StepRecorder(engine, Ceilings(1e9, 1e12), told.append, keeps=False)
    engine.generate([[5, 6, 7]], PARAMS)
    assert not recorder.records and len(told) == 4
    for record in told:
        assert record.floor_us == pytest.approx(1e6 * record.bytes / 1e9)
        assert record.of_roof == pytest.approx(record.floor_us / (record.host_us + record.device_us))
        assert record.as_dict()["of_roof"] == record.of_roof
    slow = Ceilings(1e15, 1e6).seconds(100, 2_000_000)
    assert slow == 2.0
    plain = StepRecorder(engine)
    engine.generate([[5, 6, 7]], PARAMS)
    assert {record.of_roof for record in plain.records} == {None}


def test_idle_host_and_device_are_the_time_between_two_ends(text_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 us each time it is read, by 100 between two steps, and by 50 while a record is told."""
    now = 0

    def told(_: StepRecord) -> None:
        nonlocal now
        now += 50_000

    def clock() -> int:
        nonlocal now
        now += 1_000
        return now

    monkeypatch.setattr(step_record, "perf_counter_ns", clock)
    engine = engine_of(text_model)
    engine.add([5, 6, 7], PARAMS)
    recorder = StepRecorder(engine, on_record=told)
    engine.step()
    now += 100_000
    engine.step()
    first, second = recorder.records
    # read: start, device start, device stop, end; and once more when the record is made
    assert (first.idle_us, first.host_us, first.device_us) == (0.0, 2.0, 1.0)
    assert (second.idle_us, second.host_us, second.device_us) == (101.0, 2.0, 1.0)


def test_without_a_recorder_a_step_reads_no_clock_and_makes_no_record(
    text_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> Any:
        raise AssertionError("a step that is not recorded did something for its record")

    engine = engine_of(text_model)
    recorder = StepRecorder(engine)
    recorder.close()
    monkeypatch.setattr(step_record, "perf_counter_ns", refused)
    monkeypatch.setattr(trace, "perf_counter_ns", refused)
    monkeypatch.setattr(StepCost, "of", refused)
    monkeypatch.setattr(step_record, "StepRecord", refused)
    engine.generate([[5, 6, 7]], PARAMS)
    assert not recorder.records
    recorder.open()
    with pytest.raises(AssertionError, match="not recorded"):
        engine.generate([[5, 6, 7]], PARAMS)


def test_a_step_that_fails_or_has_nothing_to_do_makes_no_record(
    text_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(text_model)
    recorder = StepRecorder(engine)
    assert engine.step() == []

    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    sequence = engine.add([5, 6], PARAMS)
    monkeypatch.setattr(engine.runner, "_forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    assert not recorder.records
    monkeypatch.undo()
    engine.abort(sequence)
    engine.generate([[5, 6]], PARAMS)
    assert len(recorder.records) == 4


def test_records_and_tokens_are_the_same_with_a_recorder_and_without(text_model: Model) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    bare = engine_of(text_model).generate(prompts, PARAMS)
    engine = engine_of(text_model)
    StepRecorder(engine, Ceilings(1e9, 1e12))
    with tracing(Trace()) as recorded:
        watched = engine.generate(prompts, PARAMS)
    assert [completion.token_ids for completion in bare] == [completion.token_ids for completion in watched]
    events = recorded.events()
    assert_consistent(events)
    names = {event["name"] for event in events}
    assert {"prefill", "decode", "decode compute", "record", "KV blocks", "sequences"} <= names
