"""Prefixes of sequences in the KV cache: full blocks are published, and found again when another sequence begins alike.

The tree of published blocks is the BlockManager's; what stands in a block is known here. What is not found may be in
host memory (host_kv.py).
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from thyme.engine.block_manager import BlockManager
from thyme.engine.host_kv import HostKv
from thyme.engine.sequence import Sequence
from thyme.engine.sequence_table import SequenceTable


class PrefixCache:
    """Walks the blocks of a sequence down the tree of published prefixes.

    Args:
        table, blocks: of all sequences.
        host: what sequences have in host memory.
        counts: where tokens that were saved are counted.
        is_on: else nothing is published, and nothing found.
    """

    def __init__(
        self, table: SequenceTable, blocks: BlockManager, host: HostKv, counts: Counter[str], *, is_on: bool
    ) -> None:
        self.table = table
        self.blocks = blocks
        self.host = host
        self.counts = counts
        self.is_on = is_on

    def find(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(block, node after it) of the published blocks that go on where the sequence's own end, in order.

        Its last token is always left to compute, and the first whose logits are asked for. There are none where its
        last block is not full.
        """
        if not self.is_on:
            return []
        start, node = 0, self.blocks.root
        token_ids = self._tokens(sequence)
        if sequence.row is not None and self.table.num_blocks[sequence.row]:
            start, node = int(self.table.num_blocks[sequence.row]), sequence.nodes[-1]
            if len(sequence.nodes) <= start:
                return []
        end, row = len(token_ids) - 1, sequence.row
        if row is not None and self.table.score_start[row] < self.table.score_end[row]:
            end = int(self.table.score_start[row])
        hits: list[tuple[int, int]] = []
        for index in range(start, end // self.table.block_size):
            found = self.blocks.find(node, self._content(sequence, token_ids, index))
            if found is None:
                break
            hits.append(found)
            node = found[1]
        return hits

    def publish(self, sequence: Sequence, num_full: int) -> None:
        """Publishes the first `num_full` blocks of the sequence, as far as they are not; they are computed, or will be
        by the step that is being planned."""
        if not self.is_on:
            return
        token_ids, nodes = self._tokens(sequence), sequence.nodes
        for index in range(len(nodes) - 1, num_full):
            block = int(self.table.block_tables[sequence.row, index])
            nodes.append(self.blocks.publish(block, nodes[-1], self._content(sequence, token_ids, index)))

    def next_block(self, sequence: Sequence) -> tuple[int, object] | None:
        """(node, content) of the block after the published ones; None where the known tokens do not fill it."""
        token_ids, index = self._tokens(sequence), len(sequence.nodes) - 1
        if not self.is_on or (index + 1) * self.table.block_size > len(token_ids):
            return None
        return sequence.nodes[-1], self._content(sequence, token_ids, index)

    def recover(self, sequence: Sequence, allocate: Callable[[], int]) -> int | None:
        """Gives a sequence that runs and whose blocks are full what is to be had of those that come next: published
        ones, and else what host memory has of its own, as far as there is room for that and, after it, for one token
        more. Returns the place of the next that host memory has."""
        table, row, size = self.table, sequence.row, self.table.block_size
        assert row is not None
        while table.num_computed[row] == (place := int(table.num_blocks[row])) * size:
            if hits := self.find(sequence):
                self._share(sequence, hits)
                continue
            if self.host.next(sequence, place) != place:
                break
            end = place * size + self.host.count(sequence, place)
            if self.blocks.blocks_for(min(end + 1, int(table.num_tokens[row]))) - place > self.blocks.num_available:
                if self.blocks.num_available:  # room for some tokens, and these are computed
                    self.host.skip(sequence, place)
                break
            block = self.host.restore(sequence, place, allocate)
            table.block_tables[row, place], table.num_blocks[row], table.num_computed[row] = block, place + 1, end
            self.counts["restored_tokens"] += end - place * size
            self.publish(sequence, end // size)
        return self.host.next(sequence, int(table.num_blocks[row]))

    def _share(self, sequence: Sequence, hits: list[tuple[int, int]]) -> None:
        """Gives a sequence the published blocks that come next."""
        table, row = self.table, sequence.row
        assert row is not None
        start, seen = int(table.num_blocks[row]), max(int(table.num_seen[row]), int(table.num_computed[row]))
        for index, (block, node) in enumerate(hits, start):
            self.blocks.share(block)
            self.host.skip(sequence, index)
            table.block_tables[row, index] = block
            sequence.nodes.append(node)
        table.num_blocks[row] = start + len(hits)
        table.num_computed[row] = table.num_blocks[row] * table.block_size
        self.counts["cached_tokens"] += max(0, int(table.num_computed[row]) - seen)

    def _tokens(self, sequence: Sequence) -> NDArray[np.int32]:
        if sequence.row is None:
            return sequence.prompt.token_ids
        return self.table.token_ids[sequence.row, : self.table.num_known[sequence.row]]

    def _content(self, sequence: Sequence, token_ids: NDArray[np.int32], index: int) -> object:
        """What stands in a block: its ids, and for the images it shows which part of which."""
        size = self.table.block_size
        start, end = index * size, (index + 1) * size
        content = token_ids[start:end].tobytes()
        if not sequence.images:
            return content
        images = tuple(
            (image.digest, start - first)
            for image, first in zip(sequence.images, sequence.image_starts, strict=True)
            if first < end and start < first + image.num_tokens
        )
        return (content, images) if images else content
