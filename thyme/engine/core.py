"""The engine, step by step: prompts in, completions out, one round at a time.

A round is what a sequence samples until something ends it. A held sequence keeps its KV after a round, can be appended
to, and then goes on; the engine knows tokens and tags, but nothing of the tools whose output is appended.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from thyme.engine.batch import Batch
from thyme.engine.block_manager import BlockManager
from thyme.engine.config import EngineConfig
from thyme.engine.host_kv import Tradeoff
from thyme.engine.in_flight import InFlight
from thyme.engine.live_prompts import LivePrompts
from thyme.engine.model_runner import ModelRunner, num_kv_blocks, packed_bytes, packs_weights
from thyme.engine.params import Prompt, SamplingParams
from thyme.engine.phases import Phases
from thyme.engine.request import AnyPrompt, RequestReader
from thyme.engine.scheduler import Scheduler
from thyme.engine.sequence import (
    Completion,
    FinishReason,
    RoundStart,
    Sampled,
    Sequence,
    SequenceStatus,
)
from thyme.engine.sequence_factory import SequenceFactory
from thyme.engine.sequence_table import SequenceTable
from thyme.engine.speculation import Speculation
from thyme.engine.step_cost import StepCost
from thyme.engine.step_record import StepRecorder
from thyme.engine.stopping import StopChecker, StopReason
from thyme.engine.tags import TagAutomaton, TokenKind
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.repetition import RepetitionConfig

_log = logging.getLogger(__name__)

MemoryTag = Literal["kv_cache", "weights"]
MEMORY_TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)

_COUNTED = (
    "steps",
    "prefilled_tokens",
    "recomputed_tokens",
    "cached_tokens",
    "sampled_tokens",
    "dropped_tokens",
    "preemptions",
    "evictions",
    "evicted_blocks",
    "expired_pins",
    "host_blocks_out",
    "host_blocks_in",
    "host_blocks_dropped",
    "restored_tokens",
)


class EngineCore:
    """Decodes many sequences at once with a model that may be in training at the same time (never in the same moment).

    Args:
        model: the very module the trainer holds; run in inference mode, never changed.
        config: sizes and switches.
        processor: tokenizer and pictures; the model's own by default. Without one, prompts are ids, tags mean nothing
            and pictures must be ImageInputs.
        repetition: what counts as a loop, for requests with repetition="default".
        phases: what requests may give temperatures and truncations of their own; None: text, code and answer.

    Raises:
        ValueError: the cache, or host_kv_bytes, has no room for one block; the phases' tags cannot be told apart.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        processor: Processor | None = None,
        repetition: RepetitionConfig | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        self.processor = processor = processor or model.processor
        self.weight_version = 0
        self.is_paused = False
        self._asleep: set[str] = set()
        text = model.config.text
        self.eos_token_ids = processor.eos_token_ids if processor else model.config.eos_token_ids
        packs = packs_weights(model, config)
        num_blocks = num_kv_blocks(model, config, packed_bytes(model, config))
        context = config.max_context or text.max_position_embeddings
        self.max_context = min(context, num_blocks * config.block_size)
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.phases = phases or Phases()
        self.table = SequenceTable(config.max_sequences, self.max_context, config.block_size, self.phases)
        self.reader = RequestReader(model, processor, self.max_context)
        automaton = TagAutomaton.trivial(text.vocab_size)
        if processor:
            automaton = TagAutomaton.compile(processor, self.phases)
        self.automaton = automaton = automaton.widened(text.vocab_size)
        self.runner = ModelRunner(
            model,
            automaton,
            num_blocks,
            config.block_size,
            deterministic=config.deterministic,
            float32_head=config.head_dtype == "float32",
            image_cache_bytes=config.image_cache_bytes,
            attention=config.attention,
            packs_weights=packs,
            fp8_weights=config.weight_dtype == "fp8",
            fp8_cache=config.kv_dtype == "fp8",
            host_kv_bytes=config.host_kv_bytes,
            max_sequences=config.max_sequences,
            decode_graphs=config.decode_graphs,
        )
        if 0 < config.host_kv_bytes < self.runner.block_bytes:
            raise ValueError(
                f"EngineConfig.host_kv_bytes ({config.host_kv_bytes}) has no room for a block of "
                f"{self.runner.block_bytes} bytes: raise it, or leave it out"
            )
        self._is_eos = np.isin(np.arange(text.vocab_size), self.eos_token_ids)
        speculates = config.speculation != "off"
        self.speculation = Speculation(config, self.table, automaton, self._is_eos) if speculates else None
        self.scheduler = Scheduler(
            config,
            self.table,
            self.blocks,
            self.runner.block_bytes,
            self.runner.images.is_encoded,
            self.speculation,
            Tradeoff.of(StepCost(model, config.block_size), self.runner.block_bytes, model.device.type),
        )
        self.stopping = StopChecker(
            self.table,
            repetition or RepetitionConfig(),
            config.max_sequences,
            text.vocab_size,
            self.eos_token_ids,
            self.reader.token_bytes,
        )
        self.factory = SequenceFactory(self.reader, automaton, self.phases, self._is_eos)
        self._prompts = LivePrompts()
        self._unique_tokens = 0
        self.recorder: StepRecorder | None = None
        on_gpu = model.device.type == "cuda"
        self._runs_ahead = on_gpu if config.run_ahead is None else config.run_ahead
        self._in_flight: deque[InFlight] = deque()  # launched and not read: one between two calls, two within one
        self._ended: list[Completion] = []  # rounds that the next call of `step` returns
        if not config.quiet:
            size = self.runner.kv_nbytes / 2**30
            _log.info(
                "KV cache: %d blocks of %d tokens, %d tokens, %.2f GiB; sequences of up to %d tokens; attention: %s",
                num_blocks,
                config.block_size,
                num_blocks * config.block_size,
                size,
                self.max_context,
                self.runner.attention.name,
            )

    def add(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        hold: bool = False,
        forced: Seq[int] | None = None,
        written: Iterable[Seq[int]] = (),
    ) -> Sequence:
        """Queues one sequence.

        Args:
            prompt: ids, trusted text, or a Prompt with pictures.
            params: n must be 1.
            hold: keep sequence and KV after each round, for `append`, until `release`.
            forced: ids that its first round begins with, as if they had been drawn: they have log-probs under the
                present weights, are of max_tokens, and the round goes on after them, inside a code block if they open
                one. They end nothing.
            written: of a prompt that holds rounds of ours, what was drawn in each: the declared phases that they left
                open are open.

        Raises:
            ValueError: an empty or too long prompt, ids outside the vocabulary, image ids that do not match the
                pictures, text without a tokenizer, or parameters that do not go with this model.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"add: params.n is {params.n}; use add_group for several sequences of a prompt")
        return self._queue(prompt, params, hold, forced, written)[0]

    def add_group(self, prompt: AnyPrompt, params: SamplingParams, hold: bool = False) -> list[Sequence]:
        """Queues params.n sequences that share the prompt's KV and pictures; the prompt is computed once. Sequence i
        has the seed params.seed + i. Raises ValueError as `add` does."""
        return self._queue(prompt, params, hold)

    def _queue(self, prompt: AnyPrompt, params: SamplingParams, *how: Any) -> list[Sequence]:
        if self.is_asleep:
            raise ValueError("add: the engine sleeps: wake it first")
        if params.n > self.config.max_sequences:
            raise ValueError(
                f"add_group: n={params.n} sequences of one prompt do not fit at once: raise max_sequences "
                f"({self.config.max_sequences}), or split the group"
            )
        sequences = self.factory.group(prompt, params, *how)
        for sequence in sequences:
            self._enter(sequence)
        self.scheduler.add(sequences[0])
        return sequences

    def has_unfinished(self) -> bool:
        """Some sequence still waits or runs, which held ones do not, or `step` has a round to return."""
        return self.scheduler.has_unfinished or bool(self._ended)

    def step(self) -> list[Completion]:
        """One pass through the model; returns the rounds that have ended: with it, or where the engine runs ahead with
        the pass before, whose results are read while the device is at this one. Raises ValueError while paused."""
        if self.is_paused:
            raise ValueError("step: the engine is paused: resume it first")
        if self.recorder is not None:
            self.recorder.called()
        batch = self.scheduler.schedule(ahead=bool(self._in_flight))
        if batch is None and self._in_flight:
            self._read()
            batch = self.scheduler.schedule()
        if batch is not None:
            self._launch(batch)
            # What is drawn of a draft says how many tokens were computed.
            stays = self._runs_ahead and batch.drafted is None
            while len(self._in_flight) > stays:
                self._read()
        if not self.scheduler.has_unfinished:
            self._in_flight.clear()  # it computes for rounds that had ended
        ended, self._ended = self._ended, []
        return ended

    def _launch(self, batch: Batch) -> None:
        try:
            step = self.runner.launch(batch, self.reader.bans)
        except BaseException:
            try:
                self.catch_up()
            finally:
                self._fail([batch])
            raise
        self.scheduler.commit(batch)
        self._in_flight.append(step)

    def _read(self) -> None:
        """Waits for the oldest step that was launched, and takes what it drew."""
        step = self._in_flight.popleft()
        try:
            sampled = step.result()
        except BaseException:
            lost = [step.batch, *(later.batch for later in self._in_flight)]
            self._in_flight.clear()
            self._fail(lost)
            raise
        self._take(step, sampled)
        if self.recorder is not None:
            self.recorder.read(step.recorded)

    def _take(self, step: InFlight, sampled: Sampled) -> None:
        """Puts what was drawn where the table has room for it; rounds that end with it are over."""
        batch = step.batch
        for sequence in batch.started:
            self.stopping.open(sequence)
        sampled.kinds[self._is_eos[sampled.token_ids]] = TokenKind.END
        if batch.scored is not None and sampled.scores is not None:
            self.table.score(batch.scored.rows, batch.scored.columns, sampled.scores, self.weight_version)
        for place, sample in enumerate(batch.first):
            first = self.table.sequences[batch.sample_rows[sample]]
            assert first is not None and sampled.first_hidden is not None
            first.starts[-1].hidden = sampled.first_hidden[place]
        samples, done = step.samples, self._draw(batch, step.samples, sampled)
        if batch.drafted is None:
            return
        while True:  # of those that go on and drew what was drafted, the next token, as if it were another step's
            samples = batch.borne_out(samples, sampled.token_ids)
            samples = samples[~np.isin(batch.sample_rows[samples], done)]
            if not len(samples):
                break
            self.scheduler.commit_drafted(batch.sample_rows[samples])
            done += self._draw(batch, samples, sampled)
        self.scheduler.end_drafts(batch)
        drew = np.unique(batch.sample_rows)
        self.runner.settle(drew, self.table.states[drew, self.table.num_tokens[drew] - 1])

    def _draw(self, batch: Batch, samples: NDArray[np.int64], sampled: Sampled) -> list[int]:
        """One more token of each sample's row is known; returns the rows whose round ends with it."""
        if len(samples) < len(batch.sample_rows):
            sampled = sampled.at(samples)
        rows = batch.sample_rows[samples]
        self.table.fill(rows, sampled, self.weight_version)
        self.scheduler.drew(rows)
        ended = self.stopping.check(rows, sampled.token_ids, sampled.events)
        over = [row for row, _, _ in ended]
        if over and self._in_flight:
            # The next step computes one more token of each. It writes to blocks that are free from now on: whoever gets
            # them writes in a later step, and the device takes one after the other.
            self.scheduler.counts["dropped_tokens"] += sum(later.drop(np.array(over)) for later in self._in_flight)
            self.table.take_back(np.array(over))
        self._ended += [self._end_round(row, reason, what) for row, reason, what in ended]
        return over

    def _fail(self, batches: list[Batch]) -> None:
        self.runner.settle(*self.scheduler.fail(batches))

    def catch_up(self) -> None:
        """Reads what has been launched; rounds that end with it are returned by the next call of `step`. A step that
        turns out to have failed is computed again."""
        try:
            while self._in_flight:
                if self.recorder is not None:
                    self.recorder.called()
                self._read()
        except Exception:
            _log.warning("a step failed while the next was prepared: it is computed again", exc_info=True)

    def append(
        self, sequence: Sequence, ids: Seq[int], images: Iterable[Any] = (), max_tokens: int | None = None
    ) -> None:
        """Adds given tokens to a held sequence and queues its next round; only these are computed.

        Args:
            ids: what comes next, for example a tool's output; one image id per picture, or all of them already. None:
                the text goes on where the round ended, inside a code block too.
            images: PIL images or ImageInputs.
            max_tokens: tokens sampled in the next round; None: params.max_tokens.

        Raises:
            ValueError: the sequence is not held, would become longer than the context, or as `add` does.
        """
        row = sequence.row
        if sequence.status is not SequenceStatus.HELD or row is None:
            raise ValueError(
                f"append: sequence {sequence.id} is {sequence.status.name}: only a sequence added with hold=True, "
                "between its rounds, can be appended to"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"append: max_tokens must be at least 1, got {max_tokens}")
        length = len(sequence)
        tokens = self.reader.tokens(Prompt(ids, tuple(images)), "append", start=int(self.table.next_position[row]))
        whole = length + len(tokens.token_ids)
        self.reader.check_room(whole, f"sequence {sequence.id} with what is appended", "append")
        self.table.extend(row, tokens, TokenKind.SANDBOX)
        self.table.begin_round(row, sequence.params.max_tokens if max_tokens is None else max_tokens)
        sequence.images += tokens.images
        sequence.image_starts += [length + start for start in tokens.image_starts]
        sequence.has_begun = False
        ended_in = int(self.table.states[row, length - 1])
        sequence.begins_in = int(self.automaton.reopened[ended_in]) if len(tokens.token_ids) else ended_in
        begins_in = sequence.begins_in if len(tokens.token_ids) else None
        sequence.starts.append(RoundStart(whole, tokens.next_position, begins_in))
        self.runner.images.hold(tokens.images)
        self._unique_tokens += len(tokens.token_ids)
        self.scheduler.resume(sequence)

    def branch(
        self,
        sequence: Sequence,
        round: int,
        seeds: Seq[int | None],
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> list[Sequence]:
        """Queues sequences that go on from where a round of this one began: they have its tokens up to there, refer to
        its KV, a block being copied when the first of them writes to it, and draw their own rounds from then on.
        Nothing is computed again unless blocks were taken or the weights have changed meanwhile.

        What a branch draws has the bits of a sequence whose prompt is those tokens and whose seed is the same; under
        the seed of `sequence` it is what that one drew.

        Args:
            sequence: it and its KV stay as they are; it may run, wait or be held.
            round: 0 for the end of the prompt, else after the so-manieth `append`.
            seeds: of each branch; None: drawn, and recorded in its params.
            max_tokens: tokens sampled in the round that begins; None: params.max_tokens.
            params: how branches are drawn, their seeds aside; None: as the sequence is.

        Raises:
            ValueError: the sequence has ended or not begun, or has no such round; the engine sleeps.
        """
        if self.is_asleep:
            raise ValueError("branch: the engine sleeps: wake it first")
        if sequence.row is None:
            raise ValueError(
                f"branch: sequence {sequence.id} is {sequence.status.name} and has no KV: add it with hold=True, and "
                "branch before it is released"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"branch: max_tokens must be at least 1, got {max_tokens}")
        branches = self.factory.branches(sequence, round, seeds, params)
        for branch in branches:
            self._enter(branch)
            limit = branch.params.max_tokens if max_tokens is None else max_tokens
            self.scheduler.branch(sequence, branch, sequence.starts[round], limit)
        return branches

    def release(self, sequence: Sequence) -> None:
        """Lets a held sequence go, with its KV. Raises ValueError when its round is not over."""
        if sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            raise ValueError(
                f"release: sequence {sequence.id} is {sequence.status.name}: abort it, or let its round end"
            )
        if sequence.status is SequenceStatus.HELD:
            self._remove(sequence)

    def abort(self, sequence: Sequence) -> Completion | None:
        """Ends a sequence now. Returns what its round had so far; None when no round was open. Held ones are released,
        finished ones left as they are."""
        if sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            self.catch_up()
        completion = next((ended for ended in self._ended if ended.sequence is sequence), None)
        if completion is not None:
            self._ended.remove(completion)
        elif sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            completion = self._completion(sequence, FinishReason.ABORT, None)
        if sequence.status is not SequenceStatus.FINISHED:
            self._remove(sequence)
        return completion

    def weights_updated(self) -> None:
        """The model's weights have changed: tokens from now on carry the next version; no prefix computed before, and
        no picture encoded before, is used for a new sequence. Sequences under way keep their KV, but for what is in
        host memory."""
        self.catch_up()
        self.weight_version += 1
        self.blocks.forget_prefixes()
        self.scheduler.host.forget()
        self.runner.weights_updated()
        for sequence in self.table.sequences:
            if sequence is not None:
                self.scheduler.forget_hidden(sequence)

    def pause(self) -> None:
        """Nothing runs until `resume`: sequences keep their tokens, their place in line, and KV until it is needed.
        Meanwhile they may be added, appended to and aborted, weights may change, and the engine may sleep."""
        self.catch_up()
        self.scheduler.pause()
        self.is_paused = True

    def resume(self) -> None:
        """Sequences go on where they were, inside a code block too; what they have lost is computed again."""
        if self.is_asleep:
            raise ValueError("resume: the engine sleeps: wake it first")
        self.is_paused = False

    @property
    def is_asleep(self) -> bool:
        """Some memory was given back and not taken again: nothing runs, and nothing is queued."""
        return bool(self._asleep)

    def sleep(self, tags: Iterable[MemoryTag] = MEMORY_TAGS) -> None:
        """Gives memory back until `wake`.

        Args:
            tags: what: "kv_cache", with every prefix in it, encoded pictures and captured steps; "weights", the
                engine's own copies of them, packed or in fp8. Those of the model are the trainer's and stay.

        Raises:
            ValueError: another tag; a sequence waits, runs or is held, and the engine is not paused.
        """
        freed = _checked_tags("sleep", tags)
        self.catch_up()
        live = self.has_unfinished() or any(sequence is not None for sequence in self.table.sequences)
        if live and not self.is_paused:
            raise ValueError("sleep: sequences are unfinished or held: pause, or let them end, abort or release them")
        if "kv_cache" in freed:
            self.scheduler.drop_all()
            self.runner.free_cache()
        if "weights" in freed:
            self.runner.free_weights()
        self._asleep |= freed

    def wake(self, tags: Iterable[MemoryTag] = MEMORY_TAGS) -> None:
        """Takes memory again: of what `tags` name that which was given back. An update of the weights that needs room
        comes between "weights" and "kv_cache". Copies of weights are made by the next step."""
        taken = self._asleep & _checked_tags("wake", tags)
        if "kv_cache" in taken:
            self.runner.allocate()
        self._asleep -= taken

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Sleeps inside the block: for an update, whose activations then have the memory of the KV cache."""
        self.sleep()
        try:
            yield
        finally:
            self.wake()

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is in use now.

        Tokens: prefilled_tokens counts given tokens that were computed, and recomputed_tokens, which are computed again
        after their blocks were taken, are among them. unique_tokens counts the given tokens there were to compute: of a
        prompt those that begin no other prompt in the engine. cached_tokens counts what shared blocks saved.
        sampled_tokens are those of rounds, dropped_tokens those that an engine that runs ahead computed behind their
        ends.

        Sequences: idle ones have KV and do not run, parked ones of them are between their rounds; idle_blocks they hold
        alone. evictions counts those that lost blocks, evicted_blocks, to others, expired_pins those whose time was up.

        Host memory: host_blocks and host_kv_bytes are what is there now, host_blocks_out and host_blocks_in what was
        copied there and back, host_blocks_dropped what was given up for lack of room or with new weights.
        restored_tokens did not have to be computed again.

        Speculation: verifications counts the drafts of single sequences, drafted_tokens what was in them, and
        accepted_tokens what was drawn of that: 1 + accepted_tokens / verifications tokens came of each.
        """
        counts, parking = self.scheduler.counts, self.scheduler.parking
        host_blocks = len(self.scheduler.host)
        return {name: counts[name] for name in _COUNTED} | {
            "host_blocks": host_blocks,
            "host_kv_bytes": host_blocks * self.runner.block_bytes,
            "unique_tokens": self._unique_tokens,
            "images_encoded": self.runner.images.num_encoded,
            "image_cache_bytes": self.runner.images.cached_bytes,
            "blocks": self.blocks.num_blocks,
            "blocks_used": self.blocks.num_used,
            "kv_bytes": self.runner.kv_nbytes,
            "packed_bytes": 0 if self.runner.view is None else self.runner.view.nbytes,
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "idle": len(parking),
            "parked": parking.num_pinned,
            "idle_blocks": self.blocks.num_idle,
            "weight_version": self.weight_version,
            "verifications": 0 if self.speculation is None else self.speculation.num_verified,
            "drafted_tokens": 0 if self.speculation is None else self.speculation.num_drafted,
            "accepted_tokens": 0 if self.speculation is None else self.speculation.num_accepted,
        }

    # Rounds.

    def _end_round(self, row: int, reason: FinishReason, what: StopReason) -> Completion:
        sequence = self.table.sequences[row]
        assert sequence is not None
        completion = self._completion(sequence, reason, what)
        self.stopping.close(row)
        if sequence.hold:
            self.scheduler.hold(sequence)
        else:
            self._remove(sequence)
        return completion

    def _completion(self, sequence: Sequence, reason: FinishReason, what: StopReason) -> Completion:
        row = sequence.row
        token_ids, arrays = self.table.round(row)
        hit = None if row is None else self.stopping.hit(row)
        return Completion(
            sequence=sequence,
            index=sequence.index,
            token_ids=token_ids,
            finish_reason=reason,
            stop_reason=what,
            repetition=hit,
            **arrays,
        )

    def _enter(self, sequence: Sequence) -> None:
        self.runner.images.hold(sequence.images)
        self._unique_tokens += self._prompts.add(sequence.prompt.content, sequence.prompt.image_starts)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self.stopping.close(sequence.row)
        if self.speculation is not None:
            self.speculation.close(sequence)
        self.scheduler.remove(sequence)
        self._prompts.remove(sequence.prompt.content)
        self.runner.images.release(sequence.images)
        sequence.starts = []


def _checked_tags(caller: str, tags: Iterable[str]) -> set[str]:
    found = {tags} if isinstance(tags, str) else set(tags)
    if unknown := found - set(MEMORY_TAGS):
        raise ValueError(
            f"{caller}: no memory is called {', '.join(sorted(unknown))}: there are {', '.join(MEMORY_TAGS)}"
        )
    return found
