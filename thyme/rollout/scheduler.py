"""Which rollouts of a run are open, what runs where, and when results are admitted.

A run has questions still waiting, flights (rollouts that have begun), and code out in the sandbox.

Order. Results are admitted as they come. Under a deterministic engine they are admitted in the order their code ended,
each a fixed number of engine steps after that, so that every step sees the same sequences in every run.

Exits. However a run is left (done, exception, KeyboardInterrupt, closed iterator), its sequences are aborted, what runs
in its sessions is killed, and the thread of its executor has ended.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from thyme.engine import Completion, Engine, Prompt
from thyme.engine import Sequence as EngineSequence
from thyme.engine.tags import TokenKind
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.events import Answer, CodeBlock, CodeResult, End, Event, TextPiece
from thyme.rollout.executor import Executor
from thyme.rollout.flight import Flight
from thyme.rollout.pictures_ahead import PicturesAhead
from thyme.rollout.prompts import build_prompt
from thyme.rollout.replay import replay
from thyme.rollout.sampling import Sampling
from thyme.rollout.text_stream import TextStream
from thyme.rollout.trajectory import COLUMNS, Trajectory
from thyme.rollout.types import Question, Rollout, RolloutStatus
from thyme.sandbox import Sandbox

_AHEAD = 8
"""Questions whose pictures are prepared before they are asked: as float32 patches the largest take 200 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTiming:
    """What one run cost."""

    wall_s: float
    """From the first question to the last answer."""
    idle_s: float
    """Seconds of it in which nothing was left to decode: every open rollout waited for the sandbox."""
    sandbox_s: float
    """Seconds code ran, summed over code blocks (they overlap)."""
    steps: int
    """Engine steps."""
    code_blocks: int
    """Code blocks run."""
    prefilled_tokens: int
    """Tokens the engine prefilled: prompts once per group, sandbox outputs, and what preemption recomputed."""
    sampled_tokens: int
    """Tokens drawn."""
    restarted: int
    """Interrupted rollouts that start over, as their code gave something else when it was run again."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rollouts `first .. first + count` of one question, started together."""

    question: Question
    group: int
    first: int
    count: int
    seed: int
    begun: Rollout | None = None
    """What this one rollout was when it was interrupted, after a code block."""


class RolloutScheduler:
    """Drives the rollouts of each question to their ends.

    Args:
        engine: decodes; nothing else may use it meanwhile.
        sandbox: runs code, in a session per rollout.
        processor: of the engine's model.
        config: limits and prompt style.
        questions: what is asked; a question may occur twice.
        sampling: how many rollouts each gets and how they are drawn.
        kept: of those, what was sampled before, by question id and seed; each is an End at once.
        begun: those that were interrupted, as they were after their last code block. They go on: their tokens are
            prefilled and their code is run again.
        on_round: is given each rollout as it is when the output of a code block has been appended.
        streaming: also yield the text as it is decoded.
    """

    def __init__(
        self,
        engine: Engine,
        sandbox: Sandbox,
        processor: Processor,
        config: RolloutConfig,
        questions: Sequence[Question],
        sampling: Sampling,
        *,
        kept: Mapping[tuple[str, int], Rollout],
        begun: Mapping[tuple[str, int], Rollout],
        on_round: Callable[[Rollout], object] | None,
        streaming: bool,
    ) -> None:
        self.engine, self.processor, self.config = engine, processor, config
        self.params = sampling.engine_params(processor, min(config.max_tokens_per_round, config.max_tokens))
        self.max_rounds = config.max_rounds if sampling.allow_code else 0
        self.streaming = streaming
        self.deterministic = engine.config.deterministic
        # Never more rollouts than sessions: nobody then waits for a session that only its own progress could free.
        sessions = sandbox.config.max_sessions
        self.limit = min(config.max_in_flight or sessions, sessions)
        self.on_round = on_round
        largest = min(self.limit, engine.config.max_sequences)
        self.kept, self.waiting = _pieces(questions, sampling, largest, kept, begun)
        self.flights: dict[int, Flight] = {}
        self.outstanding: deque[Flight] = deque()  # in the order their code ended
        self.executor = Executor(sandbox, processor, config, show_results=sampling.show_results)
        self.pictures = PicturesAhead(processor)
        self.closing: list[Future[None]] = []
        self.counts: Counter[str] = Counter()
        self.sandbox_s = self.idle_s = 0.0
        self.prefilled_before = int(engine.stats()["prefilled_tokens"])
        self.started = time.perf_counter()
        self.wall_s = 0.0

    def events(self) -> Generator[Event, None, None]:
        """Everything that happens; an End per rollout."""
        yield from map(End, self.kept)
        with self.executor:
            try:
                while self.waiting or self.flights:
                    self._start_waiting()
                    for flight in self._arrived():
                        yield from self._resume(flight)
                    if len(self.flights) > len(self.outstanding):
                        self.counts["steps"] += 1
                        for completion in self.engine.step():
                            yield from self._end_round(self.flights[completion.sequence.id], completion)
                        yield from self._stream_text()
                for closed in self.closing:
                    closed.result()  # raises what went wrong while closing, if anything
            finally:
                for flight in self.flights.values():
                    self.engine.abort(flight.sequence)
                self.pictures.close()
                self.wall_s = time.perf_counter() - self.started

    def timing(self) -> RunTiming:
        """What the run cost so far."""
        return RunTiming(
            wall_s=self.wall_s,
            idle_s=self.idle_s,
            sandbox_s=self.sandbox_s,
            steps=self.counts["steps"],
            code_blocks=self.counts["code_blocks"],
            prefilled_tokens=int(self.engine.stats()["prefilled_tokens"]) - self.prefilled_before,
            sampled_tokens=self.counts["sampled_tokens"],
            restarted=self.counts["restarted"],
        )

    # From a question to sequences, and from one round to the next.

    def _start_waiting(self) -> None:
        reopened: dict[int, tuple[_Piece, Rollout]] = {}
        self.pictures.want(piece.question for piece in islice(self.waiting, _AHEAD) if piece.begun is None)
        while self.waiting and len(self.flights) + self.waiting[0].count <= self.limit:
            if self.waiting[0].begun is None and not self.pictures.is_ready(self.waiting[0].question):
                decoding = len(self.flights) > len(self.outstanding)
                if decoding and not self.deterministic:
                    break  # its pictures are ready after some step
            piece = self.waiting.popleft()
            if piece.begun is not None:
                for _, picture in piece.question.pictures:
                    picture.load()
                reopened[self._reopen(piece, piece.begun)] = piece, piece.begun
                continue
            prompt = build_prompt(piece.question, self.config.prompt_style, self.processor)
            prompt = Prompt(prompt.token_ids, self.pictures.take(piece.question))
            self.pictures.want(piece.question for piece in islice(self.waiting, _AHEAD) if piece.begun is None)
            params = replace(self.params, n=piece.count, seed=piece.seed)
            for i, sequence in enumerate(self.engine.add_group(prompt, params, hold=True)):
                flight = Flight(
                    question=piece.question,
                    group=piece.group,
                    index=piece.first + i,
                    seed=piece.seed + i,
                    sequence=sequence,
                    trajectory=Trajectory(self.processor.image_token_id),
                    stream=self._new_stream(sequence),
                )
                flight.trajectory.add_given(sequence.token_ids, TokenKind.PROMPT, round_index=0)
                self.flights[sequence.id] = flight
        if reopened:
            self._replay(reopened)

    def _reopen(self, piece: _Piece, begun: Rollout) -> int:
        """Has a rollout go on after its last code block; returns the number of its sequence."""
        flight = Flight(
            question=piece.question,
            group=piece.group,
            index=piece.first,
            seed=piece.seed,
            sequence=self.engine.add(
                Prompt(begun.token_ids.tolist(), tuple(begun.images)),
                replace(self.params, seed=piece.seed, max_tokens=self._budget(int(begun.sampled.sum()))),
                hold=True,
                written=[begun.token_ids[begun.sampled & (begun.rounds == n)] for n in range(len(begun.turns))],
            ),
            trajectory=Trajectory(self.processor.image_token_id),
            stream=None,
            turns=list(begun.turns),
            num_sampled=int(begun.sampled.sum()),
        )
        flight.trajectory.add_columns({name: getattr(begun, name) for name in COLUMNS})
        self.flights[flight.sequence.id] = flight
        return flight.sequence.id

    def _replay(self, reopened: Mapping[int, tuple[_Piece, Rollout]]) -> None:
        """Brings the sessions of reopened rollouts to where they were; those where that fails start over."""
        for number in replay(self.executor, {n: (piece.question, begun) for n, (piece, begun) in reopened.items()}):
            self.engine.abort(self.flights.pop(number).sequence)
            self.closing.append(self.executor.end(number))
            self.waiting.appendleft(replace(reopened[number][0], begun=None))
            self.counts["restarted"] += 1
            self._start_waiting()

    def _budget(self, num_sampled: int) -> int:
        """Tokens that a rollout may sample in its next round."""
        return min(self.config.max_tokens_per_round, self.config.max_tokens - num_sampled)

    def _end_round(self, flight: Flight, completion: Completion) -> Iterator[Event]:
        self.counts["sampled_tokens"] += len(completion.token_ids)
        is_text = np.asarray(completion.kinds) != TokenKind.END
        text = self.processor.decode(np.asarray(completion.token_ids)[is_text].tolist())
        ended = flight.end_round(completion, text, self.max_rounds)
        if ended is None:
            flight.due_step = self.counts["steps"] + self.config.result_delay_steps
            flight.future = self.executor.run(flight.sequence.id, flight.question, flight.seed, flight.code)
            self.outstanding.append(flight)
            self.counts["code_blocks"] += 1
        if flight.stream is not None:
            unclosed = ended is not None and not flight.is_answered
            if shown := flight.stream.end(text, with_unclosed=unclosed):
                yield TextPiece(shown)
        if ended is None:
            yield CodeBlock(flight.code)
        else:
            yield from self._finish(flight, ended)

    def _resume(self, flight: Flight) -> Iterator[Event]:
        assert flight.future is not None
        result, output = flight.future.result()
        flight.future = None
        self.sandbox_s += result.wall_s
        yield CodeResult(result, output.text)
        if ended := flight.end_code(result, output, self.config, self.engine.max_context):
            yield from self._finish(flight, ended)
            return
        budget = self._budget(flight.num_sampled)
        self.engine.append(flight.sequence, output.token_ids, images=output.images, max_tokens=budget)
        if self.on_round is not None:
            self.on_round(replace(flight.finished(RolloutStatus.ABORTED), turns=list(flight.turns)))
        flight.stream = self._new_stream(flight.sequence)

    def _finish(self, flight: Flight, status: RolloutStatus) -> Iterator[Event]:
        rollout = flight.finished(status)
        self.engine.release(flight.sequence)
        del self.flights[flight.sequence.id]
        self.closing.append(self.executor.end(flight.sequence.id))
        if rollout.answer is not None:
            yield Answer(rollout.answer)
        yield End(rollout)

    # Text as it is decoded.

    def _new_stream(self, sequence: EngineSequence) -> TextStream | None:
        return TextStream(self.processor.decode, len(sequence)) if self.streaming else None

    def _stream_text(self) -> Iterator[Event]:
        for flight in self.flights.values():
            if (
                flight.stream is not None
                and flight.future is None
                and (shown := flight.stream.push(flight.sequence.token_ids))
            ):
                yield TextPiece(shown)

    # Results, as they come.

    def _arrived(self) -> Iterator[Flight]:
        """The rollouts whose results are to be admitted now; waits if nothing else is left to do."""
        while self.outstanding:
            idle = len(self.flights) == len(self.outstanding)
            if self.deterministic:
                if not idle and self.outstanding[0].due_step > self.counts["steps"]:
                    return
                flight = self.outstanding[0]
                self._wait([flight], idle=idle)
            else:
                if idle:
                    self._wait(self.outstanding, idle=True)
                ready = (f for f in self.outstanding if f.future is not None and f.future.done())
                first = next(ready, None)
                if first is None:
                    return
                flight = first
            self.outstanding.remove(flight)
            yield flight

    def _wait(self, flights: Sequence[Flight], *, idle: bool) -> None:
        before = time.perf_counter()
        wait([f.future for f in flights if f.future is not None], return_when=FIRST_COMPLETED)
        if idle:
            self.idle_s += time.perf_counter() - before


def _pieces(
    questions: Sequence[Question],
    sampling: Sampling,
    largest: int,
    kept: Mapping[tuple[str, int], Rollout],
    begun: Mapping[tuple[str, int], Rollout],
) -> tuple[list[Rollout], deque[_Piece]]:
    """What is kept, each in its group, and the rest in pieces: what was begun one by one, the others as neighbours."""
    found: list[Rollout] = []
    pieces: deque[_Piece] = deque()
    seen: Counter[str] = Counter()
    for group, question in enumerate(questions):
        # From the id, not the place in the batch; a question asked twice gets other draws the second time.
        name = f"{sampling.seed}/{question.id}/{seen[question.id]}"
        seen[question.id] += 1
        base = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        first = 0
        for index in range(sampling.n):
            key = question.id, base + index
            is_new = key not in kept and key not in begun
            if key in kept:
                found.append(replace(kept[key], question=question, group=group))
            elif key in begun:
                pieces.append(_Piece(question, group, index, 1, base + index, begun[key]))
            if not is_new or index + 1 == sampling.n or index + 1 - first == largest:
                count = index - first + is_new
                if count:
                    pieces.append(_Piece(question, group, first, count, base + first))
                first = index + 1
    return found, pieces
