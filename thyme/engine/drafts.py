"""What a sequence may draw next: what followed on the tokens that it ends in, where they last occurred before. Looked
for in its prompt, in itself, in whatever else was drawn after the same prompt, now or in an earlier epoch, and in one
text of each other prompt.

A draft is a guess that a step tries out; a bad one costs time and changes nothing. Standard library only.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

MATCHES = (12, 6, 3)
"""Tokens that must agree with the end of a sequence, tried in this order."""
_ENTRY_BYTES = 150  # of a run of tokens that is indexed: its place in the dict, key and value
_TOKEN_BYTES = 4


class _Source:
    """The texts behind one prompt, the prompt being the first, and where each run of tokens occurred last in them."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self.nbytes = 0
        self.is_known = False
        """One of its texts is known to the sequences of other prompts."""
        self._texts: list[array[int]] = []
        self._indexed: list[int] = []
        self._numbers: dict[int, int] = {}  # of a sequence that goes on, by id: of its text
        self._stale: dict[int, None] = {}  # texts that are not indexed to their ends
        self._after: dict[int, int] = {}  # hash of a run -> number of the text << 32 | index of what follows
        self._grow(self._new(), prompt)

    def length(self, key: int) -> int:
        """Tokens that are known of a sequence."""
        number = self._numbers.get(key)
        return 0 if number is None else len(self._texts[number])

    def grow(self, key: int, token_ids: Iterable[int]) -> None:
        """More tokens of a sequence."""
        if key not in self._numbers:
            self._numbers[key] = self._new()
        self._grow(self._numbers[key], token_ids)

    def close(self, key: int) -> array[int]:
        """A sequence has ended; its text stays, and is returned."""
        number = self._numbers.pop(key, None)
        return array("i") if number is None else self._texts[number]

    def after(self, tail: Sequence[int], most: int) -> tuple[array[int], int]:
        """What followed where the tail occurred last, and how many of its tokens agree there."""
        for number in self._stale:
            self._index(number)
        self._stale.clear()
        for length in MATCHES:
            if length > len(tail):
                continue
            place = self._after.get(hash(tuple(tail[-length:])))
            if place is not None:
                index = place & 0xFFFFFFFF
                return self._texts[place >> 32][index : index + most], length
        return array("i"), 0

    def _new(self) -> int:
        self._texts.append(array("i"))
        self._indexed.append(MATCHES[-1])
        return len(self._texts) - 1

    def _grow(self, number: int, token_ids: Iterable[int]) -> None:
        text = self._texts[number]
        before = len(text)
        text.extend(token_ids)
        self.nbytes += _TOKEN_BYTES * (len(text) - before)
        self._stale[number] = None

    def _index(self, number: int) -> None:
        """A run counts once a token follows it: the end of a text is not found as what it ends in itself."""
        text, after, known = self._texts[number], self._after, len(self._after)
        for index in range(self._indexed[number], len(text)):
            for length in MATCHES:
                if length <= index:
                    after[hash(tuple(text[index - length : index]))] = number << 32 | index
        self._indexed[number] = max(len(text), MATCHES[-1])
        self.nbytes += _ENTRY_BYTES * (len(after) - known)


class Drafts:
    """Sources by prompt, and one for all.

    Args:
        max_bytes: of all sources, as estimated; those unused for longest are forgotten first, and one that takes a
            quarter is begun anew.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._own_bytes = 0
        self._sources: OrderedDict[bytes, _Source] = OrderedDict()
        self._common = _Source()

    @property
    def nbytes(self) -> int:
        """Of all sources, as estimated."""
        return self._own_bytes + self._common.nbytes

    def length(self, prompt: bytes, key: int) -> int:
        """Tokens that are known of the sequence `key` behind the prompt."""
        source = self._sources.get(prompt)
        return 0 if source is None else source.length(key)

    def grow(self, prompt: bytes, prompt_ids: Iterable[int], key: int, token_ids: Iterable[int]) -> None:
        """More tokens of a sequence.

        Args:
            prompt: what tells its prompt from others.
            prompt_ids: the prompt's tokens, read where it is new here.
            key: of the sequence.
            token_ids: what follows on the `length` tokens that are known.
        """
        source = self._sources.get(prompt)
        if source is None:
            source = self._sources[prompt] = _Source(prompt_ids)
            self._own_bytes += source.nbytes + len(prompt)
        self._sources.move_to_end(prompt)
        before = source.nbytes
        source.grow(key, token_ids)
        self._own_bytes += source.nbytes - before
        self._shrink(prompt)

    def close(self, prompt: bytes, key: int) -> None:
        """A sequence has ended."""
        if (source := self._sources.get(prompt)) is None:
            return
        text = source.close(key)
        if not source.is_known and len(text):
            source.is_known = True
            self._common.grow(key, text)
            self._common.close(key)
            self._shrink()

    def after(self, prompt: bytes, tail: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that may follow on the tail, and how many tokens of it they are told from, 0 for no
        draft."""
        source = self._sources.get(prompt)
        if source is None:
            return [], 0
        before = source.nbytes
        draft, length = source.after(tail, most)
        self._own_bytes += source.nbytes - before
        if length < MATCHES[0]:
            elsewhere, agreed = self._common.after(tail, most)
            if agreed > length:
                draft, length = elsewhere, agreed
        self._shrink(prompt)
        return draft.tolist(), length

    def _shrink(self, prompt: bytes | None = None) -> None:
        """Forgets what is too much, after something of this prompt has grown."""
        if 4 * self._common.nbytes > self.max_bytes:
            self._common = _Source()
        if prompt is not None and 4 * self._sources[prompt].nbytes > self.max_bytes:
            self._forget(prompt)
        while self.nbytes > self.max_bytes:
            self._forget(next(iter(self._sources)))

    def _forget(self, prompt: bytes) -> None:
        self._own_bytes -= self._sources.pop(prompt).nbytes + len(prompt)
