"""Speculation: whatever is drafted, right, wrong or half right, each sequence is bit by bit what it is without.

Under `deterministic`, where a sequence's bits do not depend on the steps that it is computed in. Without it the random
lives of test_fuzz.py, which speculate too, are compared with a recomputation within a tolerance.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests import tiny
from tests.by_heart import by_heart
from tests.engine.test_stopping import Scripted
from thyme.engine import (
    Completion,
    Engine,
    EngineConfig,
    Phases,
    PhaseSampling,
    Prompt,
    SamplingParams,
    SequenceStatus,
    TagPair,
    TokenKind,
)
from thyme.engine.batch import Batch
from thyme.engine.drafts import MATCHES, Drafts
from thyme.engine.phases import CODE, TEXT
from thyme.engine.sequence import Sampled
from thyme.model import Model, ModelConfig, build
from thyme.repetition import RepetitionConfig
from thyme.rollout.prompts import build_prompt
from thyme.toy.scenarios import demonstrations

ARRAYS = (
    "logprobs",
    "logprobs_raw",
    "entropies",
    "temperatures",
    "kept_mass",
    "kinds",
    "phases",
    "weight_version",
)
LOOP = RepetitionConfig(copies=((512, 3),), min_tail_tokens=6, max_data_share=1.0)
PAIR = TagPair(name="pair", start=">>", end="<<")
PHASES = Phases(declared=(PAIR,), literals=True)
OWN = {"number": PhaseSampling(temperature=0.6), "pair": PhaseSampling(temperature=0.3, top_k=5)}


@pytest.fixture(scope="module")
def model(fragments: Any) -> Model:
    """As many ids as there are fragments, and three more that the tokenizer lacks."""
    text = tiny.text_config(vocab_size=fragments.vocab_size + 3)
    return build(ModelConfig(model_type="qwen2", text=text), seed=5)


@dataclass(frozen=True)
class Request:
    """A group, what is appended after each round, and the branches of each first sequence when its rounds are over."""

    prompt: list[int]
    params: SamplingParams
    appended: list[list[int]]
    forced: list[int] | None
    branches: tuple[int, ...]


def requests(seed: int, count: int, vocab_size: int, own: dict[str, PhaseSampling] | None = None) -> list[Request]:
    """Short prompts, some of them equal, much of the draws greedy; `own`: phases of half of them."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(3, vocab_size, int(draw.integers(low, high))).tolist()

    prompts = [ids(1, 20) for _ in range(3)]
    made = []
    for _ in range(count):
        n = int(draw.choice([1, 1, 2, 4]))
        has_forced = n == 1 and not own and draw.random() < 0.3
        text, code = float(draw.choice([0.0, 0.0, 0.7])), float(draw.choice([0.0, 0.5]))
        limit = {0: {}, 1: {"top_k": 7}, 2: {"min_p": 0.05, "top_p": 0.9}}[int(draw.integers(3))]
        params = SamplingParams(
            n=n,
            max_tokens=int(draw.integers(12, 40)),
            temperature=text,
            code_temperature=code,
            seed=int(draw.integers(1 << 40)),
            banned_ids=((0,), ())[int(draw.integers(2))],
            ignore_eos=bool(draw.random() < 0.5),
            stop_at_tags=bool(draw.random() < 0.4),
            stop=("x", "y\n")[: int(draw.integers(3))] if draw.random() < 0.3 else (),
            stop_token_ids=(7, 11) if draw.random() < 0.2 else (),
            repetition="default" if draw.random() < 0.5 else None,
            repetition_penalty=1.2 if draw.random() < 0.2 and not has_forced else 1.0,
            phases=own if own and draw.random() < 0.5 else {},
            **({} if has_forced else limit),
        )
        appended = [ids(1, 6) if draw.random() < 0.6 else [] for _ in range(int(draw.integers(3)))]
        prompt = prompts[int(draw.integers(3))] if draw.random() < 0.7 else ids(1, 20)
        branches = tuple(draw.integers(1 << 40, size=2).tolist()) if draw.random() < 0.3 else ()
        made.append(Request(prompt, params, appended, ids(1, 5) if has_forced else None, branches))
    return made


Key = tuple[int, int, int]  # request, sequence of its group, branches behind them


class Play:
    """Serves requests, a new one in every other step, and keeps what came of them."""

    def __init__(self, engine: Engine, requests: Sequence[Request], fails_at: Sequence[int] = ()) -> None:
        self.engine = engine
        self.fails_at = fails_at
        self.requests = requests
        self.rounds: dict[Key, list[Completion]] = {}
        self.texts: list[list[int]] = []
        self.failures = 0
        self._keys: dict[int, Key] = {}
        self._left: dict[int, list[list[int]]] = {}

    def run(self) -> "Play":
        waiting = list(enumerate(self.requests))
        step = 0
        while waiting or self.engine.has_unfinished():
            if waiting and step % 2 == 0:
                self._add(*waiting.pop(0))
            if step in self.fails_at:
                self._fail()
            for completion in self.engine.step():
                self._end_round(completion)
            self.engine.scheduler.check_integrity()
            self._check_blocks()
            step += 1
        return self

    def _fail(self) -> None:
        """The device fails while it computes a step with drafts, if there is one."""
        runner, launch = self.engine.runner, self.engine.runner.launch

        def fails(batch: Batch, bans: Any) -> Any:
            if batch.drafted is None:
                return launch(batch, bans)
            self.failures += 1
            with patch.object(runner, "_forward", side_effect=RuntimeError("planted")):
                return launch(batch, bans)

        with patch.object(runner, "launch", fails), suppress(RuntimeError):
            for completion in self.engine.step():
                self._end_round(completion)

    def _add(self, number: int, request: Request) -> None:
        how: dict[str, Any] = {"hold": True} if request.forced is None else {"hold": True, "forced": request.forced}
        add = self.engine.add_group if request.forced is None else self.engine.add
        made = add(request.prompt, request.params, **how)
        for index, sequence in enumerate(made if isinstance(made, list) else [made]):
            self._keys[sequence.id] = number, index, 0
            self._left[sequence.id] = list(request.appended)

    def _end_round(self, completion: Completion) -> None:
        sequence = completion.sequence
        key = self._keys[sequence.id]
        self.rounds.setdefault(key, []).append(completion)
        left = self._left[sequence.id]
        if left and len(sequence) + len(left[0]) < self.engine.max_context:
            self.engine.append(sequence, left.pop(0), max_tokens=15)
            return
        number, index, branch = key
        if index == 0 and branch == 0 and (seeds := self.requests[number].branches):
            for place, begun in enumerate(self.engine.branch(sequence, 0, seeds, max_tokens=12), start=1):
                self._keys[begun.id], self._left[begun.id] = (number, index, place), []
        self.texts.append(sequence.token_ids)
        self.engine.release(sequence)

    def _check_blocks(self) -> None:
        """Nobody keeps a block for what was only drafted."""
        table, blocks = self.engine.table, self.engine.blocks
        for sequence in table.sequences:
            if sequence is not None and sequence.status in (SequenceStatus.RUNNING, SequenceStatus.HELD):
                assert sequence.row is not None
                computed = int(table.num_computed[sequence.row])
                assert table.num_blocks[sequence.row] <= blocks.blocks_for(computed)


class Oracle(Drafts):
    """Drafts what was drawn before of a sequence that began alike, or what its sibling drew, or something wrong at some
    place, and goes on behind the end of a round."""

    def __init__(self, texts: Iterable[list[int]], vocab_size: int, seed: int = 0, mistakes: float = 0.2) -> None:
        super().__init__(1 << 20)
        self.texts = list(texts)
        self.vocab_size = vocab_size
        self.mistakes = mistakes
        self.draw = np.random.default_rng(seed)
        self.known: dict[int, list[int]] = {}
        self.last = 0

    def length(self, prompt: bytes, key: int) -> int:
        return len(self.known[key]) - len(np.frombuffer(prompt, np.int32)) if key in self.known else 0

    def grow(self, prompt: bytes, prompt_ids: Iterable[int], key: int, token_ids: Iterable[int]) -> None:
        self.known.setdefault(key, list(prompt_ids)).extend(token_ids)
        self.last = key

    def after(self, prompt: bytes, tail: Sequence[int], most: int) -> tuple[list[int], int]:
        known = self.known[self.last]
        assert known[-len(tail) :] == list(tail)
        found = [text for text in self.texts if text[: len(known)] == known and len(text) > len(known)]
        draft: list[int] = []
        if found:
            draft = found[int(self.draw.integers(len(found)))][len(known) : len(known) + most]
        draft += self.draw.integers(3, self.vocab_size, most).tolist()
        if self.draw.random() < self.mistakes:
            draft[int(self.draw.integers(most))] = int(self.draw.integers(3, self.vocab_size))
        return draft[:most], MATCHES[0]


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        for name in ARRAYS:
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert one.repetition == other.repetition


class Watch:
    """What the steps of an engine drew by draft: how rounds ended behind one, and what was drafted where."""

    def __init__(self, engine: Engine) -> None:
        self.ends: Counter[Any] = Counter()
        self.kinds: Counter[int] = Counter()
        self.temperatures: set[float] = set()
        """At which tokens of drafts are drawn."""
        self.num_rows = 0
        """Most sequences in a step with drafts."""
        draw = engine._draw

        def drew(batch: Batch, samples: Any, sampled: Sampled) -> Any:
            ended = len(engine._ended)
            over = draw(batch, samples, sampled)
            if batch.drafted is None:
                return over
            if batch.drafted.depths[samples].any():
                self.ends.update(
                    completion.stop_reason or completion.finish_reason for completion in engine._ended[ended:]
                )
                self.kinds.update(sampled.kinds[samples].tolist())
                return over
            before = np.flatnonzero(batch.drafted.depths > 0) - 1
            self.temperatures |= set(sampled.records[3, before].tolist())
            self.num_rows = max(self.num_rows, len(set(batch.rows.tolist())))
            assert batch.num_tokens <= engine.config.max_batch_tokens
            return over

        engine._draw = drew  # type: ignore[method-assign]


SIZES: dict[str, Any] = dict(
    block_size=4,
    num_blocks=200,
    max_sequences=12,
    max_batch_tokens=64,
    max_context=90,
    speculation_batch=16,
    deterministic=True,
    quiet=True,
)


def compare(
    model: Model,
    processor: Any,
    asked: list[Request],
    *,
    phases: Phases | None = None,
    fails_at: Sequence[int] = (),
    **config: Any,
) -> tuple[Play, Watch]:
    """Plays the requests without speculation and with drafts of an oracle; returns what speculated, and what it did."""

    def engine(**more: Any) -> Engine:
        whole = EngineConfig(**SIZES | config | more)
        return Engine(model, whole, processor=processor, repetition=LOOP, phases=phases)

    plain = Play(engine(speculation="off"), asked).run()
    speculating = engine(speculation=config.get("speculation", "all"))
    assert speculating.speculation is not None
    speculating.speculation.drafts = Oracle(plain.texts, processor.vocab_size)
    watch = Watch(speculating)
    drafted = Play(speculating, asked, fails_at).run()
    assert drafted.rounds.keys() == plain.rounds.keys()
    for key, expected in plain.rounds.items():
        assert_same(drafted.rounds[key], expected)
    assert speculating.stats()["sampled_tokens"] == plain.engine.stats()["sampled_tokens"]
    return drafted, watch


WAYS: list[dict[str, Any]] = [
    dict(),
    dict(speculation="greedy"),
    dict(num_blocks=26),  # preempts
    dict(num_blocks=26, prefix_cache=False, draft_tokens=3),
    dict(max_sequences=5, max_batch_tokens=9, block_size=1, num_blocks=100),
    dict(decode_graphs=True, speculation="greedy", speculation_batch=8),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(f"{k}={v}" for k, v in way.items()) or "all")
def test_random_work_has_the_bits_of_none(model: Model, fragments: Any, way: dict[str, Any]) -> None:
    play, watch = compare(model, fragments, requests(1, 12, fragments.vocab_size), **way)
    stats = play.engine.stats()
    assert stats["accepted_tokens"] > 30
    assert stats["drafted_tokens"] - stats["accepted_tokens"] > 30
    assert (stats["preemptions"] > 0) == (way.get("num_blocks") == 26)
    assert watch.kinds[TokenKind.CODE] and watch.kinds[TokenKind.TAG]
    assert watch.temperatures == {0.0} if way.get("speculation") == "greedy" else len(watch.temperatures) > 1
    assert watch.num_rows <= way.get("speculation_batch", 16)
    graphs = play.engine.runner.graphs
    assert graphs is None or graphs.replayed > 5


def test_phases_of_ones_own(model: Model, fragments: Any) -> None:
    """A draft opens and closes declared phases, and stops at numbers only where they are not greedy."""
    asked = requests(2, 14, fragments.vocab_size, OWN)
    for how in ("all", "greedy"):
        play, _ = compare(model, fragments, asked, phases=PHASES, speculation=how)
        drawn = {int(phase) for rounds in play.rounds.values() for one in rounds for phase in one.phases}
        assert {PHASES.names.index("number"), PHASES.names.index("pair")} <= drawn
        assert play.engine.stats()["accepted_tokens"] > 30


def test_a_step_that_fails_with_drafts(model: Model, fragments: Any) -> None:
    play, _ = compare(model, fragments, requests(3, 8, fragments.vocab_size), fails_at=(3, 7, 8, 15))
    assert play.failures >= 3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 104))
def test_much_random_work(model: Model, fragments: Any, seed: int) -> None:
    for phases, own in ((None, None), (PHASES, OWN)):
        for way in WAYS:
            compare(model, fragments, requests(seed, 20, fragments.vocab_size, own), phases=phases, **way)


def drawing(model: Model, processor: Any, **config: Any) -> Engine:
    return Engine(model, EngineConfig(**SIZES | config), processor=processor, repetition=LOOP)


PROMPT = [4, 9, 17]
FREE = SamplingParams(
    max_tokens=30, temperature=0.8, seed=6, banned_ids=(0,), ignore_eos=True, stop_at_tags=False, repetition=None
)


@pytest.fixture(scope="module")
def free(model: Model, fragments: Any) -> list[int]:
    """What is drawn after the prompt where nothing ends it."""
    return drawing(model, fragments).generate(PROMPT, FREE)[0].token_ids


def first_at(free: list[int], place: int) -> int:
    """From `place` on the first whose id was not drawn before."""
    return next(i for i in range(place, len(free)) if free[i] not in free[:i])


@pytest.mark.parametrize("reason", ["stop id", "stop text", "eos", "tag", "max_tokens", "context", "repetition"])
def test_a_round_ends_inside_a_draft_as_it_does_without(
    model: Model, fragments: Any, free: list[int], reason: str
) -> None:
    """The drafts are right, and go on behind the end."""
    params, processor, config, found = FREE, fragments, {}, list(free)
    if reason == "stop id":
        params = replace(FREE, stop_token_ids=(free[first_at(free, 3)],))
    elif reason == "stop text":
        at = first_at(free, 3)
        text = fragments.tokens[free[at - 1]][-1:] + fragments.tokens[free[at]]
        params = replace(FREE, stop=(text.decode(),))
    elif reason == "eos":
        processor = replace(fragments, eos_token_ids=(free[first_at(free, 3)],))
        params = replace(FREE, ignore_eos=False)
    elif reason == "tag":
        code, end = fragments.tokens.index(b"<code>"), fragments.tokens.index(b"</code>")
        # Nothing but these may be drawn, so that a block opens and closes.
        others = tuple(i for i in range(fragments.vocab_size) if i not in (code, end, 28))
        params = replace(FREE, banned_ids=others, code_temperature=0.9)
        found = drawing(model, fragments).generate(PROMPT, params)[0].token_ids
        params = replace(params, stop_at_tags=True)
    elif reason == "max_tokens":
        params = replace(FREE, max_tokens=9)
    elif reason == "context":
        config = {"max_context": 12}
    else:
        ring = dict(zip(circle := [4, 9, 17, 8, 23, 11, 12], [*circle[1:], circle[0]], strict=True))
        model = Scripted([ring.get(token, token) for token in range(fragments.vocab_size)])
        params = replace(FREE, temperature=0.0, code_temperature=0.0)
        found = drawing(model, fragments).generate(PROMPT, params)[0].token_ids
        params = replace(params, repetition="default")
    expected = drawing(model, processor, **config).generate(PROMPT, params)
    engine = drawing(model, processor, speculation="all", **config)
    assert engine.speculation is not None
    engine.speculation.drafts = Oracle([PROMPT + found], fragments.vocab_size, mistakes=0.0)
    watch = Watch(engine)
    assert_same(engine.generate(PROMPT, params), expected)
    why = expected[0].finish_reason
    assert why.value == {"stop id": "stop", "stop text": "stop", "tag": "stop", "max_tokens": "length"}.get(
        reason, reason
    )
    assert list(watch.ends) == [expected[0].stop_reason or why]
    stats = engine.stats()
    assert stats["steps"] < len(expected[0].token_ids)
    if reason in ("stop id", "stop text", "repetition"):  # the others are foreseen
        assert stats["accepted_tokens"] < stats["drafted_tokens"]
    assert stats["blocks_used"] == 0


def test_a_round_that_ended_inside_a_draft_goes_on_where_it_was(fragments: Any) -> None:
    """A stop id ends a round in code, and the draft has left the code: the next round begins in it."""
    parts = (b"<code>", b"x", b"y", b"1", b" ", b"</code>", b"\n", "é".encode(), b"c")
    said = [fragments.tokens.index(part) for part in parts]
    script = dict(itertools.pairwise(said))
    model = Scripted([script.get(token, token) for token in range(fragments.vocab_size)])
    params = replace(FREE, temperature=0.0, code_temperature=0.0, stop_token_ids=(said[4],), max_tokens=8)
    found: list[list[Completion]] = []
    for how in ("off", "all"):
        engine = drawing(model, fragments, speculation=how)
        watch = Watch(engine)
        if engine.speculation is not None:
            engine.speculation.drafts = Oracle([[*PROMPT, *said]], fragments.vocab_size, mistakes=0.0)
        sequence = engine.add(PROMPT, params, hold=True, forced=said[:1])
        found.append(until_it_ends(engine))
        engine.append(sequence, [], max_tokens=2)
        found[-1] += until_it_ends(engine)
        engine.release(sequence)
    assert_same(found[1], found[0])
    assert watch.ends[said[4]] == 1
    assert [one.stop_reason for one in found[1]] == [said[4], None]
    assert found[1][1].phases.tolist() == [CODE, TEXT]


def until_it_ends(engine: Engine) -> list[Completion]:
    while not (done := engine.step()):
        pass
    return done


def test_drafts_from_earlier_weights(model: Model, fragments: Any) -> None:
    """An epoch drafts for the next, whose weights are others; a third one has those of the first."""
    asked = requests(4, 8, fragments.vocab_size)
    weight = model.decoder.layers[0].self_attn.qkv.weight
    before = weight.detach().clone()
    plays: list[list[Play]] = []
    accepted = []
    for how in ("off", "all"):
        engine = drawing(model, fragments, speculation=how)
        plays.append([])
        for factor in (1.0, 1.5, 1.0):
            with torch.no_grad():
                weight.copy_(factor * before)
            engine.weights_updated()
            plays[-1].append(Play(engine, asked).run())
            accepted.append(engine.stats()["accepted_tokens"])
    for plain, drafted in zip(*plays, strict=True):
        assert drafted.rounds.keys() == plain.rounds.keys()
        for key, expected in plain.rounds.items():
            assert_same(drafted.rounds[key], expected)
    first, second, third = np.diff([0, *accepted[3:]])
    assert 0 < first < second < third


def test_text_that_is_not_greedy_is_not_drafted_unless_asked_for(model: Model, fragments: Any) -> None:
    params = replace(FREE, code_temperature=0.8)
    for how, drafts in (("greedy", False), ("all", True)):
        engine = drawing(model, fragments, speculation=how)
        for _ in range(2):
            engine.generate([PROMPT, PROMPT], params)
        assert (engine.stats()["verifications"] > 0) == drafts


@pytest.mark.parametrize("forced", [None, [6, 5]], ids=["prompt", "forced"])
def test_nothing_is_drafted_before_a_round_has_begun(model: Model, fragments: Any, forced: list[int] | None) -> None:
    """The last token that is given is computed alone, in a row whose states are those of the sequence before."""
    params = replace(FREE, code_temperature=0.2, temperature=1.5, seed=3)
    prompt = [9, 8, 7, 6, 5][: None if forced is None else 3]

    def run(engine: Engine) -> list[Completion]:
        engine.add(prompt, params, forced=forced)
        done: list[Completion] = []
        while engine.has_unfinished():
            done += engine.step()
        return done

    expected = run(drawing(model, fragments))
    engine = drawing(model, fragments, speculation="all", prefix_cache=False, prefill_chunk=4)
    for _ in range(2):
        assert engine.speculation is not None
        engine.speculation.drafts = Oracle([prompt + expected[0].token_ids], fragments.vocab_size, mistakes=0.0)
        engine.table.states[:] = engine.automaton.walk(np.array([fragments.tokens.index(b"<code>")]))[2]
        assert_same(run(engine), expected)


def test_the_table_may_grow_in_the_step_of_a_draft(model: Model, fragments: Any) -> None:
    """A fork takes a row that is not there yet: all rows move."""
    params = replace(FREE, seed=3, max_tokens=30, repetition=None)
    expected = drawing(model, fragments).generate([PROMPT], params)
    engine = drawing(model, fragments, speculation="all")
    assert engine.speculation is not None
    engine.speculation.drafts = Oracle([PROMPT + expected[0].token_ids], fragments.vocab_size, mistakes=0.0)
    table = engine.table
    while len(table._free) > 2:
        engine.add([5, 6], replace(params, max_tokens=1), hold=True)
        engine.step()
    sequence, done = engine.add(PROMPT, params), []
    engine.step()
    engine.step()
    assert len(table._free) == 1 and engine.stats()["verifications"] == 1
    num_rows = len(table.sequences)
    engine.add_group([9, 8, 7], replace(params, n=2))
    done = engine.step()
    assert len(table.sequences) > num_rows and engine.stats()["verifications"] == 2
    while engine.has_unfinished():
        done += engine.step()
    assert_same([completion for completion in done if completion.sequence is sequence], expected)


def test_many_sequences_have_no_drafts(model: Model, fragments: Any) -> None:
    engine = drawing(model, fragments, speculation="all", speculation_batch=3)
    watch = Watch(engine)
    params = replace(FREE, repetition=None)
    for count in (4, 4, 3):
        engine.generate([PROMPT] * count, [replace(params, max_tokens=10 + i) for i in range(count)])
    assert watch.num_rows == 3
    assert engine.stats()["accepted_tokens"] > 10


def test_a_sequence_drafts_from_itself_its_siblings_and_other_prompts() -> None:
    drafts = Drafts(1 << 20)
    drafts.grow(b"a", [1, 2, 3, 4, 5, 6], 1, [9])
    assert drafts.after(b"a", [2, 3, 4], 2) == ([5, 6], 3)
    assert drafts.after(b"a", [4, 3, 2], 2) == ([], 0)
    drafts.grow(b"a", (), 2, [7, 2, 3, 4, 8])
    assert drafts.after(b"a", [2, 3, 4], 9) == ([8], 3)  # the latest counts
    assert drafts.after(b"a", [3, 4, 8], 9) == ([], 0)  # nothing follows yet
    drafts.grow(b"a", (), 2, [3, 4, 8])
    assert drafts.after(b"a", [3, 4, 8], 9)[0] == [3, 4, 8]
    drafts.grow(b"a", (), 3, [0, 1, 2, 3, 4, 5, 6, 6])
    assert drafts.after(b"a", [0, 1, 2, 3, 4, 5], 1) == ([6], 6)
    assert drafts.length(b"a", 2) == 8 and drafts.length(b"a", 4) == drafts.length(b"b", 2) == 0
    assert drafts.after(b"b", [3, 4, 8], 9) == ([], 0)
    drafts.grow(b"b", [5], 4, [5])
    drafts.close(b"a", 2)
    assert drafts.after(b"b", [3, 4, 8], 9)[0] == [3, 4, 8]
    drafts.close(b"a", 3)  # one text of a prompt is enough
    assert drafts.after(b"b", [0, 1, 2, 3, 4, 5], 1)[1] == 0


def test_drafts_stay_within_their_bytes() -> None:
    draw = np.random.default_rng(0)
    drafts = Drafts(200_000)
    texts = {}
    for key in range(60):
        prompt = bytes([key])
        texts[key] = draw.integers(0, 1000, 60).tolist()
        drafts.grow(prompt, texts[key][:5], key, texts[key][5:])
        drafts.after(prompt, [1, 2, 3], 4)
        drafts.close(prompt, key)
        assert drafts.nbytes <= drafts.max_bytes
    kept = [key for key in texts if drafts.after(bytes([key]), texts[key][20:32], 2)[0] == texts[key][32:34]]
    assert 59 in kept and 0 not in kept
    drafts.grow(b"long", (), 99, draw.integers(0, 1000, 100_000).tolist())
    assert drafts.nbytes <= drafts.max_bytes and drafts.length(b"long", 99) == 0


@pytest.mark.soak
def test_the_code_of_a_toy_comes_several_tokens_a_step() -> None:
    """At the temperatures of GRPO-ATS only code is greedy: what is drafted is code alone."""
    rows = [demonstrations(0, 1, {scenario: 1.0})[0] for scenario in ("zoom", "arithmetic")]
    toy = by_heart(rows)
    assert toy.processor is not None
    prompts = []
    for row in rows:
        built = build_prompt(row.question, "short", toy.processor)
        prompts.append(Prompt(built.token_ids, tuple(picture for _, picture in row.question.pictures)))
    rounds = {}
    for how in ("off", "greedy"):
        options = SIZES | dict(num_blocks=200, block_size=16, max_context=512, max_batch_tokens=2048)
        engine = Engine(toy, EngineConfig(speculation=how, **options))
        rounds[how] = [
            completion
            for epoch in range(3)
            for prompt in prompts
            for completion in engine.generate(prompt, SamplingParams(n=4, max_tokens=72, seed=10 * epoch))
        ]
    assert_same(rounds["greedy"], rounds["off"])
    stats = engine.stats()
    per_verification = 1 + stats["accepted_tokens"] / stats["verifications"]
    print(f"{per_verification:.2f} tokens a verification, {stats}")
    assert per_verification >= 2.5
    code = sum(int((one.kinds == TokenKind.CODE).sum()) for one in rounds["off"])
    assert stats["accepted_tokens"] > code / 2


@pytest.mark.parametrize("name", ["speculation_batch", "draft_tokens", "draft_bytes"])
def test_what_is_wrong_with_the_options_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=f"EngineConfig.{name} must be at least 1, got 0"):
        EngineConfig(**{name: 0})
    with pytest.raises(ValueError, match="speculation must be off, greedy or all, got 'some'"):
        EngineConfig(speculation="some")  # type: ignore[arg-type]
