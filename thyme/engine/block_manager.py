"""Blocks of the KV cache: who holds them, which are free, and which hold a prefix worth finding again.

Ints only, no tensor: what a block contains lives in the ModelRunner. Every operation on a block is O(1).

A sequence that runs refers to its blocks; one that does not run only claims them (`parking.py`). A block that is
claimed and not referred to is idle: it keeps what it holds, and yet is available to those that run.

A full block may be published under (node, content): `content` is what its tokens are, `node` stands for everything
before it. Publishing yields the node of the longer prefix, so nodes form a tree whose root is the empty prefix under
the present weights. Contents are compared, not only hashed, and a node is never used twice: two prefixes meet in a node
only if they are equal token by token and image by image.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable


class BlockManager:
    """Owns the reference counts, the free list and the prefix tree of `num_blocks` blocks.

    The free list is in the order of reuse: blocks without a published prefix first, then published ones, the one free
    for longest first. A free published block can be shared again until it is reused.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.root = 0
        self.on_reuse: Callable[[int, int], None] | None = None
        """Is told of a block that will not be found any more, since it is about to be written to, and of its node."""
        self._num_nodes = 1
        self._references = [0] * num_blocks
        self._claims = [0] * num_blocks
        self.num_idle = 0
        """Blocks that are claimed and not referred to."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._published: dict[tuple[int, Hashable], tuple[int, int]] = {}  # (node, content) -> (block, node after it)
        self._key_of: dict[int, tuple[int, Hashable]] = {}  # the inverse: block -> its key

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to or claims."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that those that run can have: free ones, and idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to or claims."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A block that nobody else holds; what was published in it is forgotten. One must be free."""
        assert self._free, "no free block: the scheduler must make room before it allocates"
        block, _ = self._free.popitem(last=False)
        self._unpublish(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more that refers to it; the block may be free if it is published."""
        if self._references[block] == 0:
            if self._claims[block]:
                self.num_idle -= 1
            else:
                del self._free[block]
        self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        """Held more than once."""
        return self._references[block] + self._claims[block] > 1

    def must_copy(self, block: int) -> bool:
        """To be copied before a holder of a part of it writes the rest: others hold it, or it is published in full."""
        return self.is_shared(block) or block in self._key_of

    def withdraw(self, block: int) -> None:
        """What is published in a block is not found again."""
        if self._unpublish(block) and block in self._free:
            self._free.move_to_end(block, last=False)

    def _unpublish(self, block: int) -> bool:
        """Whether it was published."""
        if (key := self._key_of.pop(block, None)) is None:
            return False
        _, node = self._published.pop(key)
        if self.on_reuse is not None:
            self.on_reuse(block, node)
        return True

    def is_idle(self, block: int) -> bool:
        """Claimed, and not referred to."""
        return self._references[block] == 0 and self._claims[block] > 0

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of these nobody refers to: sharing them takes as many from what is available."""
        return sum(self._references[block] == 0 for block in blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less for each block. A sequence's blocks come last to first: ends of prefixes are reused
        first."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._claims[block]:
                    self.num_idle += 1
                else:
                    self._set_free(block)

    def claim(self, blocks: Iterable[int]) -> None:
        """References become claims: their holder has stopped running."""
        for block in blocks:
            self._claims[block] += 1
        self.release(blocks)

    def reclaim(self, blocks: Iterable[int]) -> None:
        """Claims become references again."""
        for block in blocks:
            self.share(block)
            self._claims[block] -= 1

    def forfeit(self, block: int) -> None:
        """One claim less."""
        assert self._claims[block] > 0, f"block {block} forfeited more often than claimed"
        self._claims[block] -= 1
        if self._claims[block] == 0 and self._references[block] == 0:
            self.num_idle -= 1
            self._set_free(block)

    def _set_free(self, block: int) -> None:
        self._free[block] = None
        if block not in self._key_of:
            self._free.move_to_end(block, last=False)

    def publish(self, block: int, node: int, content: Hashable) -> int:
        """Makes a full block findable and returns the node after it; an equal block that is there already stays the one
        that is found."""
        key = (node, content)
        if (known := self._published.get(key)) is not None:
            return known[1]
        after = self._num_nodes
        self._num_nodes += 1
        if block not in self._key_of:  # a block belongs to one prefix
            self._published[key] = (block, after)
            self._key_of[block] = key
        return after

    def find(self, node: int, content: Hashable) -> tuple[int, int] | None:
        """(block, node after it) of an equal published block."""
        return self._published.get((node, content))

    def node_of(self, block: int) -> int | None:
        """The node after a published block."""
        key = self._key_of.get(block)
        return None if key is None else self._published[key][1]

    def forget_prefixes(self) -> None:
        """Nothing published before is found again: the weights have changed. Blocks stay with their holders; free ones
        are reused before those that nobody has ever had, whose memory has yet to be got."""
        self.root = self._num_nodes
        self._num_nodes += 1
        for block in sorted(self._key_of, reverse=True):
            if block in self._free:
                self._free.move_to_end(block, last=False)
        self._published.clear()
        self._key_of.clear()

    def check_integrity(self, tables: Iterable[Iterable[int]], claimed: Iterable[Iterable[int]] = ()) -> None:
        """Raises RuntimeError unless the counts are those of `tables`, the blocks of each holder that runs, and of
        `claimed`, those of each that does not, and all agrees."""
        for name, counts, holders in (("held", self._references, tables), ("claimed", self._claims, claimed)):
            counted = [0] * self.num_blocks
            for table in holders:
                for block in table:
                    counted[block] += 1
            wrong = [b for b in range(self.num_blocks) if counted[b] != counts[b]]
            if wrong:
                b = wrong[0]
                raise RuntimeError(f"{len(wrong)} blocks miscounted: block {b} has {counts[b]}, {name} {counted[b]}x")
        pairs = list(zip(self._references, self._claims, strict=True))
        if set(self._free) != {block for block, pair in enumerate(pairs) if pair == (0, 0)}:
            raise RuntimeError("the free list is not the set of blocks nobody holds")
        if self.num_idle != sum(references == 0 and claims > 0 for references, claims in pairs):
            raise RuntimeError("idle blocks are miscounted")
        if {key: block for key, (block, _) in self._published.items()} != {k: b for b, k in self._key_of.items()}:
            raise RuntimeError("published prefixes and their blocks disagree")
        seen_published = False
        for block in self._free:
            seen_published |= block in self._key_of
            if seen_published and block not in self._key_of:
                raise RuntimeError(f"free block {block} has no prefix but would be reused after one that has")
