"""An engine that launches a step before it has read the one before: what it draws, down to the bits, how rounds end,
and what is left when something comes in between, are what they are without. On a CPU a launch computes at once; the
order is that of a device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from thyme.engine import Completion, Engine, FinishReason, Prompt, SamplingParams, SequenceStatus, in_flight
from thyme.engine import Sequence as EngineSequence
from thyme.engine.in_flight import InFlight
from thyme.engine.step_record import StepRecorder
from thyme.model import Model, ModelConfig, build
from thyme.repetition import RepetitionConfig

LOOPS = RepetitionConfig(max_period=4, min_tail_tokens=4, copies=((4, 2),), max_data_share=1.0)
STEADY: dict[str, Any] = dict(ignore_eos=True, stop_at_tags=False, repetition=None)
NAMES = (
    *("token_ids", "logprobs", "logprobs_raw", "entropies", "temperatures", "kept_mass", "kinds", "phases"),
    "weight_version",
)

Facts = tuple[Any, ...]


def facts(completion: Completion) -> Facts:
    """All that is known of a round, bit by bit."""
    columns = [np.asarray(getattr(completion, name)) for name in NAMES]
    why = (completion.finish_reason, completion.stop_reason, completion.repetition)
    return (*why, *((str(column.dtype), column.tobytes()) for column in columns))


@pytest.fixture(scope="module")
def tagged(fragments: Any) -> Model:
    text = tiny.text_config(vocab_size=fragments.vocab_size)
    return build(ModelConfig(model_type="qwen2", text=text, eos_token_ids=(0,)), seed=5)


@dataclass
class Play:
    """Requests through several rounds each: every round's facts, by the order of requests and rounds."""

    engine: Engine
    rounds: int
    outputs: Sequence[tuple[list[int], tuple[Any, ...]]]
    """What is appended, in turn."""
    sequences: list[EngineSequence] = field(default_factory=list)
    found: dict[int, list[Completion]] = field(default_factory=dict)

    def add(self, prompt: Any, params: SamplingParams, **how: Any) -> None:
        if how:
            self.sequences.append(self.engine.add(prompt, params, hold=True, **how))
        else:
            self.sequences += self.engine.add_group(prompt, params, hold=True)

    def step(self) -> None:
        for completion in self.engine.step():
            sequence = completion.sequence
            rounds = self.found.setdefault(sequence.id, [])
            rounds.append(completion)
            ids, shown = self.outputs[(self.sequences.index(sequence) + len(rounds)) % len(self.outputs)]
            if len(rounds) == self.rounds or len(sequence) + len(ids) >= self.engine.max_context:
                self.engine.release(sequence)
            else:
                self.engine.append(sequence, ids, shown, max_tokens=20)
        self.engine.scheduler.check_integrity()

    def finish(self) -> list[list[Facts]]:
        while self.engine.has_unfinished():
            self.step()
        return [[facts(completion) for completion in self.found[s.id]] for s in self.sequences if s.id in self.found]


def of_every_kind(play: Play, draw: np.random.Generator, most: int) -> None:
    """Loners, groups, forced tokens, greedy ones that come to repeat themselves, stop ids and stop texts."""
    kinds: list[dict[str, Any]] = [
        dict(temperature=1.5, stop_at_tags=False),
        dict(n=4, top_p=0.9),
        dict(stop_token_ids=(7, 11, 30), ignore_eos=True, stop_at_tags=False),
        dict(stop=("x", "1 "), stop_at_tags=False),
        dict(repetition_penalty=1.3),
        {**STEADY, "repetition": "default"},
        {},
    ]
    for seed in range(21):
        ids = draw.integers(3, most, int(draw.integers(1, 40))).tolist()
        temperature, code = float(draw.choice([0.0, 0.8, 1.0])), float(draw.choice([0.0, 0.5]))
        params = SamplingParams(max_tokens=45, repetition=None, temperature=temperature, code_temperature=code)
        params = replace(params, seed=seed, **kinds[seed % 7])
        if seed % 7 == 6:
            play.add(ids, params, forced=draw.integers(3, most, 9).tolist())
        play.add(ids, params)


CONFIGS: list[dict[str, Any]] = [
    {},
    dict(decode_graphs=True),
    dict(num_blocks=40, max_context=100),  # preempts
    dict(num_blocks=40, max_context=100, host_kv_bytes=1 << 20, prefill_chunk=7, max_batch_tokens=40),
    dict(prefix_cache=False, max_sequences=6),
    dict(speculation="greedy", speculation_batch=6),
    dict(kv_dtype="fp8", decode_graphs=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_round_has_the_bits_that_it_has_without(
    tagged: Model, fragments: Any, make_engine: Any, config: dict[str, Any]
) -> None:
    found, stats = [], []
    for ahead in (False, True):
        sizes = dict(deterministic=True, run_ahead=ahead, max_context=120)
        engine = make_engine(tagged, processor=fragments, repetition=LOOPS, **{**sizes, **config})
        play = Play(engine, 3, [([5, 6, 7], ()), ([], ()), ([9] * 11, ())])
        of_every_kind(play, np.random.default_rng(0), fragments.vocab_size)
        found.append(play.finish())
        stats.append(engine.stats())
    assert found[0] == found[1]
    reasons = {facts[0] for rounds in found[0] for facts in rounds}
    assert reasons == set(FinishReason) - {FinishReason.ABORT}
    assert {facts[1] for rounds in found[0] for facts in rounds} >= {"</code>", "</answer>", "forged", "x", 11}
    assert stats[0]["dropped_tokens"] == 0 < stats[1]["dropped_tokens"]
    assert stats[0]["sampled_tokens"] == stats[1]["sampled_tokens"]
    if config.get("num_blocks") == 40:
        assert stats[1]["preemptions"] > 0
    else:  # what was computed in vain is not computed "again"
        assert stats[0]["recomputed_tokens"] == stats[1]["recomputed_tokens"] == 0


def test_what_was_drawn_is_found_again_as_a_prefix(text_model: Model, make_engine: Any) -> None:
    params = SamplingParams(max_tokens=21, seed=0, banned_ids=(), **STEADY)
    found = []
    for ahead in (False, True):
        engine = make_engine(text_model, deterministic=True, run_ahead=ahead)
        (first,) = engine.generate([[5, 6, 7]], params)
        (second,) = engine.generate([[5, 6, 7, *first.token_ids]], params)
        found.append((facts(first), facts(second), engine.stats()["cached_tokens"]))
    assert found[0] == found[1] and found[0][-1] == 20


def test_pictures_in_prompts_and_between_rounds(
    vision_model: Model, make_engine: Any, make_image: Any, shown: Any
) -> None:
    images = [make_image(4, 6, 1), make_image(2, 4, 2)]
    found = []
    for ahead in (False, True):
        engine = make_engine(vision_model, deterministic=True, run_ahead=ahead, encoder_budget=6)
        play = Play(engine, 3, [([8, *shown(images[1]), 9], (images[1],)), ([4], ())])
        for seed, image in enumerate((*images, images[0])):
            params = SamplingParams(n=3, max_tokens=9, seed=seed, banned_ids=(60, 61, 62, 63), repetition=None)
            play.add(Prompt([3, *shown(image), 5], (image,)), params)
        found.append(play.finish())
    assert found[0] == found[1]


# What comes from outside while a step is under way.


def weights_change(play: Play) -> None:
    weight = play.engine.model.decoder.layers[0].self_attn.qkv.weight
    with torch.no_grad():
        weight.mul_(0.5)
    play.engine.weights_updated()


def pauses(play: Play) -> None:
    play.engine.pause()
    with pytest.raises(ValueError, match="paused"):
        play.engine.step()
    play.engine.resume()


def sleeps(play: Play) -> None:
    play.engine.pause()
    with play.engine.asleep():
        play.engine.scheduler.check_integrity()
    play.engine.runner.kv_cache.fill_(torch.nan)
    play.engine.resume()


def aborts(play: Play) -> None:
    for sequence in play.sequences[1:4]:
        completion = play.engine.abort(sequence)
        assert completion is not None and sequence.status is SequenceStatus.FINISHED
        play.found[sequence.id] = [completion]


def branches(play: Play) -> None:
    source = play.sequences[0]
    play.sequences += play.engine.branch(source, 0, [source.params.seed, 99])


def records(play: Play) -> None:
    recorder = StepRecorder(play.engine)
    for _ in range(3):
        play.step()
    recorder.close()
    assert [record.samples for record in recorder.records] == [len(play.sequences)] * 3


@pytest.mark.parametrize("happens", [weights_change, pauses, sleeps, aborts, branches, records])
@pytest.mark.parametrize("graphs", [False, True])
def test_what_comes_in_between_finds_what_it_would_find_without(
    fragments: Any, make_engine: Any, happens: Callable[[Play], None], graphs: bool
) -> None:
    found = []
    for ahead in (False, True):
        text = tiny.text_config(vocab_size=fragments.vocab_size)
        model = build(ModelConfig(model_type="qwen2", text=text, eos_token_ids=(0,)), seed=5)
        engine = make_engine(model, processor=fragments, deterministic=True, run_ahead=ahead, decode_graphs=graphs)
        play = Play(engine, 1, [([], ())])
        for seed in range(3):
            play.add([4, 5, 6 + seed], SamplingParams(n=2, max_tokens=14, seed=seed, **STEADY))
        for _ in range(5):
            play.step()
        assert len(engine._in_flight) == ahead
        happens(play)
        found.append(play.finish())
        lengths = {len(c.token_ids) for rounds in play.found.values() for c in rounds}
        assert lengths == ({5, 14} if happens is aborts else {14})
    assert found[0] == found[1] and len(found[0]) == (8 if happens is branches else 6)
    if happens is weights_change:
        assert all(np.frombuffer(rounds[0][-1][1], np.int32).tolist() == [0] * 5 + [1] * 9 for rounds in found[1])


def test_a_round_that_has_ended_unseen_is_returned_once(text_model: Model, make_engine: Any) -> None:
    engine = make_engine(text_model, run_ahead=True)
    params = SamplingParams(max_tokens=3, seed=0, banned_ids=(), **STEADY)
    first, second, third = (engine.add([5, 6, number], params, hold=number == 8) for number in (7, 8, 9))
    for _ in range(3):
        assert engine.step() == []
    engine.weights_updated()  # all three have their last token, and nobody has been told
    assert {s.status for s in (first, third)} == {SequenceStatus.FINISHED} and second.status is SequenceStatus.HELD
    assert engine.has_unfinished() and not engine.scheduler.has_unfinished
    completion = engine.abort(first)
    assert completion is not None and completion.finish_reason == "length" and len(completion.token_ids) == 3
    assert engine.abort(first) is None
    ended = engine.step()
    assert [completion.sequence for completion in ended] == [second, third]
    assert not engine.has_unfinished() and engine.step() == []
    engine.release(second)


def test_what_is_under_way_for_nobody_is_nobodys_business(
    fragments: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rounds end, by a stop, with a step behind them: it is neither waited for nor unfinished."""
    from tests.engine.test_stopping import Scripted

    one, two = (fragments.tokens.index(part) for part in (b"x", b"1"))
    script = list(range(fragments.vocab_size))
    script[one], script[two] = two, 0
    engine = make_engine(Scripted(script), processor=fragments, run_ahead=True)
    reads: list[InFlight] = []
    result = InFlight.result

    def read(step: InFlight) -> Any:
        reads.append(step)
        return result(step)

    monkeypatch.setattr(InFlight, "result", read)
    for _ in range(2):
        (completion,) = engine.generate([[one]], SamplingParams(temperature=0.0, max_tokens=9))
        assert (completion.token_ids, completion.finish_reason) == ([two, 0], "eos")
        assert not engine.has_unfinished() and not engine._in_flight
    assert len(reads) == 4 and engine.stats()["steps"] == 6 and engine.stats()["dropped_tokens"] == 2


# A step that fails.


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("place", ["_upload", "_forward", "_unpack"])
@pytest.mark.parametrize("every", [4, 5, 7])
def test_a_step_that_fails_is_computed_again(
    tagged: Model, fragments: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch, place: str, every: int
) -> None:
    """Before the device knows of it, while it computes, or when it is read, with the next one launched."""

    def fails(*_: Any) -> Any:
        raise PlantedError

    def play(ahead: bool) -> tuple[list[list[Facts]], int]:
        sizes = dict(num_blocks=80, prefill_chunk=30, max_context=60, host_kv_bytes=1 << 20)
        engine = make_engine(
            tagged, processor=fragments, repetition=LOOPS, deterministic=True, run_ahead=ahead, **sizes
        )
        play = Play(engine, 2, [([5, 6, 7], ()), ([], ())])
        of_every_kind(play, np.random.default_rng(1), fragments.vocab_size)
        failures = steps = 0
        while ahead and engine.has_unfinished():
            steps += 1
            assert steps < 3000
            with monkeypatch.context() as patch:
                if steps % every == 0:
                    patch.setattr(in_flight if place == "_unpack" else engine.runner, place, fails)
                try:
                    play.step()
                except PlantedError:
                    failures += 1
                    engine.scheduler.check_integrity()
        return play.finish(), failures

    expected, _ = play(False)
    found, failures = play(True)
    assert failures > 10 and found == expected


@pytest.mark.parametrize("also", [False, True])
def test_a_launch_that_fails_loses_nothing_of_the_step_before(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch, also: bool
) -> None:
    """What had been launched is read, its rounds are returned by the next step; `also`: reading fails too."""

    def fails(*_: Any) -> Any:
        raise PlantedError

    params = SamplingParams(max_tokens=3, seed=0, banned_ids=(), **STEADY)
    prompts = [[5, 6, 7], [8, 9]]
    expected = make_engine(text_model, deterministic=True).generate(prompts, params)
    engine = make_engine(text_model, deterministic=True, run_ahead=True)
    first = engine.add(prompts[0], params)
    for _ in range(3):
        engine.step()
    second = engine.add(prompts[1], params)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_forward", fails)
        if also:
            patch.setattr(in_flight, "_unpack", fails)
        with pytest.raises(PlantedError):
            engine.step()
    assert first.status is (SequenceStatus.WAITING if also else SequenceStatus.FINISHED)
    done = {}
    while engine.has_unfinished():
        done |= {completion.sequence.id: facts(completion) for completion in engine.step()}
    assert [done[first.id], done[second.id]] == [facts(completion) for completion in expected]


def test_a_round_that_began_behind_a_step_that_fails_begins_again(
    fragments: Any, tagged: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its stop ids watched, and in the state of its tags."""

    def fails(*_: Any) -> Any:
        raise PlantedError

    params = SamplingParams(max_tokens=9, seed=0, banned_ids=(), **STEADY)
    plain = make_engine(tagged, processor=fragments, deterministic=True)
    (drawn,) = plain.generate([[8, 9]], params)
    stops = replace(params, stop_token_ids=(drawn.token_ids[3],))
    (expected,) = plain.generate([[8, 9]], stops)
    assert expected.finish_reason == "stop"
    engine = make_engine(tagged, processor=fragments, deterministic=True, run_ahead=True)
    engine.add([5, 6, 7], params)
    engine.step()
    second = engine.add([8, 9], stops)
    with monkeypatch.context() as patch:
        patch.setattr(in_flight, "_unpack", fails)
        with pytest.raises(PlantedError):
            engine.step()
    done = {}
    while engine.has_unfinished():
        done |= {completion.sequence.id: completion for completion in engine.step()}
    assert facts(done[second.id]) == facts(expected)


def test_a_step_that_fails_under_way_does_not_stop_who_comes_in_between(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise PlantedError("under way")

    params = SamplingParams(max_tokens=6, seed=0, banned_ids=(), **STEADY)
    (expected,) = make_engine(text_model, deterministic=True).generate([[5, 6, 7]], params)
    engine = make_engine(text_model, deterministic=True, run_ahead=True)
    engine.add([5, 6, 7], params)
    other = engine.add([8, 9], params)
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(in_flight, "_unpack", fails)
        completion = engine.abort(other)
    assert completion is not None and len(completion.token_ids) == 2 and "under way" in caplog.text
    done: list[Completion] = []
    while engine.has_unfinished():
        done += engine.step()
    assert [facts(completion) for completion in done] == [facts(expected)]


# The order.


@dataclass
class Log:
    """Which step is launched and read when."""

    events: list[tuple[str, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def watch(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> "Log":
        numbers: dict[int, int] = {}
        launch, result = engine.runner.launch, InFlight.result

        @wraps(launch)
        def launched(batch: Any, bans: Any) -> InFlight:
            numbers[id(batch)] = len(numbers)
            self.events.append(("launch", numbers[id(batch)]))
            self.counts.append(len(batch.sample_rows))
            batches.append(batch)
            return launch(batch, bans)

        def read(step: InFlight) -> Any:
            self.events.append(("read", numbers[id(step.batch)]))
            return result(step)

        batches: list[Any] = []  # so that no id is used twice
        monkeypatch.setattr(engine.runner, "launch", launched)
        monkeypatch.setattr(InFlight, "result", read)
        return self


def test_each_step_is_launched_before_the_one_before_is_read(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ahead in (False, True):
        engine = make_engine(text_model, run_ahead=ahead)
        with monkeypatch.context() as patch:
            log = Log().watch(engine, patch)
            engine.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=6, seed=0, banned_ids=(), **STEADY))
        expected = [(what, number) for number in range(6) for what in ("launch", "read")]
        if ahead:
            expected = [("launch", 0)]
            for number in range(1, 6):
                expected += [("launch", number), ("read", number - 1)]
            expected.append(("read", 5))  # that all end with it is known beforehand: no step is launched in vain
        assert log.events == expected
        assert engine.stats()["dropped_tokens"] == 0


WAITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a repetition penalty": ({}, dict(repetition_penalty=1.2)),
    "guessed tokens": (dict(speculation="all", speculation_batch=4), {}),
    "no blocks for all": (dict(num_blocks=13, max_context=40), dict(max_tokens=30)),
}


@pytest.mark.parametrize("why", WAITS)
def test_a_step_that_takes_what_was_drawn_waits(
    text_model: Model, make_engine: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    config, options = WAITS[why]
    engine = make_engine(text_model, run_ahead=True, **config)
    log = Log().watch(engine, monkeypatch)
    params = SamplingParams(**dict(max_tokens=9, seed=0, banned_ids=(), **STEADY) | options)
    engine.generate([[5, 6, 7, number] for number in range(8, 11)], params)
    waited = [
        number
        for place, (what, number) in enumerate(log.events)
        if what == "launch" and number and ("read", number - 1) in log.events[:place]
    ]
    assert waited == list(range(1, len(log.counts))) if why != "no blocks for all" else 0 < len(waited) < 10


class HostReads(TorchDispatchMode):
    """Refuses reads of values of the device."""

    is_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if self.is_on and (reads or func.overloadpacket is torch.ops.aten.is_nonzero):
            raise RuntimeError(f"{func} reads a value of the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plant", [False, True])
def test_nothing_is_read_of_the_device_between_two_launches(
    tagged: Model, fragments: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch, plant: bool
) -> None:
    """In steady decode, from the first plan to the launch, forced tokens scored and pictures aside; the sampler's
    reference reads values, the kernel that a device has does not."""
    from thyme.engine import model_runner

    reads, sample = HostReads(), model_runner.sample
    engine = make_engine(tagged, processor=fragments, run_ahead=True)

    def sampled(*args: Any, **kwargs: Any) -> Any:
        reads.is_on = False
        try:
            drawn = sample(*args, **kwargs)
        finally:
            reads.is_on = True
        if plant and len(args[0]) > 3 and engine._in_flight:
            drawn.token.max().item()
        return drawn

    monkeypatch.setattr("thyme.kernels.checks.values_visible", lambda tensor: False)
    monkeypatch.setattr(model_runner, "sample", sampled)
    launch, launches = engine.runner.launch, 0

    def launched(batch: Any, bans: Any) -> InFlight:
        nonlocal launches
        launches += 1
        with reads:
            return launch(batch, bans)

    monkeypatch.setattr(engine.runner, "launch", launched)
    params = SamplingParams(n=4, max_tokens=12, seed=1, temperature=0.9, code_temperature=0.4, **STEADY)
    if plant:
        with pytest.raises(RuntimeError, match="reads a value"):
            engine.generate([[5, 6, 7]], params)
        return
    engine.generate([[5, 6, 7]], params)
    assert launches == 12


# The timeline of a device, without one.


@dataclass
class Timeline:
    """A clock that goes on by what the host does, and a device that takes its time for each step, one after the other;
    reading a step waits for its end. Milliseconds."""

    device_ms: float
    plan_ms: float
    read_ms: float
    now: float = 0.0
    free_at: float = 0.0
    ends: dict[int, float] = field(default_factory=dict)

    def watch(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        schedule, check = engine.scheduler.schedule, engine.stopping.check
        launch, result = engine.runner.launch, InFlight.result

        def scheduled(**how: Any) -> Any:
            batch = schedule(**how)
            self.now += self.plan_ms if batch is not None else 0.0
            return batch

        def launched(batch: Any, bans: Any) -> InFlight:
            step = launch(batch, bans)
            self.free_at = max(self.now, self.free_at) + self.device_ms
            self.ends[id(step.batch)] = self.free_at
            return step

        def read(step: InFlight) -> Any:
            self.now = max(self.now, self.ends.pop(id(step.batch)))
            return result(step)

        def checked(*args: Any) -> Any:
            self.now += self.read_ms
            return check(*args)

        monkeypatch.setattr(engine.scheduler, "schedule", scheduled)
        monkeypatch.setattr(engine.runner, "launch", launched)
        monkeypatch.setattr(InFlight, "result", read)
        monkeypatch.setattr(engine.stopping, "check", checked)


@pytest.mark.parametrize(("device_ms", "plan_ms", "read_ms"), [(10.0, 2.0, 3.0), (4.0, 3.0, 5.0), (0.0, 1.0, 1.0)])
def test_a_step_takes_the_longer_of_device_and_host_instead_of_both(
    text_model: Model,
    make_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    device_ms: float,
    plan_ms: float,
    read_ms: float,
) -> None:
    """Over a whole run, sequences that join and end included."""
    took = {}
    for ahead in (False, True):
        engine = make_engine(text_model, run_ahead=ahead)
        with monkeypatch.context() as patch:
            timeline = Timeline(device_ms, plan_ms, read_ms)
            timeline.watch(engine, patch)
            for seed in range(6):
                engine.add([5, 6, seed], SamplingParams(max_tokens=20 + 5 * seed, seed=seed, banned_ids=(), **STEADY))
                engine.step()
            while engine.has_unfinished():
                engine.step()
            took[ahead] = timeline.now, engine.stats()["steps"]
    (plain, steps), (ran_ahead, same) = took[False], took[True]
    assert steps == same == 50
    host = plan_ms + read_ms
    assert plain == steps * (device_ms + host)
    assert ran_ahead == pytest.approx(steps * max(device_ms, host) + min(device_ms, host), abs=host)


def test_pinned_buffers_hold_two_steps(text_model: Model, make_engine: Any) -> None:
    """Of the results that are packed into them: one is read when the next has been sent."""
    from thyme.engine.download import Download

    download = Download(torch.device("cpu"), packs=True)
    draw = torch.Generator().manual_seed(0)
    sizes = [(7, 3), (7, 900), (7, 0), (7, 2), (7, 1000)]
    sent = [torch.randint(0, 1 << 30, size, generator=draw, dtype=torch.int32) for size in sizes]
    scores = [torch.randn(3, count, generator=draw) for count in (0, 5, 2, 0, 1)]
    before = None
    for number, (ids, floats) in enumerate(zip(sent, scores, strict=True)):
        arriving = download([ids, floats])
        if before is not None:
            found = before()
            assert np.array_equal(found[0], sent[number - 1].numpy())
            assert np.array_equal(found[1], scores[number - 1].numpy()) and found[1].dtype == np.float32
        before = arriving
    assert download.copies == len(sent)
