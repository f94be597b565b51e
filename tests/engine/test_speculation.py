"""Speculation: whatever is drafted, right, wrong or half right, each sequence is bit by bit what it is without.

Under `deterministic`, where a sequence's bits do not depend on the steps that it is computed in. Without it the random
lives of test_fuzz.py, which speculate too, are compared with a recomputation within a tolerance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests import tiny
from thyme.engine import (
    Completion,
    Engine,
    EngineConfig,
    SamplingParams,
    SequenceStatus,
)
from thyme.engine.drafts import MATCHES, Drafts
from thyme.model import Model, ModelConfig, build
from thyme.repetition import RepetitionConfig

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
LOOP = RepetitionConfig()


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


def requests(seed: int, count: int, vocab_size: int) -> list[Request]:
    """Short prompts, some of them equal, much of the draws greedy."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(3, vocab_size, int(draw.integers(low, high))).tolist()

    prompts = [ids(1, 20) for _ in range(3)]
    made = []
    for _ in range(count):
        n = int(draw.choice([1, 1, 2, 4]))
        has_forced = n == 1 and draw.random() < 0.3
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

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.requests = requests
        self.rounds: dict[Key, list[Completion]] = {}
        self.texts: list[list[int]] = []
        self._keys: dict[int, Key] = {}
        self._left: dict[int, list[list[int]]] = {}

    def run(self) -> "Play":
        waiting = list(enumerate(self.requests))
        step = 0
        while waiting or self.engine.has_unfinished():
            if waiting and step % 2 == 0:
                self._add(*waiting.pop(0))
            for completion in self.engine.step():
                self._end_round(completion)
            self.engine.scheduler.check_integrity()
            self._check_blocks()
            step += 1
        return self

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


def compare(
    model: Model, processor: Any, asked: list[Request], oracle: bool, **config: Any
) -> tuple[Engine, dict[Key, list[Completion]]]:
    """Plays the requests with and without speculation; returns the engine that speculated, and what came of both."""
    sizes: dict[str, Any] = dict(
        block_size=4,
        num_blocks=200,
        max_sequences=12,
        max_batch_tokens=64,
        max_context=90,
        speculation_batch=16,
        quiet=True,
    )
    sizes |= {"deterministic": True} | {name: value for name, value in config.items() if name != "speculation"}
    engines = [
        Engine(model, EngineConfig(speculation=how, **sizes), processor=processor, repetition=LOOP)
        for how in ("off", config.get("speculation", "all"))
    ]
    plain = Play(engines[0], asked).run()
    if oracle:
        assert engines[1].speculation is not None
        engines[1].speculation.drafts = Oracle(plain.texts, processor.vocab_size)
    drafted = Play(engines[1], asked).run()
    assert drafted.rounds.keys() == plain.rounds.keys()
    for key, expected in plain.rounds.items():
        assert_same(drafted.rounds[key], expected)
    return engines[1], plain.rounds


WAYS: list[dict[str, Any]] = [
    dict(),
    dict(speculation="greedy"),
    dict(num_blocks=26),  # preempts
    dict(num_blocks=26, prefix_cache=False, block_size=4, draft_tokens=3),
    dict(max_sequences=5, max_batch_tokens=9, block_size=1, num_blocks=100),
    dict(decode_graphs=True, speculation="greedy", speculation_batch=8),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(f"{k}={v}" for k, v in way.items()) or "all")
def test_random_work_has_the_bits_of_none(model: Model, fragments: Any, way: dict[str, Any]) -> None:
    asked = requests(1, 12, fragments.vocab_size)
    engine, _ = compare(model, fragments, asked, oracle=True, **way)
    stats = engine.stats()
    assert stats["accepted_tokens"] > 50
    assert stats["drafted_tokens"] - stats["accepted_tokens"] > 50
    assert (stats["preemptions"] > 0) == (way.get("num_blocks") == 26)
    if engine.runner.graphs is not None:
        assert engine.runner.graphs.replayed > 5
