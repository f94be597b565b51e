"""Repetition: has what a model is writing fallen into a loop? Decided token by token, while it decodes.

Three rules, each reported on the very token that completes it, over the n tokens of a segment (what one sequence
sampled since it was opened or restarted):

- substring (Zhang et al., "Thyme: Think Beyond Images", 2025, section 4.3): some substring of `window` tokens occurs
  k >= 2 times without overlap, counted greedily from left to right, and k * window > ratio * n, with n >= min_tokens.
- tail: the segment ends in c exact copies of a block of p <= max_period tokens that is no power of a shorter block (so
  p is the smallest period of those copies), with c >= copies(p) and c * p >= min_tail_tokens.
- near: the segment ends in copies that differ by a few edits, as under a counter that increments: see near_scores.
  Copies in which no token differs are a refrain up to near_exact_copies of them.

Exact copies are no sign of degeneration in data: a matrix of zeros, an empty form, an attendance sheet repeat because
what they describe does. So the copies of a block that is not plain, of a "structured" one, must number
structured_copies and cover structured_tokens, under the tail and the substring rule alike; under the near rule they
never count. A block is plain unless

- numbers and marks (brackets, pipes ...) are more than max_data_share of its tokens that are not BLANK, and none wraps
  a final answer. Under the tail
  rule that does not count against a block of one token, nor against one of numbers, BLANK, commas and full stops alone
  that holds min_numbers numbers or more: no list of equal values, but counting that begins again. Or:
- it holds numbers, marks or perhaps the end of a row, and its different tokens are fewer than min_distinct and at most
  half of all; so does a row of a table.

The classes come from the vocabulary (token_classes). Without them every token may be the end of a row and none is known
to be data or a word: the second condition is what is left to spare tables, and the near rule is silent.

RepetitionDetector (csrc/repetition.hpp) and repetition_ref mean the same; the second is the definition, and slow.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntFlag
from unicodedata import category

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thyme import _native

_INT32 = np.iinfo(np.int32)
_LARGEST = 32768  # keeps copies * period within 32 bits
_MOST_SCORE = 32766  # keeps scores within 16 bits, with a target beyond them


class TokenClass(IntFlag):
    """What a token is made of, as far as it tells prose from data."""

    WORD = 1
    """Letters, with a space, an opening quote, bracket or dash, or a full-width mark before them at most; or the
    beginning of one."""
    NUMBER = 2
    """Digits; with WORD a value in data: True, null."""
    MARK = 4
    """A mark that prose has few of: brackets, opening quotes, pipes, colons, letters after one as in ".append"; but not
    what joins words, as in "left-right" and "yes / no"."""
    ROW = 8
    """May end a row: it holds a line break, or nothing is known about it."""
    BLANK = 16
    """Only white space."""
    ANSWER = 32
    """What the final answer is wrapped in, which is given once."""


_WORD, _NUMBER, _MARK, _ROW, _BLANK, _ANSWER = map(int, TokenClass)
# A full-width mark and the word behind it are one token: Chinese has no space there.
_BEFORE_A_WORD = "\"'(\\-\u2013\u2014\u2018\u201c\u00bf\u00a1*\u3001\u3002\uff0c\uff01\uff1f\uff1b"
_BEGINS_A_WORD = re.compile(f"[{_BEFORE_A_WORD}][^\\W\\d_]").match
_VALUES = frozenset(("True", "False", "None", "true", "false", "null", "TRUE", "FALSE", "NULL", "NaN", "nan"))
_JOINS_WORDS = frozenset(("-", "/", "->", "\u2192"))
# Full-width punctuation too; but two dots, or a row of them, lead to a number or wait to be filled in.
_IS_PROSE_MARKS = re.compile("[.,\u2026\u2013\u2014\u3001\u3002\uff0c]|[.]{3}|[!?\uff01\uff1f]{1,3}").fullmatch
_CLOSES_SPEECH = re.compile('[.,!?]?["\u201d][.!?]?').fullmatch  # in JSON and CSV more follows, or a space or line end


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionConfig:
    """When a segment counts as repetitive. The defaults leave prose, code, tables, forms, matrices and JSON alone."""

    window: int = 128
    """Length of the substrings of the substring rule, in tokens."""
    ratio: float = 0.5
    """Share of the segment that the copies of one substring must exceed (the paper's 50 %)."""
    min_tokens: int = 1024
    """Shortest segment the substring rule judges, in tokens."""
    max_period: int = 512
    """Longest period of the tail rule, in tokens."""
    min_tail_tokens: int = 128
    """Fewest tokens that the copies of a plain block at the end must cover together."""
    copies: tuple[tuple[int, int], ...] = (
        (1, 128),
        (2, 120),
        (3, 80),
        *((period, max(3, min(6, 1 + 252 // period), -(-192 // period))) for period in range(4, 86)),
        (512, 3),
    )
    """(largest period, copies of a plain block needed), ascending; the last entry covers all longer periods too."""
    structured_copies: int = 64
    """Copies of a structured block needed."""
    structured_tokens: int = 2048
    """Fewest tokens that the copies of a structured block must cover together."""
    max_data_share: float = 0.28
    """A block with a larger share of numbers and marks among its tokens that are not BLANK is structured."""
    min_numbers: int = 5
    """Numbers in a block of the tail rule that holds little else, for it to be counting and no list of equal values."""
    min_distinct: int = 8
    """A block of fewer different tokens, at most half its length, is structured if it may be made of rows or data."""
    near_tokens: int = 96
    """Score that a period must reach under the near rule; 0 switches the rule off."""
    near_copies: int = 4
    """The score must reach (near_copies - 1) * period too."""
    near_exact_copies: int = 6
    """Copies needed where no token of them differs: a song's refrain comes five times in a row."""
    near_max_period: int = 256
    """Longest period of the near rule, in tokens, where max_period is no shorter."""
    near_edit_cost: int = 4
    """Equal tokens that make up for one edit: loops with more than one edit in near_edit_cost + 1 tokens pass."""
    near_line_cost: int = 16
    """The same where rows end often and the edit is no number: a verse or an entry of a list differs by a word."""
    near_row_share: float = 0.03
    """Rows end often where more of the last near_tokens tokens that are not BLANK may end one."""
    near_word_share: float = 0.5
    """Smallest share of WORD among the last near_tokens tokens that are not BLANK."""
    near_mark_share: float = 0.1
    """Largest share of MARK among them: statements of a program differ by a name as loops do by a counter."""

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("window", "min_tokens", "max_period", "min_tail_tokens")),
            *((name, 2) for name in ("structured_copies", "near_copies", "near_exact_copies")),
            *((name, 1) for name in ("structured_tokens", "min_numbers", "near_max_period", "near_edit_cost")),
            ("near_line_cost", self.near_edit_cost),
            ("near_tokens", 0),
        ):
            largest = 1024 if name in ("near_edit_cost", "near_line_cost") else _LARGEST
            if not least <= getattr(self, name) <= largest:
                raise ValueError(f"{name} must be between {least} and {largest}, got {getattr(self, name)}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        for name in ("max_data_share", "near_row_share", "near_word_share", "near_mark_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 1 <= self.min_distinct <= 64:
            raise ValueError(f"min_distinct must be between 1 and 64, got {self.min_distinct}")
        if not self.copies:
            raise ValueError("copies must hold at least one (largest period, copies)")
        periods = [period for period, _ in self.copies]
        if periods != sorted(set(periods)) or periods[0] < 1:
            raise ValueError(f"the periods of copies must be positive and ascending, got {periods}")
        for period, count in self.copies:
            if not 2 <= count <= _LARGEST:
                raise ValueError(f"copies of periods up to {period} must be between 2 and {_LARGEST}, got {count}")

    def copies_of(self, period: int) -> int:
        """Copies that a plain block of `period` tokens needs."""
        return next((count for largest, count in self.copies if period <= largest), self.copies[-1][1])


@dataclass(frozen=True, slots=True)
class RepetitionHit:
    """What was found. All positions count tokens from the start of the segment."""

    rule: str
    """"substring", "tail" or "near". Where one token completes several: "tail" before "substring" before "near"."""
    index: int
    """The token that completed the rule."""
    start: int
    """The first token of the first copy."""
    period: int
    """Tokens in one copy: the smallest period of the tail, the window of the substring rule, or the score's period."""
    copies: int
    """Copies found, not overlapping; in a tail they follow each other and end at `index`. Under the near rule at least
    that many: 1 + score // period, and `start` is where as many begin."""


def token_classes(vocabulary: Iterable[bytes]) -> NDArray[np.uint8]:
    """The TokenClass of each token of a vocabulary.

    Args:
        vocabulary: what each token adds to the text; nothing for special tokens, which count as unknown (ROW).

    Returns:
        [V] uint8.
    """
    return np.fromiter(map(_class_of, vocabulary), np.uint8)


def _class_of(raw: bytes) -> int:
    if not raw:
        return _ROW
    text = raw.decode(errors="replace")
    row = _ROW if "\n" in text or "\r" in text else 0
    if "\t" in text:  # parts columns
        return _MARK | row
    body = text.strip()
    if not body:
        return _BLANK | row
    first = category(body[0])[0]
    if first == "N":
        return _NUMBER | row
    if body in _VALUES:
        return _WORD | _NUMBER | row
    if first in "LM" or _BEGINS_A_WORD(body):
        bracket = _MARK if body[0] == "(" else 0
        return _WORD | bracket | row | (_ANSWER if body == "boxed" else 0)
    if body == "\\boxed":
        return _MARK | _ANSWER
    if body[0] == "\N{REPLACEMENT CHARACTER}":  # part of a character, whose first byte says what it may be
        lead = raw.strip()[0]
        return (_WORD if 0xC3 <= lead <= 0xED and lead != 0xE2 else _MARK if lead == 0xE2 else 0) | row
    if _IS_PROSE_MARKS(body) or (body in _JOINS_WORDS and not row) or (_CLOSES_SPEECH(text) and not row):
        return row
    return _MARK | row


class RepetitionDetector:
    """Watches up to `capacity` segments. Safe to call from several threads, one after the other.

    A slot holds about 9 bytes per token of its segment, 45 once a substring recurred, and keeps that memory for the
    next one. The cost of a token does not depend on how long its segment is.
    """

    def __init__(self, config: RepetitionConfig, capacity: int, classes: NDArray[np.uint8] | None = None) -> None:
        """`classes` is what token_classes says of the vocabulary; ids beyond it count as unknown. None: all do.

        Raises ValueError unless capacity >= 1 and classes are a row of TokenClass.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.config = config
        self.capacity = capacity
        self._native = self._open_native(_native.RepetitionDetector, classes)

    def _open_native(
        self, native: type[_native.RepetitionDetector], classes: NDArray[np.uint8] | None
    ) -> _native.RepetitionDetector:
        limits = asdict(self.config)
        if classes is None and self.config.near_word_share > 0.0:
            limits["near_tokens"] = 0  # no token is known to be a word, so the rule would never fire
        copies = [self.config.copies_of(period) for period in range(1, limits.pop("max_period") + 1)]
        return native(**limits | {"copies": copies}, classes=_checked_classes(classes), capacity=self.capacity)

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


def _checked_classes(classes: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    if classes is None:
        return np.zeros(0, np.uint8)
    if (
        not isinstance(classes, np.ndarray)
        or classes.ndim != 1
        or classes.dtype != np.uint8
        or classes.max(initial=0) > 63
    ):
        raise ValueError(f"classes must be what token_classes returns, got {classes!r:.80}")
    return np.ascontiguousarray(classes)


def repetition_ref(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8] | None = None
) -> int | None:
    """Index of the token on which the first rule fires, None if none does: the definition, quadratic in time."""
    scores = near_scores(tokens, config, classes)
    for n in range(1, len(tokens) + 1):
        if _hit_ref(tokens[:n], config, _checked_classes(classes), next(scores)) is not None:
            return n - 1
    return None


def repetition_hit_ref(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8] | None = None
) -> RepetitionHit | None:
    """What the rules say of a whole segment, whatever they said of its beginnings."""
    scores = list(near_scores(tokens, config, classes))
    return _hit_ref(tokens, config, _checked_classes(classes), scores[-1]) if tokens else None


def near_scores(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8] | None = None
) -> Iterator[list[int]]:
    """The scores of the near rule after each token, by period; 0 before the first period and after the last.

    The score of a period p says how well the end of the segment repeats what stands about p tokens earlier. Each token
    that equals the one p before adds 1. Any other is an edit and costs near_edit_cost: one token for another, or one
    more or one less, which moves the score to p + 1 or p - 1; of the scores that could stand at p the largest does.
    A token that is no number costs near_line_cost where more than near_row_share of the last near_tokens tokens, those
    that are BLANK aside, may end a row. A score of half near_edit_cost or less that an edit leaves is lost. No score
    exceeds 32766.

    The rule looks at the periods whose score reaches max(near_tokens, (near_copies - 1) * p, near_edit_cost + 1) and is
    no smaller than those of p - 1 and p + 1, which it passes on to; the hit names the smallest of them. It fires where
    of the last near_tokens tokens that are not BLANK at least near_word_share are words, at most near_mark_share are
    marks and at most max_data_share are numbers and marks, and where min_distinct of all or more than half differ. The
    last near_edit_cost tokens must equal those p before, as the end of a refrain does not; where as many do as the
    score says there are near_exact_copies at least.
    """
    cost, periods = config.near_edit_cost, min(config.max_period, config.near_max_period)
    scores = [0] * (periods + 2)
    classes = _checked_classes(classes)
    if len(tokens) and min(tokens) < 0:
        raise ValueError(f"tokens must not be negative, got {min(tokens)}")
    for n, token in enumerate(tokens):
        kinds, _, _, _, rows, written = _mix(tokens[max(0, n + 1 - config.near_tokens) : n + 1], classes)
        is_line = rows > config.near_row_share * written and not (kinds and TokenClass.NUMBER in kinds[-1])
        after = [0] * (periods + 2)
        for p in range(1, periods + 1):
            kept = min(scores[p], _MOST_SCORE - 1) + 1 if p <= n and tokens[n - p] == token else 0
            edited = max(scores[p - 1 : p + 2]) - (config.near_line_cost if is_line else cost)
            after[p] = max(kept, edited if edited > cost // 2 else 0)
        scores = after
        yield scores


def _hit_ref(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8], scores: list[int]
) -> RepetitionHit | None:
    return (
        _tail_ref(tokens, config, classes)
        or _substring_ref(tokens, config, classes)
        or _near_ref(tokens, config, classes, scores)
    )


def _mix(block: Sequence[int], classes: NDArray[np.uint8]) -> tuple[list[TokenClass], int, int, int, int, int]:
    """The class of each token, and how many are words, numbers, marks, perhaps ends of rows, and not blank."""
    kinds = [TokenClass(int(classes[token])) if token < len(classes) else TokenClass.ROW for token in block]
    words, numbers, marks, rows, blank, _ = (sum(bit in kind for kind in kinds) for bit in TokenClass)
    return kinds, words, numbers, marks, rows, len(block) - blank


def _is_data(kinds: list[TokenClass], numbers: int, marks: int, written: int, config: RepetitionConfig) -> bool:
    return numbers + marks > config.max_data_share * written and not any(TokenClass.ANSWER in kind for kind in kinds)


def _is_plain(
    block: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8], *, in_tail: bool = False
) -> bool:
    kinds, words, numbers, marks, rows, written = _mix(block, classes)
    if _is_data(kinds, numbers, marks, written, config) and not (in_tail and len(block) == 1):
        # Around the corner: the block stands for its copies.
        begun = sum(TokenClass.NUMBER in kinds[i] and TokenClass.NUMBER not in kinds[i - 1] for i in range(len(block)))
        return in_tail and words + marks + rows == 0 and begun >= config.min_numbers
    return numbers + marks + rows == 0 or _has_distinct(block, config)


def _has_distinct(block: Sequence[int], config: RepetitionConfig) -> bool:
    return len(set(block)) >= min(len(block) // 2 + 1, config.min_distinct)


def _tail_ref(tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8]) -> RepetitionHit | None:
    tokens, n = list(tokens), len(tokens)
    for period in range(1, min(config.max_period, n // 2) + 1):
        block = tokens[n - period :]
        if any(period % d == 0 and block == block[:d] * (period // d) for d in range(1, period)):
            continue
        copies = 1
        while tokens[max(0, n - (copies + 1) * period) : n - copies * period] == block:
            copies += 1
        needed = (config.structured_copies, config.structured_tokens)
        if _is_plain(block, config, classes, in_tail=True):
            needed = (config.copies_of(period), config.min_tail_tokens)
        if copies >= needed[0] and copies * period >= needed[1]:
            return RepetitionHit("tail", n - 1, n - copies * period, period, copies)
    return None


def _substring_ref(tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8]) -> RepetitionHit | None:
    n, window = len(tokens), config.window
    if n < config.min_tokens:
        return None
    occurrences: dict[tuple[int, ...], list[int]] = {}
    for start in range(n - window + 1):
        starts = occurrences.setdefault(tuple(tokens[start : start + window]), [])
        if not starts or start >= starts[-1] + window:
            starts.append(start)
    best: list[int] = []
    for block, starts in occurrences.items():
        copies = len(starts)
        if copies < 2 or copies * window <= config.ratio * n or copies <= len(best):
            continue
        is_enough = copies >= config.structured_copies and copies * window >= config.structured_tokens
        if is_enough or _is_plain(block, config, classes):
            best = starts
    return RepetitionHit("substring", n - 1, best[0], window, len(best)) if best else None


def _near_ref(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8], scores: list[int]
) -> RepetitionHit | None:
    n = len(tokens)
    reached = [
        p
        for p in range(1, len(scores) - 1)
        if scores[p] >= max(config.near_tokens, (config.near_copies - 1) * p, config.near_edit_cost + 1)
        and scores[p] == max(scores[p - 1 : p + 2])
    ]
    if not reached or config.near_tokens == 0:
        return None
    period = reached[0]
    repeated = scores[period]
    copies = 1 + repeated // period
    judged = tokens[-config.near_tokens :]
    kinds, words, numbers, marks, _, written = _mix(judged, classes)
    if words < config.near_word_share * written or marks > config.near_mark_share * written:
        return None
    if _is_data(kinds, numbers, marks, written, config) or not _has_distinct(judged, config) or copies * period > n:
        return None
    equal = next((i for i in range(n - period) if tokens[n - 1 - i] != tokens[n - 1 - i - period]), n - period)
    if equal < config.near_edit_cost or (equal >= repeated and copies < config.near_exact_copies):
        return None
    return RepetitionHit("near", n - 1, n - copies * period, period, copies)
