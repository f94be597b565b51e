"""The engine: prompts in, completions out, one round at a time.

A round is what a sequence samples until something ends it. A held sequence keeps its KV after a round, can be appended
to, and then goes on; the engine knows tokens and tags, but nothing of the tools whose output is appended.
"""

import codecs
import logging
import secrets
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thyme.engine.block_manager import BlockManager
from thyme.engine.config import EngineConfig
from thyme.engine.model_runner import ModelRunner, num_kv_blocks, packs_weights
from thyme.engine.params import Prompt, SamplingParams
from thyme.engine.request import AnyPrompt, RequestReader
from thyme.engine.scheduler import Scheduler
from thyme.engine.sequence import Completion, FinishReason, Sequence, SequenceStatus
from thyme.engine.sequence_table import SequenceTable
from thyme.engine.stopping import StopChecker, StopReason
from thyme.engine.tags import TagAutomaton, TokenKind
from thyme.model.model import Model
from thyme.model.packed import packed_nbytes
from thyme.model.processor import Processor
from thyme.repetition import RepetitionConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence of a stream."""

    sequence: Sequence
    token_ids: list[int]
    text: str
    """Complete characters only; empty without a processor."""
    completion: Completion | None
    """Set with the last delta of a sequence."""


class Engine:
    """Decodes many sequences at once with a model that may be in training at the same time (never in the same moment).

    Args:
        model: the very module the trainer holds; run in inference mode, never changed.
        config: sizes and switches.
        processor: tokenizer and pictures; the model's own by default. Without one, prompts are ids, tags mean nothing
            and pictures must be ImageInputs.
        repetition: what counts as a loop, for requests with repetition="default".

    Raises:
        ValueError: the cache has no room for one block.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        processor: Processor | None = None,
        repetition: RepetitionConfig | None = None,
    ) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        self.processor = processor = processor or model.processor
        self.weight_version = 0
        self.is_asleep = False
        text = model.config.text
        self.eos_token_ids = processor.eos_token_ids if processor else model.config.eos_token_ids
        packs = packs_weights(model, config)
        num_blocks = num_kv_blocks(model, config, packed_nbytes(model) if packs else 0)
        context = config.max_context or text.max_position_embeddings
        self.max_context = min(context, num_blocks * config.block_size)
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.table = SequenceTable(config.max_sequences, self.max_context, config.block_size)
        self.scheduler = Scheduler(config, self.table, self.blocks)
        self.reader = RequestReader(model, processor, self.max_context)
        automaton = TagAutomaton.compile(processor) if processor else TagAutomaton.trivial(text.vocab_size)
        self.runner = ModelRunner(
            model,
            automaton,
            num_blocks,
            config.block_size,
            deterministic=config.deterministic,
            attention=config.attention,
            packs_weights=packs,
        )
        self.stopping = StopChecker(
            self.table,
            repetition or RepetitionConfig(),
            config.max_sequences,
            text.vocab_size,
            self.eos_token_ids,
            self.reader.token_bytes,
        )
        self._is_eos = np.isin(np.arange(text.vocab_size), self.eos_token_ids)
        self._num_sequences = 0
        self._unique_tokens = 0
        if not config.quiet:
            size = self.runner.kv_cache.nbytes / 2**30
            _log.info(
                "KV cache: %d blocks of %d tokens, %d tokens, %.2f GiB; sequences of up to %d tokens",
                num_blocks,
                config.block_size,
                num_blocks * config.block_size,
                size,
                self.max_context,
            )

    # All at once.

    def generate(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[Completion]:
        """Runs prompts to their ends.

        Args:
            prompts: one or many; a list of ints is one prompt.
            params: for all, or one per prompt.

        Returns:
            One completion per prompt and sample, in the prompts' order, the n of a prompt side by side.

        Raises:
            ValueError: a request that cannot be served (see `add`), or sequences from `add` are still unfinished.
        """
        sequences = self._add_all(prompts, params)
        done: dict[int, Completion] = {}
        try:
            while len(done) < len(sequences):
                done |= {completion.sequence.id: completion for completion in self.step()}
        finally:
            self._abort_all(sequences)
        return [done[sequence.id] for sequence in sequences]

    def stream(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """As `generate`, but yields what every step adds. Closing the iterator aborts what is unfinished."""
        sequences = self._add_all(prompts, params)
        decoders = {s.id: codecs.getincrementaldecoder("utf-8")("replace") for s in sequences}
        shown = {s.id: s.prompt_len for s in sequences}
        unfinished = {s.id: s for s in sequences}
        try:
            while unfinished:
                done = {completion.sequence.id: completion for completion in self.step()}
                for sequence in list(unfinished.values()):
                    completion = done.get(sequence.id)
                    ids = sequence.token_ids[shown[sequence.id] :]
                    if not ids and completion is None:
                        continue
                    shown[sequence.id] += len(ids)
                    raw = b"".join(map(self.reader.token_bytes, ids))
                    text = decoders[sequence.id].decode(raw, final=completion is not None)
                    if completion is not None:
                        del unfinished[sequence.id]
                    yield Delta(sequence, ids, text, completion)
        finally:
            self._abort_all(sequences)

    # Step by step.

    def add(self, prompt: AnyPrompt, params: SamplingParams | None = None, hold: bool = False) -> Sequence:
        """Queues one sequence.

        Args:
            prompt: ids, trusted text, or a Prompt with pictures.
            params: n must be 1.
            hold: keep sequence and KV after each round, for `append`, until `release`.

        Raises:
            ValueError: an empty or too long prompt, ids outside the vocabulary, image ids that do not match the
                pictures, text without a tokenizer, or parameters that do not go with this model.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"add: params.n is {params.n}; use add_group for several sequences of a prompt")
        return self.add_group(prompt, params, hold)[0]

    def add_group(self, prompt: AnyPrompt, params: SamplingParams, hold: bool = False) -> list[Sequence]:
        """Queues params.n sequences that share the prompt's KV and pictures; the prompt is computed once. Sequence i
        has the seed params.seed + i. Raises ValueError as `add` does."""
        if self.is_asleep:
            raise ValueError("add: the engine sleeps and has no KV cache: wake it first")
        if params.n > self.config.max_sequences:
            raise ValueError(
                f"add_group: n={params.n} sequences of one prompt do not fit at once: raise max_sequences "
                f"({self.config.max_sequences}), or split the group"
            )
        tokens = self.reader.tokens(prompt, "add")
        if not len(tokens.token_ids):
            raise ValueError("add: the prompt is empty: give at least one token")
        self.reader.check_room(len(tokens.token_ids), "the prompt", "add")
        ban = self.reader.ban_of(params)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for index in range(params.n):
            sequences.append(
                Sequence(
                    id=self._num_sequences,
                    index=index,
                    params=replace(params, n=1, seed=seed + index),
                    prompt=tokens,
                    hold=hold,
                    ban=ban,
                    images=list(tokens.images),
                    image_starts=list(tokens.image_starts),
                )
            )
            self._num_sequences += 1
            self.runner.hold_images(tokens.images)
        sequences[0].followers = sequences[1:]
        self._unique_tokens += len(tokens.token_ids)
        self.scheduler.add(sequences[0])
        return sequences

    def has_unfinished(self) -> bool:
        """Some sequence still waits or runs; held ones do neither."""
        return self.scheduler.has_unfinished

    def step(self) -> list[Completion]:
        """One pass through the model; returns the rounds that ended with it."""
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        for sequence in batch.started:
            self.stopping.open(sequence)
        sampled = self.runner.run(batch, self.reader.bans)
        self.scheduler.commit(batch)
        sampled.kinds[self._is_eos[sampled.token_ids]] = TokenKind.END
        self.table.push(batch.sample_rows, sampled, self.weight_version)
        ended = self.stopping.check(batch.sample_rows, sampled.token_ids, sampled.events)
        return [self._end_round(row, reason, what) for row, reason, what in ended]

    def append(
        self, sequence: Sequence, ids: Seq[int], images: Iterable[Any] = (), max_tokens: int | None = None
    ) -> None:
        """Adds given tokens to a held sequence and queues its next round; only these are computed.

        Args:
            ids: what comes next, for example a tool's output; one image id per picture, or all of them already.
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
        self.runner.hold_images(tokens.images)
        self._unique_tokens += len(tokens.token_ids)
        self.scheduler.resume(sequence)

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
        if sequence.status is SequenceStatus.FINISHED:
            return None
        completion = None
        if sequence.status is not SequenceStatus.HELD:
            completion = self._completion(sequence, FinishReason.ABORT, None)
        self._remove(sequence)
        return completion

    def weights_updated(self) -> None:
        """The model's weights have changed: tokens from now on carry the next version; no prefix computed before, and
        no picture encoded before, is used for a new sequence. Sequences under way keep their KV."""
        self.weight_version += 1
        self.blocks.forget_prefixes()
        self.runner.forget_features()
        if self.runner.packed is not None:
            self.runner.packed.free()

    def sleep(self) -> None:
        """Gives the memory of the KV cache back until `wake`, with every prefix in it, and that of packed weights.

        Raises:
            ValueError: a sequence waits, runs or is held.
        """
        if self.has_unfinished() or any(sequence is not None for sequence in self.table.sequences):
            raise ValueError("sleep: sequences are unfinished or held: let them end, abort or release them first")
        self.blocks.forget_prefixes()
        self.runner.free()
        self.is_asleep = True

    def wake(self) -> None:
        """Takes the memory again; nothing happens to an engine that is awake."""
        if self.is_asleep:
            self.runner.allocate()
            self.is_asleep = False

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

        prefilled_tokens counts given tokens that were computed, those of a group once, and recomputed_tokens are among
        them; unique_tokens counts the given tokens there were to compute, cached_tokens what the prefix cache saved.
        """
        counts = self.scheduler.counts
        names = ("steps", "prefilled_tokens", "recomputed_tokens", "cached_tokens", "sampled_tokens", "preemptions")
        return {name: counts[name] for name in (*names, "evictions")} | {
            "unique_tokens": self._unique_tokens,
            "images_encoded": self.runner.num_encoded,
            "blocks": self.blocks.num_blocks,
            "blocks_used": self.blocks.num_used,
            "kv_bytes": self.runner.kv_cache.nbytes,
            "packed_bytes": 0 if self.runner.packed is None else self.runner.packed.nbytes,
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "idle": len(self.scheduler.idle),
            "weight_version": self.weight_version,
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

    def _remove(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self.stopping.close(sequence.row)
        self.scheduler.remove(sequence)
        self.runner.release_images(sequence.images)

    def _add_all(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[Sequence]:
        if self.has_unfinished():
            raise ValueError("generate: sequences from `add` are unfinished: step until they end, or abort them")
        if isinstance(prompts, str | Prompt) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            listed: list[AnyPrompt] = [prompts]  # type: ignore[list-item]
        else:
            listed = list(prompts)  # type: ignore[arg-type]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            raise ValueError(f"generate: {len(params)} params for {len(listed)} prompts: give one, or one per prompt")
        sequences: list[Sequence] = []
        try:
            for prompt, each in zip(listed, params, strict=True):
                sequences += self.add_group(prompt, each)
        except ValueError:
            self._abort_all(sequences)
            raise
        return sequences

    def _abort_all(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.abort(sequence)
