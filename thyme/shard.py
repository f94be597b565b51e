"""Which part of some work is this machine's. Standard library only."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the work is this machine's: item i where i % count == index - 1."""

    index: int = 1
    count: int = 1

    @staticmethod
    def read(text: str) -> "Shard":
        """The shard that "2/8" names: the second of eight; "" is all of the work.

        Raises:
            ValueError: it names none.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard: {text!r} must be i/n with i from 1 to n, such as 2/8")
        return Shard(int(match[1]), int(match[2]))

    def has(self, item: int) -> bool:
        """Whether the item at this place is its own."""
        return item % self.count == self.index - 1

    @property
    def name(self) -> str:
        """As files of shards are named: 00001-of-00008."""
        return f"{self.index - 1:05d}-of-{self.count:05d}"
