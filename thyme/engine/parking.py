"""KV of sequences that do not run: kept for as long as it is cheaper to keep than to compute again.

Held between two rounds, preempted, or appended to and waiting for a place: such a sequence claims its blocks and refers
to none, so whatever runs or is admitted can have them, and never waits for it. What is taken is taken from the ends of
sequences, one block at a time; the rest is found as it was when the sequence runs again. What is taken may go to host
memory (host_kv.py).
"""

import time
from collections import Counter
from dataclasses import dataclass

from thyme.engine.block_manager import BlockManager
from thyme.engine.host_kv import HostKv
from thyme.engine.sequence import Sequence
from thyme.engine.sequence_table import SequenceTable


@dataclass(slots=True)
class _Parked:
    sequence: Sequence
    since: float | None
    """When its round ended, in seconds of the clock; None: it waits for its place, and for nobody outside."""
    num_shared: int
    """Its blocks that others referred to when it was parked."""
    was_cut: bool = False


class Parking:
    """The sequences with blocks that do not run.

    Those between rounds are pinned: what they keep outlasts the prefix cache, within a budget of blocks and a limit of
    time. Beyond these their blocks go to the prefix cache, where they are found again until they are reused.

    Args:
        table, blocks: of all sequences.
        counts: where evictions are counted.
        host: is told what is taken.
        pin_blocks: most idle blocks while some sequence is between its rounds; None: no limit.
        pin_seconds: longest time that a sequence is pinned; None: no limit.
    """

    def __init__(
        self,
        table: SequenceTable,
        blocks: BlockManager,
        counts: Counter[str],
        host: HostKv,
        pin_blocks: int | None,
        pin_seconds: float | None,
    ) -> None:
        self.table = table
        self.blocks = blocks
        self.counts = counts
        self.host = host
        self.pin_blocks = pin_blocks
        self.pin_seconds = pin_seconds
        self.clock = time.monotonic
        self.mean_pause = 0.0
        """Seconds between two rounds, the latest count most."""
        self._parked: dict[int, _Parked] = {}  # by id, parked for longest first
        self._num_pinned = 0

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.id in self._parked

    @property
    def num_pinned(self) -> int:
        """Sequences between their rounds with blocks."""
        return self._num_pinned

    def park(self, sequence: Sequence, *, between_rounds: bool) -> None:
        """A sequence has stopped running."""
        held = self.table.blocks(_row(sequence))
        self.blocks.claim(held[::-1])
        since = self.clock() if between_rounds else None
        self._parked[sequence.id] = _Parked(sequence, since, len(held) - self.blocks.num_unreferenced(held))
        self._num_pinned += between_rounds

    def recall(self, sequence: Sequence) -> None:
        """Its next round is asked for."""
        if (parked := self._parked.get(sequence.id)) is not None and parked.since is not None:
            pause = self.clock() - parked.since
            self.mean_pause = 0.9 * self.mean_pause + 0.1 * pause if self.mean_pause else pause
            parked.since = None
            self._num_pinned -= 1

    def unpark(self, sequence: Sequence) -> None:
        """It runs again, with what it has left."""
        if self._forget(sequence):
            self.blocks.reclaim(self.table.blocks(_row(sequence)))

    def drop(self, sequence: Sequence, *, keeps: bool = False) -> None:
        """Gives all its blocks up, if it is here; `keeps`: it may have them back from host memory."""
        if self._forget(sequence):
            while self.table.num_blocks[_row(sequence)]:
                self._cut(sequence, keeps=keeps)

    def make_room(self) -> None:
        """Frees a block; some must be idle.

        It is taken from the sequence whose blocks are idle for longest, as far as can be told, for each token that must
        be computed again: those between rounds first, by the pause to be expected, then the youngest that waits.
        """
        now = self.clock() if self._num_pinned else 0.0
        while not self.blocks.num_free:
            with_idle = [parked for parked in self._parked.values() if self._has_idle(parked)]
            self._take(max(with_idle, key=lambda parked: self._gain(parked, now)))

    def enforce_limits(self) -> None:
        """Unpins what is beyond the limits of time and memory."""
        if not self._num_pinned:
            return
        now = self.clock()
        pinned = [parked for parked in self._parked.values() if parked.since is not None]
        if self.pin_seconds is not None:
            for parked in pinned:
                assert parked.since is not None
                if now - parked.since <= self.pin_seconds:
                    break
                self.drop(parked.sequence, keeps=True)
                self.counts["expired_pins"] += 1
        while self._num_pinned and self.pin_blocks is not None and self.blocks.num_idle > self.pin_blocks:
            pinned = [p for p in self._parked.values() if p.since is not None and self._has_idle(p)]
            if not pinned:
                break
            self._take(max(pinned, key=lambda parked: self._gain(parked, now)))

    def claimants(self, block: int) -> list[Sequence]:
        """Who of those that are parked claims a block."""
        parked = [parked.sequence for parked in self._parked.values()]
        return [sequence for sequence in parked if block in self.table.blocks(_row(sequence))]

    def tables(self) -> list[list[int]]:
        """Blocks of each sequence here."""
        return [self.table.blocks(_row(parked.sequence)) for parked in self._parked.values()]

    # Which, and how.

    def _gain(self, parked: _Parked, now: float) -> tuple[float, int]:
        """Blocks times seconds that its blocks would be idle, over the tokens that they hold."""
        if parked.since is None:
            return 0.0, parked.sequence.id
        pause = max(self.mean_pause, now - parked.since)  # who has been away for long stays away for long
        table, row = self.table, _row(parked.sequence)
        tokens = int(table.num_computed[row]) - parked.num_shared * table.block_size
        return pause * (int(table.num_blocks[row]) - parked.num_shared) / max(tokens, 1), parked.sequence.id

    def _has_idle(self, parked: _Parked) -> bool:
        return any(self.blocks.is_idle(block) for block in reversed(self.table.blocks(_row(parked.sequence))))

    def _take(self, parked: _Parked) -> None:
        """Cuts its blocks off until one is free, or it has none."""
        if not parked.was_cut:
            parked.was_cut = True
            self.counts["evictions"] += 1
        free = self.blocks.num_free
        while self.blocks.num_free == free and self.table.num_blocks[_row(parked.sequence)]:
            self._cut(parked.sequence, keeps=True)
            self.counts["evicted_blocks"] += 1
        if not self.table.num_blocks[_row(parked.sequence)]:
            self._forget(parked.sequence)

    def _cut(self, sequence: Sequence, *, keeps: bool) -> None:
        """Takes the last block off."""
        table, row, size = self.table, _row(sequence), self.table.block_size
        left = int(table.num_blocks[row]) - 1
        block = int(table.block_tables[row, left])
        count = min(int(table.num_computed[row]) - left * size, size)
        if keeps and count > 0 and sequence.nodes[0] == self.blocks.root:  # it has nothing of earlier weights
            self.host.lose(sequence, left, block, count, self.blocks.node_of(block), block_size=size)
        self.blocks.forfeit(block)
        table.num_blocks[row] = left
        if count >= 0:
            table.num_computed[row] = left * size
            table.has_shared_tail[row] = False
        del sequence.nodes[left + 1 :]
        if left == 0:
            sequence.nodes = [self.blocks.root]

    def _forget(self, sequence: Sequence) -> bool:
        parked = self._parked.pop(sequence.id, None)
        if parked is not None and parked.since is not None:
            self._num_pinned -= 1
        return parked is not None


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None
    return sequence.row
