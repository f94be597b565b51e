"""Repetition: has what a model is writing fallen into a loop? Decided token by token, while it decodes.

Two rules, each reported on the very token that completes it, over the n tokens of a segment (what one sequence sampled
since it was opened or restarted):

- substring (Zhang et al., "Thyme: Think Beyond Images", 2025, section 4.3): some substring of `window` tokens occurs
  k >= 2 times without overlap, counted greedily from left to right, and k * window > ratio * n, with n >= min_tokens.
- tail: the segment ends in c exact copies of a block of p <= max_period tokens that is no power of a shorter block (so
  p is the smallest period of those copies), with c >= copies(p) and c * p >= min_tail_tokens.

RepetitionDetector (csrc/repetition.hpp) and repetition_ref mean the same; the second is the definition, and slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thyme import _native

_INT32 = np.iinfo(np.int32)
_LARGEST = 32768  # keeps copies * period within 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionConfig:
    """When a segment counts as repetitive. The defaults leave prose, code, tables, JSON alone, by words or bytes."""

    window: int = 128
    """Length of the substrings of the substring rule, in tokens."""
    ratio: float = 0.5
    """Share of the segment that the copies of one substring must exceed (the paper's 50 %)."""
    min_tokens: int = 1024
    """Shortest segment the substring rule judges, in tokens."""
    max_period: int = 512
    """Longest period of the tail rule, in tokens."""
    min_tail_tokens: int = 128
    """Fewest tokens that the copies at the end must cover together."""
    copies: tuple[tuple[int, int], ...] = ((64, 10), (128, 6), (512, 4))
    """(largest period, copies needed), ascending; the last entry covers all longer periods too."""

    def __post_init__(self) -> None:
        for name in ("window", "min_tokens", "max_period", "min_tail_tokens"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} must be between 1 and {_LARGEST}, got {getattr(self, name)}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        if not self.copies:
            raise ValueError("copies must hold at least one (largest period, copies)")
        periods = [period for period, _ in self.copies]
        if periods != sorted(set(periods)) or periods[0] < 1:
            raise ValueError(f"the periods of copies must be positive and ascending, got {periods}")
        for period, count in self.copies:
            if not 2 <= count <= _LARGEST:
                raise ValueError(f"copies of periods up to {period} must be between 2 and {_LARGEST}, got {count}")

    def copies_of(self, period: int) -> int:
        """Copies that a block of `period` tokens needs."""
        return next((count for largest, count in self.copies if period <= largest), self.copies[-1][1])


@dataclass(frozen=True, slots=True)
class RepetitionHit:
    """What was found. All positions count tokens from the start of the segment."""

    rule: str
    """"substring" or "tail"; "tail" where one token completes both."""
    index: int
    """The token that completed the rule."""
    start: int
    """The first token of the first copy."""
    period: int
    """Tokens in one copy: the smallest period of the tail, or the window of the substring rule."""
    copies: int
    """Copies found, not overlapping; in a tail they follow each other and end at `index`."""


class RepetitionDetector:
    """Watches up to `capacity` segments. Safe to call from several threads, one after the other.

    A slot holds about 36 bytes per token of its segment and keeps that memory for the next one. The cost of a token
    does not depend on how long its segment is.
    """

    def __init__(self, config: RepetitionConfig, capacity: int) -> None:
        """Raises ValueError unless capacity >= 1."""
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.config = config
        self.capacity = capacity
        self._native = _native.RepetitionDetector(
            window=config.window,
            ratio=config.ratio,
            min_tokens=config.min_tokens,
            min_tail_tokens=config.min_tail_tokens,
            copies=[config.copies_of(period) for period in range(1, config.max_period + 1)],
            capacity=capacity,
        )

    def open(self) -> int:
        """A slot with an empty segment. Raises ValueError when all are open."""
        return self._native.open()

    def fork(self, slot: int) -> int:
        """A new slot that continues from the state of `slot`. Raises ValueError when it is not open or all are."""
        return self._native.fork(slot)

    def close(self, slot: int) -> None:
        """Gives the slot back. Raises ValueError when it is not open."""
        self._native.close(slot)

    def restart(self, slot: int) -> None:
        """Begins a new, empty segment in the slot. Raises ValueError when it is not open."""
        self._native.restart(slot)

    def push(self, slots: ArrayLike, tokens: ArrayLike) -> NDArray[np.uint8]:
        """Appends tokens[i] to the segment of slots[i], in order; the GIL is released.

        Args:
            slots: [B] int32; a slot may occur more than once.
            tokens: [B] int32, not negative.

        Returns:
            [B] uint8, 1 where the slot's segment is repetitive; it stays 1, and more tokens are ignored, until restart.

        Raises:
            ValueError: slot not open, negative token, other shapes or types; then no segment has changed.
        """
        try:
            return self._native.push(slots, tokens)  # type: ignore[arg-type]
        except TypeError:  # not contiguous int32 arrays; checking first would cost as much as the call
            return self._native.push(_int32("slots", slots), _int32("tokens", tokens))

    def hit(self, slot: int) -> RepetitionHit | None:
        """What was found in the slot's segment. Raises ValueError when it is not open."""
        found = self._native.hit(slot)
        return None if found is None else RepetitionHit(*found)


def _int32(name: str, values: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.dtype != np.int32:
        if array.size and (array.dtype.kind not in "iu" or array.min() < _INT32.min or array.max() > _INT32.max):
            raise ValueError(f"{name} must be 32-bit integers, got {array.dtype} {array.ravel()[:4].tolist()}...")
        array = array.astype(np.int32)
    return np.ascontiguousarray(array)


def repetition_ref(tokens: Sequence[int], config: RepetitionConfig) -> int | None:
    """Index of the token on which the first rule fires, None if none does: the definition, quadratic in time."""
    hits = (repetition_hit_ref(tokens[:n], config) for n in range(1, len(tokens) + 1))
    return next((hit.index for hit in hits if hit is not None), None)


def repetition_hit_ref(tokens: Sequence[int], config: RepetitionConfig) -> RepetitionHit | None:
    """What the two rules say of a whole segment, whatever they said of its beginnings."""
    if tokens and min(tokens) < 0:
        raise ValueError(f"tokens must not be negative, got {min(tokens)}")
    return _tail_ref(tokens, config) or _substring_ref(tokens, config)


def _tail_ref(tokens: Sequence[int], config: RepetitionConfig) -> RepetitionHit | None:
    tokens, n = list(tokens), len(tokens)
    for period in range(1, min(config.max_period, n // 2) + 1):
        block = tokens[n - period :]
        if any(period % d == 0 and block == block[:d] * (period // d) for d in range(1, period)):
            continue
        copies = 1
        while tokens[max(0, n - (copies + 1) * period) : n - copies * period] == block:
            copies += 1
        if copies >= config.copies_of(period) and copies * period >= config.min_tail_tokens:
            return RepetitionHit("tail", n - 1, n - copies * period, period, copies)
    return None


def _substring_ref(tokens: Sequence[int], config: RepetitionConfig) -> RepetitionHit | None:
    n, window = len(tokens), config.window
    if n < config.min_tokens:
        return None
    occurrences: dict[tuple[int, ...], list[int]] = {}
    for start in range(n - window + 1):
        starts = occurrences.setdefault(tuple(tokens[start : start + window]), [])
        if not starts or start >= starts[-1] + window:
            starts.append(start)
    starts = max(occurrences.values(), key=len, default=[])
    if len(starts) < 2 or len(starts) * window <= config.ratio * n:
        return None
    return RepetitionHit("substring", n - 1, starts[0], window, len(starts))
