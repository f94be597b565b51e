"""How many tokens of the prompts under way are unlike each other: the least that sharing leaves to compute."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

_DIGEST = 32  # bytes


def content_of(token_ids: NDArray[np.int32], digests: Sequence[str], image_starts: Sequence[int]) -> bytes:
    """Four bytes for each id, and the digest of each image before its first: equal only for equal prompts, and as far
    as they are equal."""
    parts, done = [], 0
    for digest, start in zip(digests, image_starts, strict=True):
        parts += [token_ids[done:start].tobytes(), sha256(digest.encode()).digest()]
        done = start
    return b"".join([*parts, token_ids[done:].tobytes()])


class LivePrompts:
    """A sorted list of contents: what is most like a prompt is its neighbor."""

    def __init__(self) -> None:
        self._sorted: list[bytes] = []
        self._holders: Counter[bytes] = Counter()

    def add(self, content: bytes, image_starts: Sequence[int]) -> int:
        """One more request with this prompt; returns how many of its tokens begin no other prompt that is here."""
        length = (len(content) - _DIGEST * len(image_starts)) // 4
        self._holders[content] += 1
        if self._holders[content] > 1:
            return 0
        at = bisect_left(self._sorted, content)
        alike = max((_common(content, other) for other in self._sorted[max(0, at - 1) : at + 1]), default=0)
        self._sorted.insert(at, content)
        for number, start in enumerate(image_starts):
            header = 4 * start + _DIGEST * number
            if alike < header + _DIGEST + 4:  # not the same image
                return length - min(start, (alike - _DIGEST * number) // 4)
        return length - (alike - _DIGEST * len(image_starts)) // 4

    def remove(self, content: bytes) -> None:
        """One request with this prompt less."""
        self._holders[content] -= 1
        if not self._holders[content]:
            del self._holders[content]
            del self._sorted[bisect_left(self._sorted, content)]


def _common(one: bytes, other: bytes) -> int:
    """Leading bytes that agree."""
    length = min(len(one), len(other))
    a, b = (np.frombuffer(content, dtype=np.uint8, count=length) for content in (one, other))
    different = a != b
    return int(different.argmax()) if different.any() else length
