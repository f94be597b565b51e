"""KV in host memory: which blocks of sequences that do not run are there, and which come back with the next step.

Ints only, as the BlockManager's: the bytes are HostMemory's. A sequence that loses a block is noted as lacking it. What
is published keeps being found in the cache, and is copied when the block is about to be reused; anything else is copied
at once. Siblings that lack the same published block have one copy. It is given up when nobody lacks it any more, when
there is no room (what was copied first goes first: it is of those that are away for longest, and of their ends), and
when the weights change.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thyme.engine.sequence import Sequence
from thyme.engine.step_cost import StepCost

Key = int | tuple[int, int, int]
"""Node of the prefix tree after a published block; of any other its sequence's id, its place there, and how many tokens
count in it."""

RATES = {"cuda": (2e10, 4e14), "cpu": (5e9, 2e11)}
"""Bytes a second between device and host memory, and flops a second of a model's products, by type of device: of the
order that a card on PCIe and two cores have."""


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Whether to copy a block out and back, or to compute its tokens again."""

    block_bytes: int
    token_flops: int
    """Of the products with the weights."""
    pair_flops: int
    """Of one query and one key."""
    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def of(cls, cost: StepCost, block_bytes: int, device: str) -> Tradeoff:
        """Of a model on a type of device."""
        return cls(block_bytes, 2 * cost.layer_weights, cost.attention_flops, *RATES[device])

    def copies(self, start: int, count: int) -> bool:
        """Copying takes less time than computing `count` tokens of which the first is the sequence's `start`-th."""
        flops = count * self.token_flops + (count * start + count * (count + 1) // 2) * self.pair_flops
        return 2 * self.block_bytes / self.bytes_per_s < flops / self.flops_per_s


class HostKv:
    """Places for `num_slots` blocks; with none it does nothing.

    Args:
        counts: where blocks that were copied and dropped are counted.
        tradeoff: what is worth a copy; None: everything.
    """

    def __init__(self, num_slots: int, counts: Counter[str], tradeoff: Tradeoff | None = None) -> None:
        self.num_slots = num_slots
        self.counts = counts
        self.tradeoff = tradeoff
        self._free = list(range(num_slots))
        self._retired: list[int] = []  # free once what is planned has been copied
        self._slots: OrderedDict[Key, int] = OrderedDict()  # the block copied first comes first
        self._lacking: Counter[Key] = Counter()  # sequences that lack it
        self._away: dict[int, dict[int, tuple[Key, int]]] = {}  # by id and place: the block, tokens that count in it
        self._saves: dict[int, int] = {}  # slot -> block; planned, as is what follows
        self._restores: dict[int, list[int]] = {}  # slot -> blocks

    def __len__(self) -> int:
        return len(self._slots)

    def lose(
        self, sequence: Sequence, place: int, block: int, count: int, node: int | None, *, block_size: int
    ) -> None:
        """A sequence gives up a block with the KV of `count` of its tokens; `node`: under which it is published."""
        if not self.num_slots or (self.tradeoff and not self.tradeoff.copies(place * block_size, count)):
            return
        is_published = count == block_size and len(sequence.nodes) > place + 1
        key: Key = sequence.nodes[place + 1] if is_published else (sequence.id, place, count)
        self._note(sequence.id, place, key, count)
        if key != node and key not in self._slots:
            self._save(key, block)

    def reuse(self, block: int, node: int) -> None:
        """A block published under the node is about to be written over."""
        if node in self._lacking and node not in self._slots:
            self._save(node, block)

    def inherit(self, source: Sequence, sequence: Sequence, length: int, block_size: int) -> None:
        """A branch lacks what its source does, as far as it has its first `length` tokens."""
        for place, (key, count) in self._away.get(source.id, {}).items():
            if place * block_size < length:
                self._note(sequence.id, place, key, min(count, length - place * block_size))

    def next(self, sequence: Sequence, place: int) -> int | None:
        """Place of the sequence's next block, from `place` on, that is here."""
        away = self._away.get(sequence.id, {})
        return min((at for at, (key, _) in away.items() if at >= place and key in self._slots), default=None)

    def count(self, sequence: Sequence, place: int) -> int:
        """Tokens that count in a block of the sequence that is here."""
        return self._away[sequence.id][place][1]

    def restore(self, sequence: Sequence, place: int, allocate: Callable[[], int]) -> int:
        """The next step brings a block of the sequence back, to one that is allocated here and returned."""
        targets = self._restores.setdefault(self._slots[self._away[sequence.id][place][0]], [])
        targets.append(allocate())  # which may make others come here; the slot is not given to them any more
        self.skip(sequence, place)
        return targets[-1]

    def skip(self, sequence: Sequence, place: int) -> None:
        """A sequence does not lack a block that it may have lacked."""
        if (known := self._away.get(sequence.id, {}).pop(place, None)) is not None:
            self._unlack(known[0])

    def close(self, sequence: Sequence) -> None:
        """A sequence is over."""
        for place in list(self._away.get(sequence.id, ())):
            self.skip(sequence, place)
        self._away.pop(sequence.id, None)

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What was planned, for the step: [2, saves] blocks and the slots they go to, all of which is copied before
        [2, restores] slots and the blocks they go to."""
        saves = self._saves
        restores = [(slot, block) for slot, blocks in self._restores.items() for block in blocks]
        self.counts["host_blocks_out"] += len(saves)
        self.counts["host_blocks_in"] += len(restores)
        self._saves, self._restores = {}, {}
        self._free += self._retired
        self._retired.clear()
        return (
            np.array([list(saves.values()), list(saves)], dtype=np.int64),
            np.array(restores, dtype=np.int64).reshape(-1, 2).T,
        )

    def cancel_saves(self) -> None:
        """What is planned to be copied is gone before it was."""
        for key, slot in list(self._slots.items()):
            if slot in self._saves:
                self._drop(key)

    def forget(self) -> None:
        """Nothing that is here is used again."""
        self.counts["host_blocks_dropped"] += len(self._slots)
        self._free, self._retired = list(range(self.num_slots)), []
        for planned in (self._slots, self._lacking, self._away, self._saves, self._restores):
            planned.clear()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every slot is in one place and everything here is lacked by somebody."""
        if sorted([*self._free, *self._retired, *self._slots.values()]) != list(range(self.num_slots)):
            raise RuntimeError("slots of host memory are lost or used twice")
        lacking = Counter(key for away in self._away.values() for key, _ in away.values())
        if lacking != self._lacking or not set(self._slots) <= set(lacking):
            raise RuntimeError("blocks in host memory are miscounted")

    def _note(self, sequence_id: int, place: int, key: Key, count: int) -> None:
        away = self._away.setdefault(sequence_id, {})
        known = away.pop(place, None)
        self._lacking[key] += 1
        away[place] = key, count
        if known is not None:
            self._unlack(known[0])

    def _unlack(self, key: Key) -> None:
        self._lacking[key] -= 1
        if not self._lacking[key]:
            del self._lacking[key]
            if key in self._slots:
                self._retire(self._slots.pop(key))

    def _save(self, key: Key, block: int) -> None:
        while not self._free and self._slots:
            self._drop(next(iter(self._slots)))
        if not self._free:
            self.counts["host_blocks_dropped"] += 1
            return
        self._slots[key] = slot = self._free.pop()
        self._saves[slot] = block

    def _drop(self, key: Key) -> None:
        self._retire(self._slots.pop(key))
        self.counts["host_blocks_dropped"] += 1

    def _retire(self, slot: int) -> None:
        """Nobody comes for it any more but the step that is planned."""
        if slot in self._restores:
            self._retired.append(slot)
        else:
            self._saves.pop(slot, None)
            self._free.append(slot)
