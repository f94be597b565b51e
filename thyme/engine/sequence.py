"""A sequence and what comes back of it. What a step touches of every sequence is in the SequenceTable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thyme.engine.params import SamplingParams
from thyme.model.image_processor import ImageInputs
from thyme.repetition import RepetitionHit


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    """For a place among the running: new, preempted, or appended to."""
    RUNNING = auto()
    HELD = auto()
    """Its round has ended; it keeps its KV and waits for `append` or `release`."""
    FINISHED = auto()


class FinishReason(StrEnum):
    """Why a round ended."""

    EOS = "eos"
    STOP = "stop"
    """A tag, a stop text or a stop id; stop_reason says which."""
    LENGTH = "length"
    """max_tokens of the round."""
    CONTEXT = "context"
    """The sequence is as long as the engine's max_context."""
    REPETITION = "repetition"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Given tokens (a prompt, or what is appended), images expanded, with positions: what is needed to compute them."""

    token_ids: NDArray[np.int32]
    """[T]."""
    positions: NDArray[np.int32] = field(repr=False)
    """[3, T] M-RoPE."""
    next_position: int
    images: tuple[ImageInputs, ...]
    image_starts: tuple[int, ...]
    """Index of each image's first token."""
    content: bytes = field(repr=False)
    """Equal where all of the above is: the ids, and before the first of each image its digest."""


@dataclass(frozen=True, slots=True)
class Forced:
    """Given tokens that count as drawn: their log-probs are asked for. F of them."""

    token_ids: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    """TokenKind."""
    phases: NDArray[np.uint8]
    states: NDArray[np.uint16]
    """Of the tag automaton, after each."""
    temperatures: NDArray[np.float32]


@dataclass(slots=True)
class RoundStart:
    """Where a round of a sequence began: what a branch needs to begin there too."""

    length: int
    """Tokens before it."""
    next_position: int
    begins_in: int | None
    """State of the tag automaton; None: it went on where the round before ended."""
    hidden: Any = field(default=None, repr=False)
    """[H] hidden state of the token before its first, on the device, from which that is drawn; None where it is not
    kept."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step drew, on the host, one entry per sample."""

    token_ids: NDArray[np.int64]
    events: NDArray[np.uint8]
    """TagEvent."""
    kinds: NDArray[np.uint8]
    """TokenKind; end-of-sequence ids are not told apart here."""
    phases: NDArray[np.uint8]
    """Number of the phase."""
    states: NDArray[np.uint16]
    """Of the tag automaton, after the token."""
    records: NDArray[np.float32]
    """[5, S]: logprob, logprob_raw, entropy, temperature, kept_mass."""
    scores: NDArray[np.float32] | None = None
    """[3, F] of the batch's forced tokens: logprob, logprob_raw, entropy."""
    first_hidden: Any = None
    """[first, H] on the device, of the batch's first samples; see RoundStart.hidden."""

    def at(self, samples: NDArray[np.int64]) -> Sampled:
        """Some of the samples."""
        return Sampled(
            self.token_ids[samples],
            self.events[samples],
            self.kinds[samples],
            self.phases[samples],
            self.states[samples],
            self.records[:, samples],
        )


class TokenRows(Protocol):
    """What a sequence reads of the table it has a row in; the table itself (sequence_table.py) knows sequences."""

    num_known: NDArray[np.int64]
    """[R]"""

    @property
    def token_ids(self) -> NDArray[Any]:
        """[R, C]"""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of tokens from its prompt to its end. Read what you like; only the engine writes.

    Followers are the siblings of a group before its prompt is computed: they then fork from this sequence.
    """

    id: int
    index: int
    """Which of the params.n sequences of its prompt."""
    params: SamplingParams
    """With the seed of this sequence, and n = 1."""
    prompt: Tokens = field(repr=False)
    hold: bool
    ban: int
    """Number of its set of banned ids."""
    forced: Forced | None = field(default=None, repr=False)
    """What follows the prompt, as if it had been drawn."""
    status: SequenceStatus = SequenceStatus.WAITING
    followers: list[Sequence] = field(repr=False, default_factory=list)
    images: list[ImageInputs] = field(repr=False, default_factory=list)
    image_starts: list[int] = field(repr=False, default_factory=list)
    row: int | None = None
    table: TokenRows | None = field(default=None, repr=False)
    nodes: list[int] = field(default_factory=list, repr=False)
    """Nodes of the prefix tree: where it began, and after each of its published blocks."""
    has_begun: bool = False
    """Its current round has reached the sampler's state (automaton, detector)."""
    begins_in: int = 0
    """State of the tag automaton where its current round begins."""
    starts: list[RoundStart] = field(default_factory=list, repr=False)
    """Of each round so far."""
    final_ids: list[int] | None = field(default=None, repr=False)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt, images expanded."""
        return len(self.prompt.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, images expanded."""
        if self.final_ids is not None:
            return list(self.final_ids)
        if self.table is None or self.row is None:
            return self.prompt.token_ids.tolist() + ([] if self.forced is None else self.forced.token_ids.tolist())
        return self.table.token_ids[self.row, : self.table.num_known[self.row]].tolist()

    def __len__(self) -> int:
        if self.final_ids is not None:
            return len(self.final_ids)
        if self.row is None or self.table is None:
            return self.prompt_len + (0 if self.forced is None else len(self.forced.token_ids))
        return int(self.table.num_known[self.row])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Completion:
    """One round of a sequence that has ended: T sampled tokens, as they were sampled, and what is known of each."""

    sequence: Sequence
    index: int
    """The sequence's place among the n of its prompt."""
    token_ids: list[int]
    logprobs: NDArray[np.float32]
    """[T] at the temperature used, over the ids that truncation kept; 0 where greedy. Nats."""
    logprobs_raw: NDArray[np.float32]
    """[T] at temperature 1. Nats."""
    entropies: NDArray[np.float32]
    """[T] of the distribution at temperature 1. Nats."""
    temperatures: NDArray[np.float32]
    """[T] used."""
    kept_mass: NDArray[np.float32]
    """[T] probability, at the temperature used, of the ids that truncation left; 1 without any, or where greedy."""
    kinds: NDArray[np.uint8]
    """[T] TokenKind."""
    phases: NDArray[np.uint8]
    """[T] number of the phase it was drawn in, among the names of the engine's `phases`."""
    weight_version: NDArray[np.int32]
    """[T] of the weights that drew the token."""
    finish_reason: FinishReason
    stop_reason: str | int | None
    """"</code>", "</answer>", "forged", the stop text, the stop id; None where finish_reason says it all."""
    repetition: RepetitionHit | None = None
    """What was found, its positions counted from the round's first token."""

    def first(self, count: int) -> Completion:
        """This round had it ended with its first `count` tokens."""
        names = (
            "logprobs",
            "logprobs_raw",
            "entropies",
            "temperatures",
            "kept_mass",
            "kinds",
            "phases",
            "weight_version",
        )
        parts: dict[str, Any] = {name: getattr(self, name)[:count] for name in ("token_ids", *names)}
        return replace(self, **parts, finish_reason=FinishReason.LENGTH, stop_reason=None, repetition=None)

    def __repr__(self) -> str:
        ids = np.array2string(np.asarray(self.token_ids, dtype=np.int64), threshold=16, edgeitems=6, separator=", ")
        found = "" if self.repetition is None else f", repetition={self.repetition}"
        return (
            f"Completion(index={self.index}, {len(self.token_ids)} tokens {ids}, "
            f"finish_reason={self.finish_reason.value!r}, stop_reason={self.stop_reason!r}{found})"
        )
