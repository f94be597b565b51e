"""Which rollouts of a run are open, what runs where, and when results are admitted.

A run has questions still waiting, flights (rollouts that have begun), and code out in the sandbox.

Order. Results are admitted as they come. Under a deterministic engine they are admitted in the order their code ended,
each a fixed number of engine steps after that, so that every step sees the same sequences in every run.

Exits. However a run is left (done, exception, KeyboardInterrupt, closed iterator), its sequences are aborted, what runs
in its sessions is killed, and the thread of its executor has ended.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from thyme import trace
from thyme.engine import Completion, Engine, Prompt
from thyme.engine import Sequence as EngineSequence
from thyme.engine.tags import TokenKind
from thyme.model.processor import Processor
from thyme.rollout.branching import places, prefix_of
from thyme.rollout.config import RolloutConfig
from thyme.rollout.events import Answer, CodeBlock, CodeResult, End, Event, TextPiece
from thyme.rollout.executor import Diverged, Executor
from thyme.rollout.flight import Flight
from thyme.rollout.pictures_ahead import PicturesAhead
from thyme.rollout.pieces import Kept, Key, Piece, Stem, Tree, branches_of, key_of, pieces_of, seeds
from thyme.rollout.prompts import build_prompt
from thyme.rollout.replay import replay
from thyme.rollout.sampling import Sampling
from thyme.rollout.snapshots import Snapshots, room_for_snapshots
from thyme.rollout.text_stream import TextStream
from thyme.rollout.trajectory import COLUMNS, Trajectory
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Parent, Question, Rollout, RolloutStatus
from thyme.sandbox import Sandbox

_log = logging.getLogger(__name__)
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
    verifications: int
    """Drafts of single sequences that a step tried out; 0 without speculation, as are the next two."""
    drafted_tokens: int
    """Tokens in them."""
    accepted_tokens: int
    """Those of these that were drawn."""


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
        stems: in place of questions: what `sampling.n` rollouts each branch off, and the index of the first of them.
        keep: is given the sequences of rollouts that end, held; None: they are released.
        snapshots: where sandbox sessions are kept for branches; None: nowhere, but for the branches of a tree.
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
        stems: Sequence[tuple[Stem, int]] = (),
        keep: dict[Key, Kept] | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.engine, self.processor, self.config = engine, processor, config
        self.params = sampling.engine_params(processor, min(config.max_tokens_per_round, config.max_tokens))
        self.max_rounds = config.max_rounds if sampling.allow_code else 0
        self.streaming = streaming
        self.deterministic = engine.config.deterministic
        # Never more rollouts than sessions: nobody then waits for a session that only its own progress could free.
        sessions = sandbox.config.max_sessions
        kept_sessions = room_for_snapshots(sandbox) if snapshots is not None or sampling.tree.trunks else 0
        self.limit = min(config.max_in_flight or sessions, sessions - kept_sessions)
        self.on_round = on_round
        largest = min(self.limit, engine.config.max_sequences)
        self.known, self.begun = kept, begun
        self.group_size, self.tree = sampling.n, sampling.tree
        size = self.tree.trunks or sampling.n
        self.kept, self.waiting = pieces_of(
            questions, replace(sampling, n=size, tree=TreeConfig()), largest, kept, begun
        )
        self.waiting.extend(branches_of(stems, sampling))
        self.trees = {
            group: Tree(question=question, group=group, seed=seed)
            for group, (question, seed) in enumerate(zip(questions, seeds(questions, sampling), strict=True))
            if self.tree.trunks
        }
        self.owns_kept = keep is None
        self.kept_sequences: dict[Key, Kept] = {} if keep is None else keep
        self.keeps = keep is not None
        self.flights: dict[int, Flight] = {}
        self.outstanding: deque[Flight] = deque()  # in the order their code ended
        self.own_snapshots = Snapshots(kept_sessions) if snapshots is None and kept_sessions else None
        self.executor = Executor(
            sandbox, processor, config, show_results=sampling.show_results, snapshots=snapshots or self.own_snapshots
        )
        self.pictures = PicturesAhead(processor)
        self.closing: list[Future[None]] = []
        self.counts: Counter[str] = Counter()
        self.sandbox_s = self.idle_s = 0.0
        self.stats_before = engine.stats()
        self.started = time.perf_counter()
        self.wall_s = 0.0

    def events(self) -> Generator[Event, None, None]:
        """Everything that happens; an End per rollout."""
        for rollout in self.kept:
            yield End(rollout)
            yield from self._grow(rollout)
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
                if self.owns_kept:
                    for kept in self.kept_sequences.values():
                        self.engine.release(kept.sequence)
                if self.own_snapshots is not None:
                    self.own_snapshots.close()
                self.pictures.close()
                self.wall_s = time.perf_counter() - self.started

    def timing(self) -> RunTiming:
        """What the run cost so far."""
        stats, before = self.engine.stats(), self.stats_before
        return RunTiming(
            wall_s=self.wall_s,
            idle_s=self.idle_s,
            sandbox_s=self.sandbox_s,
            steps=self.counts["steps"],
            code_blocks=self.counts["code_blocks"],
            prefilled_tokens=int(stats["prefilled_tokens"] - before["prefilled_tokens"]),
            sampled_tokens=self.counts["sampled_tokens"],
            restarted=self.counts["restarted"],
            verifications=int(stats["verifications"] - before["verifications"]),
            drafted_tokens=int(stats["drafted_tokens"] - before["drafted_tokens"]),
            accepted_tokens=int(stats["accepted_tokens"] - before["accepted_tokens"]),
        )

    # From a question to sequences, and from one round to the next.

    def _start_waiting(self) -> None:
        reopened: dict[int, tuple[Piece, Rollout]] = {}
        self.pictures.want(piece.question for piece in islice(self.waiting, _AHEAD) if piece.is_new)
        while self.waiting and len(self.flights) + self.waiting[0].count <= self.limit:
            if self.waiting[0].is_new and not self.pictures.is_ready(self.waiting[0].question):
                decoding = len(self.flights) > len(self.outstanding)
                if decoding and not self.deterministic:
                    break  # its pictures are ready after some step
            piece = self.waiting.popleft()
            if piece.begun is not None:
                for _, picture in piece.question.pictures:
                    picture.load()
                reopened[self._reopen(piece, piece.begun).sequence.id] = piece, piece.begun
                continue
            if piece.stem is not None:
                self._branch(piece, piece.stem)
                continue
            prompt = build_prompt(piece.question, self.config.prompt_style, self.processor)
            with trace.span("loop", "wait for pictures"):
                pictures = self.pictures.take(piece.question)
            prompt = Prompt(prompt.token_ids, pictures)
            self.pictures.want(piece.question for piece in islice(self.waiting, _AHEAD) if piece.is_new)
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

    def _reopen(self, piece: Piece, begun: Rollout) -> Flight:
        """Has a rollout go on after its last code block."""
        params = replace(self.params, seed=piece.seed, max_tokens=self._budget(int(begun.sampled.sum())))
        prompt = Prompt(begun.token_ids.tolist(), tuple(begun.images))
        written = [begun.token_ids[begun.sampled & (begun.rounds == n)] for n in range(len(begun.turns))]
        sequence = self.engine.add(prompt, params, hold=True, written=written)
        return self._resumed(piece, begun, sequence, len(begun.turns))

    def _resumed(self, piece: Piece, begun: Rollout, sequence: EngineSequence, first_round: int) -> Flight:
        """The flight of a sequence that has the tokens of `begun` and goes on from there."""
        flight = Flight(
            question=piece.question,
            group=piece.group,
            index=piece.first,
            seed=piece.seed,
            sequence=sequence,
            trajectory=Trajectory(self.processor.image_token_id),
            stream=self._new_stream(sequence),
            parent=begun.parent,
            first_round=first_round,
            turns=list(begun.turns),
            num_sampled=int(begun.sampled.sum()),
        )
        flight.trajectory.add_columns({name: getattr(begun, name) for name in COLUMNS})
        self.flights[flight.sequence.id] = flight
        return flight

    def _branch(self, piece: Piece, stem: Stem) -> None:
        """Has a rollout go on from the start of a round of another one: on its KV where that is held, else from the
        same tokens as a prompt."""
        begun = prefix_of(stem.rollout, stem.round)
        begun.parent = Parent(stem.rollout.index, stem.round, stem.rollout.session_seed)
        kept = self.kept_sequences.get(key_of(stem.rollout))
        version = self.engine.weight_version
        if kept is None or stem.round < kept.first_round or kept.weight_version != version:
            flight = self._reopen(piece, begun)
        else:
            budget = self._budget(int(begun.sampled.sum()))
            number = stem.round - kept.first_round
            params = replace(self.params, n=1)
            (sequence,) = self.engine.branch(kept.sequence, number, [piece.seed], max_tokens=budget, params=params)
            assert len(sequence) == len(begun.token_ids)
            flight = self._resumed(piece, begun, sequence, kept.first_round)
        flight.before = tuple(begun.turns)
        tree = self.trees.get(piece.group)
        if tree is not None:
            tree.num_waiting -= 1
            if tree.num_waiting == 0 and not self.keeps:
                self._let_go(tree)

    def _keep(self, rollout: Rollout, kept: Kept) -> None:
        before = self.kept_sequences.pop(key_of(rollout), None)
        if before is not None:  # the same question under the same seed once more
            self.engine.release(before.sequence)
        self.kept_sequences[key_of(rollout)] = kept

    def _let_go(self, tree: Tree) -> None:
        """Releases the trunks: all that branches off them has begun."""
        for trunk in tree.trunks.values():
            kept = self.kept_sequences.pop(key_of(trunk), None)
            if kept is not None:
                self.engine.release(kept.sequence)

    def _grow(self, rollout: Rollout) -> Iterator[Event]:
        """Once every trunk of its question has ended, the rest of the group gets in line; an End for those that were
        sampled before."""
        tree = self.trees.get(rollout.group)
        if tree is None or rollout.parent is not None:
            return
        tree.trunks[rollout.index] = rollout
        if len(tree.trunks) < self.tree.trunks:
            return
        trunks = [tree.trunks[index] for index in sorted(tree.trunks)]
        found: list[Rollout] = []
        pieces: list[Piece] = []
        for index, place in enumerate(places(trunks, self.group_size - len(trunks), self.tree), start=len(trunks)):
            key = tree.question.id, tree.seed + index
            if key in self.known:
                found.append(replace(self.known[key], question=tree.question, group=tree.group))
            else:
                stem = Stem(trunks[place[0]], place[1])
                pieces.append(Piece(tree.question, tree.group, index, 1, key[1], self.begun.get(key), stem))
        tree.num_waiting = sum(piece.begun is None for piece in pieces)
        self.waiting.extendleft(reversed(pieces))
        if not tree.num_waiting and not self.keeps:
            self._let_go(tree)
        yield from map(End, found)

    def _replay(self, reopened: Mapping[int, tuple[Piece, Rollout]]) -> None:
        """Brings the sessions of reopened rollouts to where they were; those where that fails start over."""
        for number in replay(self.executor, {n: (piece.question, begun) for n, (piece, begun) in reopened.items()}):
            self.engine.abort(self.flights.pop(number).sequence)
            self.closing.append(self.executor.end(number))
            piece = reopened[number][0]
            self.waiting.appendleft(replace(piece, begun=None))
            if piece.stem is not None:
                self.trees[piece.group].num_waiting += 1
            self.counts["restarted"] += 1
            self._start_waiting()

    def _budget(self, num_sampled: int) -> int:
        """Tokens that a rollout may sample in its next round."""
        return min(self.config.max_tokens_per_round, self.config.max_tokens - num_sampled)

    def _end_round(self, flight: Flight, completion: Completion) -> Iterator[Event]:
        self.counts["sampled_tokens"] += len(completion.token_ids)
        flight.mark(f"round {len(flight.turns)}")
        is_text = np.asarray(completion.kinds) != TokenKind.END
        text = self.processor.decode(np.asarray(completion.token_ids)[is_text].tolist())
        ended = flight.end_round(completion, text, self.max_rounds)
        if ended is None:
            flight.due_step = self.counts["steps"] + self.config.result_delay_steps
            flight.future = self.executor.run(
                flight.sequence.id, flight.question, flight.session_seed, flight.code, flight.before
            )
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
        future, flight.future = flight.future, None
        flight.mark(f"code {len(flight.turns)}")
        try:
            result, output = future.result()
        except Diverged as error:
            _log.warning("thyme: rollout %s/%d ends: %s", flight.question.id, flight.index, error)
            yield from self._finish(flight, RolloutStatus.ABORTED)
            return
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
        name = f"{rollout.question.id}/{rollout.index}"
        trace.add("rollouts", name, flight.marks[0], flight.sequence.id, status=status.value)
        is_trunk = rollout.group in self.trees and rollout.parent is None
        if self.keeps or is_trunk:
            self._keep(rollout, Kept(flight.sequence, flight.first_round, self.engine.weight_version))
        else:
            self.engine.release(flight.sequence)
        del self.flights[flight.sequence.id]
        self.closing.append(self.executor.end(flight.sequence.id))
        if rollout.answer is not None:
            yield Answer(rollout.answer)
        yield End(rollout)
        yield from self._grow(rollout)

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
        with trace.span("loop", "wait for the sandbox"):
            wait([f.future for f in flights if f.future is not None], return_when=FIRST_COMPLETED)
        if idle:
            self.idle_s += time.perf_counter() - before
