"""One run of the rollout loop: questions still waiting, rollouts in flight, code out in the sandbox.

Order. Results are admitted as they come. Under a deterministic engine they are admitted in the order their code ended,
each a fixed number of engine steps after that, so that every step sees the same sequences in every run.

Exits. However a run is left (done, exception, KeyboardInterrupt, closed iterator), its sequences are aborted, what runs
in its sessions is killed, and the thread of its executor has ended.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import numpy as np

from thyme.engine import Completion, Engine, Prompt
from thyme.engine import Sequence as EngineSequence
from thyme.engine.tags import TokenKind
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.events import Answer, CodeBlock, CodeResult, End, Event, TextPiece, TextStream
from thyme.rollout.executor import Executor
from thyme.rollout.output import Output
from thyme.rollout.prompts import build_prompt, extract_answer, extract_code
from thyme.rollout.sampling import Sampling
from thyme.rollout.trajectory import Trajectory
from thyme.rollout.types import Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import Sandbox, SandboxResult

CODE_START, CODE_END, ANSWER_END = "<code>", "</code>", "</answer>"


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rollouts `first .. first + count` of one question, started together."""

    question: Question
    group: int
    first: int
    count: int
    seed: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Flight:
    """One rollout on its way."""

    question: Question
    group: int
    index: int
    seed: int
    sequence: EngineSequence
    trajectory: Trajectory
    started: float
    turns: list[Turn] = field(default_factory=list)
    num_sampled: int = 0
    round_text: str = ""
    code: str = ""
    future: Future[tuple[SandboxResult, Output]] | None = None
    due_step: int = 0
    stream: TextStream = field(default_factory=TextStream)
    num_streamed: int = 0


class Run:
    """Drives the rollouts of each question to their ends.

    Args:
        sampling: how many there are and how they are drawn.
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
        self.waiting = deque(_pieces(questions, sampling, min(self.limit, engine.config.max_sequences)))
        self.flights: dict[int, _Flight] = {}
        self.outstanding: deque[_Flight] = deque()  # in the order their code ended
        self.executor = Executor(sandbox, processor, config)
        self.closing: list[Future[None]] = []
        self.counts: Counter[str] = Counter()
        self.sandbox_s = self.idle_s = 0.0
        self.prefilled_before = int(engine.stats()["prefilled_tokens"])
        self.started = time.perf_counter()
        self.wall_s = 0.0

    def events(self) -> Generator[Event, None, None]:
        """Everything that happens; an End per rollout."""
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
                        if self.streaming:
                            yield from self._stream_text()
                for closed in self.closing:
                    closed.result()  # raises what went wrong while closing, if anything
            finally:
                for flight in self.flights.values():
                    self.engine.abort(flight.sequence)
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
        )

    # From a question to sequences, and from one round to the next.

    def _start_waiting(self) -> None:
        while self.waiting and len(self.flights) + self.waiting[0].count <= self.limit:
            piece = self.waiting.popleft()
            question = piece.question
            prompt = build_prompt(question, self.config.prompt_style, self.processor)
            if question.image is not None:
                question.image.load()  # decoded once, here: the executor's thread reads it too
                prompt = Prompt(token_ids=prompt.token_ids, images=(self.processor.preprocess(question.image),))
            params = replace(self.params, n=piece.count, seed=piece.seed)
            for i, sequence in enumerate(self.engine.add_group(prompt, params, hold=True)):
                flight = _Flight(
                    question=question,
                    group=piece.group,
                    index=piece.first + i,
                    seed=piece.seed + i,
                    sequence=sequence,
                    trajectory=Trajectory(self.processor.image_token_id),
                    started=time.perf_counter(),
                    num_streamed=len(sequence.token_ids),
                )
                flight.trajectory.add_given(sequence.token_ids, TokenKind.PROMPT, round_index=0)
                self.flights[sequence.id] = flight

    def _end_round(self, flight: _Flight, completion: Completion) -> Iterator[Event]:
        flight.trajectory.add_round(completion, round_index=len(flight.turns))
        flight.num_sampled += len(completion.token_ids)
        self.counts["sampled_tokens"] += len(completion.token_ids)
        is_text = np.asarray(completion.kinds) != TokenKind.END
        text = self.processor.decode(np.asarray(completion.token_ids)[is_text].tolist())
        if completion.stop_reason == CODE_END and len(flight.turns) < self.max_rounds:
            flight.round_text = text
            flight.code = extract_code(text) or ""
            flight.due_step = self.counts["steps"] + self.config.result_delay_steps
            flight.future = self.executor.run(flight.sequence.id, flight.question, flight.seed, flight.code)
            self.outstanding.append(flight)
            self.counts["code_blocks"] += 1
            yield from self._rest_of_text(flight, text, held_back=False)
            yield CodeBlock(flight.code)
            return
        flight.turns.append(Turn(text=_cut(text), code=None, result=None, output_text="", num_images=0))
        answered = extract_answer(_text(flight.turns)) is not None
        yield from self._rest_of_text(flight, text, held_back=not answered)
        yield from self._finish(flight, _status(completion, answered))

    def _resume(self, flight: _Flight) -> Iterator[Event]:
        assert flight.future is not None
        result, output = flight.future.result()
        flight.future = None
        self.sandbox_s += result.wall_s
        yield CodeResult(result, output.text)
        left = self.config.max_tokens - flight.num_sampled
        ended = None
        if len(flight.sequence.images) + len(output.images) > self.config.max_images:
            ended = RolloutStatus.MAX_IMAGES
        elif left < 1:
            ended = RolloutStatus.LENGTH
        elif len(flight.sequence) + len(output.token_ids) >= self.engine.max_context:
            ended = RolloutStatus.CONTEXT
        flight.turns.append(
            Turn(
                text=flight.round_text,
                code=flight.code,
                result=result,
                output_text="" if ended else output.text,
                num_images=0 if ended else len(output.images),
            )
        )
        if ended:
            yield from self._finish(flight, ended)
            return
        budget = min(self.config.max_tokens_per_round, left)
        self.engine.append(flight.sequence, output.token_ids, images=output.images, max_tokens=budget)
        flight.trajectory.add_given(output.token_ids, TokenKind.SANDBOX, round_index=len(flight.turns) - 1)
        flight.stream = TextStream()
        flight.num_streamed = len(flight.sequence.token_ids)

    def _finish(self, flight: _Flight, status: RolloutStatus) -> Iterator[Event]:
        images = list(flight.sequence.images)
        self.engine.release(flight.sequence)
        del self.flights[flight.sequence.id]
        self.closing.append(self.executor.end(flight.sequence.id))
        text = _cut(_text(flight.turns))
        rollout = Rollout(
            question=flight.question,
            group=flight.group,
            index=flight.index,
            seed=flight.seed,
            **flight.trajectory.columns(),
            images=images,
            turns=flight.turns,
            text=text,
            answer=extract_answer(text),
            status=status,
            wall_s=time.perf_counter() - flight.started,
            sandbox_s=sum(turn.result.wall_s for turn in flight.turns if turn.result is not None),
        )
        if rollout.answer is not None:
            yield Answer(rollout.answer)
        yield End(rollout)

    # Results, as they come.

    def _arrived(self) -> Iterator[_Flight]:
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

    def _wait(self, flights: Sequence[_Flight], *, idle: bool) -> None:
        before = time.perf_counter()
        wait([f.future for f in flights if f.future is not None], return_when=FIRST_COMPLETED)
        if idle:
            self.idle_s += time.perf_counter() - before

    # Text as it is decoded.

    def _stream_text(self) -> Iterator[Event]:
        for flight in self.flights.values():
            if flight.future is None:
                piece = self.processor.decode(flight.sequence.token_ids[flight.num_streamed :])
                if not piece.endswith("\ufffd"):  # else half a character: wait for the rest of it
                    flight.num_streamed = len(flight.sequence.token_ids)
                    if shown := flight.stream.feed(piece):
                        yield TextPiece(shown)

    def _rest_of_text(self, flight: _Flight, text: str, *, held_back: bool) -> Iterator[Event]:
        """What was not yet shown of the round's `text`; with `held_back` also an unclosed block's beginning."""
        if self.streaming:
            shown = flight.stream.feed(text[len(flight.stream.text) :])
            if held_back:
                shown += flight.stream.rest()
            if shown:
                yield TextPiece(shown)


def _pieces(questions: Sequence[Question], sampling: Sampling, largest: int) -> Iterator[_Piece]:
    seen: Counter[str] = Counter()
    for group, question in enumerate(questions):
        # From the id, not the place in the batch; a question asked twice gets other draws the second time.
        name = f"{sampling.seed}/{question.id}/{seen[question.id]}"
        seen[question.id] += 1
        base = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        for first in range(0, sampling.n, largest):
            yield _Piece(question, group, first, min(largest, sampling.n - first), base + first)


def _text(turns: Sequence[Turn]) -> str:
    return "".join(turn.text + turn.output_text for turn in turns)


def _cut(text: str) -> str:
    end = text.find(ANSWER_END)
    return text if end < 0 else text[: end + len(ANSWER_END)]


def _status(completion: Completion, answered: bool) -> RolloutStatus:
    """Why the rollout ended with this round."""
    if completion.finish_reason == "stop":
        if completion.stop_reason == "forged":
            return RolloutStatus.FORGED
        if completion.stop_reason in (CODE_START, CODE_END):
            return RolloutStatus.MAX_ROUNDS
    by_reason = {
        "length": RolloutStatus.LENGTH,
        "context": RolloutStatus.CONTEXT,
        "repetition": RolloutStatus.REPETITION,
        "abort": RolloutStatus.ABORTED,
    }
    ended = RolloutStatus.ANSWERED if answered else RolloutStatus.EOS_WITHOUT_ANSWER
    return by_reason.get(completion.finish_reason, ended)
