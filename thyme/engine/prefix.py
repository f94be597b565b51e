"""Prefixes of sequences in the KV cache: full blocks are published, and found again when another sequence begins alike.

The tree of published blocks is the BlockManager's; what stands in a block is known here.
"""

import numpy as np
from numpy.typing import NDArray

from thyme.engine.block_manager import BlockManager
from thyme.engine.sequence import Sequence
from thyme.engine.sequence_table import SequenceTable


class PrefixCache:
    """Walks the blocks of a sequence down the tree of published prefixes."""

    def __init__(self, table: SequenceTable, blocks: BlockManager) -> None:
        self.table = table
        self.blocks = blocks

    def find(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(block, node after it) of the published blocks that the sequence begins with, in order.

        Its last token is always left to compute. None are looked for where the sequence holds blocks.
        """
        if sequence.row is None:
            token_ids = sequence.prompt.token_ids
        elif self.table.num_blocks[sequence.row]:
            return []
        else:
            token_ids = self.table.token_ids[sequence.row, : self.table.num_tokens[sequence.row]]
        hits: list[tuple[int, int]] = []
        node = self.blocks.root
        for index in range((len(token_ids) - 1) // self.table.block_size):
            found = self.blocks.find(node, self._content(sequence, token_ids, index))
            if found is None:
                break
            hits.append(found)
            node = found[1]
        return hits

    def publish(self, sequence: Sequence, num_full: int) -> None:
        """Publishes the first `num_full` blocks of the sequence, as far as they are not; all must be computed."""
        assert sequence.row is not None
        token_ids = self.table.token_ids[sequence.row]
        for index in range(sequence.num_published, num_full):
            block = int(self.table.block_tables[sequence.row, index])
            sequence.node = self.blocks.publish(block, sequence.node, self._content(sequence, token_ids, index))
        sequence.num_published = num_full

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
