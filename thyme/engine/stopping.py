"""When a round ends. Looked at for all sequences at once; only what is rare is looked at one by one."""

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from thyme.engine.sequence import FinishReason, Sequence
from thyme.engine.sequence_table import SequenceTable
from thyme.engine.tags import ENDING_EVENTS, IS_ENDING, TagEvent
from thyme.repetition import RepetitionConfig, RepetitionDetector, RepetitionHit, token_classes

StopReason = str | int | None


class _Cause(IntEnum):
    """What ends a round; of several at the same token the first counts."""

    NONE = 0
    EOS = 1
    STOP_ID = 2
    TAG = 3
    STOP_TEXT = 4
    REPETITION = 5
    LENGTH = 6
    CONTEXT = 7


_REASON = {
    _Cause.EOS: FinishReason.EOS,
    _Cause.STOP_ID: FinishReason.STOP,
    _Cause.TAG: FinishReason.STOP,
    _Cause.STOP_TEXT: FinishReason.STOP,
    _Cause.REPETITION: FinishReason.REPETITION,
    _Cause.LENGTH: FinishReason.LENGTH,
    _Cause.CONTEXT: FinishReason.CONTEXT,
}


class TextMatcher:
    """Finds stop texts in tokens that come one by one; a text may begin and end inside a token."""

    def __init__(self, texts: tuple[str, ...], token_bytes: Callable[[int], bytes]) -> None:
        self._texts = [(text, text.encode()) for text in texts]
        self._keep = max(len(raw) for _, raw in self._texts) - 1
        self._token_bytes = token_bytes
        self._tail = b""

    def push(self, token: int) -> str | None:
        """The stop text that this token completes, if any: the one that ends first, of these the longest."""
        seen = self._tail + self._token_bytes(token)
        ends = [(seen.find(raw) + len(raw), -len(raw), text) for text, raw in self._texts if raw in seen]
        self._tail = seen[max(0, len(seen) - self._keep) :]
        return min(ends)[2] if ends else None


class StopChecker:
    """Watches the open rounds. Owns the repetition detector and what is particular to single sequences."""

    def __init__(
        self,
        table: SequenceTable,
        repetition: RepetitionConfig,
        capacity: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        token_bytes: Callable[[int], bytes] | None,
    ) -> None:
        """
        Args:
            table: of all live sequences.
            repetition: what counts as a loop.
            capacity: rounds that may be open at once, running or preempted.
            vocab_size: ids of the model.
            eos_token_ids: ids that end a sequence.
            token_bytes: what a token adds to the text, for stop texts.
        """
        self.table = table
        classes = None if token_bytes is None else token_classes(map(token_bytes, range(vocab_size)))
        self._detector = RepetitionDetector(repetition, capacity, classes)
        self._is_eos = np.zeros(vocab_size, dtype=bool)
        self._is_eos[list(eos_token_ids)] = True
        self._token_bytes = token_bytes
        self._matchers: dict[int, TextMatcher] = {}  # by row
        self._stop_ids: dict[int, frozenset[int]] = {}

    def open(self, sequence: Sequence) -> None:
        """A round begins."""
        row, params = sequence.row, sequence.params
        assert row is not None
        if params.repetition is not None:
            self.table.detector_slots[row] = self._detector.open()
            self.table.is_watched[row] = True
        if params.stop:
            assert self._token_bytes is not None
            self._matchers[row] = TextMatcher(params.stop, self._token_bytes)
        if params.stop_token_ids:
            self._stop_ids[row] = frozenset(params.stop_token_ids)

    def close(self, row: int) -> None:
        """The round is over, if one was open."""
        if self.table.is_watched[row]:
            self._detector.close(int(self.table.detector_slots[row]))
            self.table.is_watched[row] = False
        self._matchers.pop(row, None)
        self._stop_ids.pop(row, None)

    def hit(self, row: int) -> RepetitionHit | None:
        """What repetition was found in the row's open round."""
        return self._detector.hit(int(self.table.detector_slots[row])) if self.table.is_watched[row] else None

    def check(
        self, rows: NDArray[np.int64], token_ids: NDArray[np.int64], events: NDArray[np.uint8]
    ) -> list[tuple[int, FinishReason, StopReason]]:
        """(row, why, what) of the rounds that end with these tokens, which the table has already."""
        table = self.table
        length = table.num_known[rows]
        cause = np.where(length >= table.max_context, _Cause.CONTEXT, _Cause.NONE)
        cause[length >= table.round_end[rows]] = _Cause.LENGTH
        watched = np.flatnonzero(table.is_watched[rows])
        looped = self._detector.push(table.detector_slots[rows[watched]], token_ids[watched].astype(np.int32))
        cause[watched[looped > 0]] = _Cause.REPETITION
        listed = rows.tolist()
        texts: dict[int, str] = {}
        for i, row in enumerate(listed) if self._matchers else ():
            if row in self._matchers and (text := self._matchers[row].push(int(token_ids[i]))) is not None:
                texts[row] = text
                cause[i] = _Cause.STOP_TEXT
        cause[IS_ENDING[events] & table.stops_at_tags[rows]] = _Cause.TAG
        for i, row in enumerate(listed) if self._stop_ids else ():
            if row in self._stop_ids and int(token_ids[i]) in self._stop_ids[row]:
                cause[i] = _Cause.STOP_ID
        cause[self._is_eos[token_ids] & table.stops_at_eos[rows]] = _Cause.EOS

        ends: list[tuple[int, FinishReason, StopReason]] = []
        for i in np.flatnonzero(cause):
            row, why = listed[i], _Cause(int(cause[i]))
            what: StopReason = None
            if why is _Cause.STOP_ID:
                what = int(token_ids[i])
            elif why is _Cause.TAG:
                what = ENDING_EVENTS[TagEvent(int(events[i]))]
            elif why is _Cause.STOP_TEXT:
                what = texts[row]
            ends.append((row, _REASON[why], what))
        return ends
