"""What a step must move and compute at least, from the model's weights and the batch.

Bytes: the decoder's weights once, the LM head's once where logits are made, a row of the embedding per token, the KV of
every sequence's context once, the KV of the step's tokens written, and the vision tower's weights and patches where
pictures are encoded. Activations and logits are left out. Flops: two per weight of a matrix and row, and the products
of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from thyme.engine.batch import Batch
from thyme.model.model import Model
from thyme.model.rope import Grid
from thyme.model.vision import grid_layout


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine does at most, as it was measured."""

    copy_bytes_per_s: float
    """Bytes read plus bytes written by a large copy."""
    matmul_flops_per_s: float
    """Of a large product in the model's dtype."""

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for so much work."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a step or a part of one."""

    bytes: int
    flops: int


class StepCost:
    """Counts steps of an engine's model.

    Args:
        model: whose weights are read; those of adapters count too.
        shares_prefixes: full blocks that sequences share are read once for all of them.
    """

    def __init__(self, model: Model, block_size: int, *, shares_prefixes: bool = False) -> None:
        text, decoder = model.config.text, model.decoder
        self._block_size, self._shares = block_size, shares_prefixes
        self.layer_bytes = sum(p.nbytes for p in decoder.parameters()) - decoder.embed_tokens.weight.nbytes
        self.layer_weights = _matrix_weights(decoder.layers)
        self.head_weights, self.head_bytes = model.lm_head_weight.numel(), model.lm_head_weight.nbytes
        self.embedding_row = text.hidden_size * model.dtype.itemsize
        self.kv_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
        self.attention_flops = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
        """Of one query and one key, in all layers."""
        self._vision, self._itemsize = model.visual, model.dtype.itemsize
        self._device = torch.device("cpu")

    def of(self, batch: Batch, encoded: Sequence[Grid] = ()) -> Cost:
        """The cost of a step that encodes pictures of these grids."""
        pictures = self.pictures(encoded)
        tokens, contexts = batch.num_tokens, batch.context_lens.astype(np.int64)
        rows = len(batch.logit_tokens) + len(batch.branched)
        num_bytes, flops = pictures.bytes, pictures.flops
        if tokens:
            num_bytes += self.layer_bytes + tokens * self.embedding_row
            num_bytes += self.kv_token * (self._keys_read(batch, contexts) + tokens)
            flops += 2 * self.layer_weights * tokens + self.attention_flops * causal_pairs(batch.counts, contexts)
        if rows:
            num_bytes += self.head_bytes
            flops += 2 * self.head_weights * rows
        return Cost(num_bytes, flops)

    def pictures(self, grids: Sequence[Grid]) -> Cost:
        """The cost of encoding pictures."""
        tower = self._vision
        if tower is None or not grids:
            return Cost(0, 0)
        config = tower.config
        patches = sum(rows * columns for _, rows, columns in grids)
        merged = patches // config.spatial_merge_size**2
        per_patch = tower.patch_embed.weight.numel() + _matrix_weights(tower.blocks)
        flops = 2 * (per_patch * patches + _matrix_weights(tower.merger) * merged)
        full = len(config.fullatt_block_indexes)
        for grid in grids:
            windows = grid_layout(config, (int(grid[0]), int(grid[1]), int(grid[2])), self._device).windows
            whole = int(grid[1]) * int(grid[2])
            pairs = full * whole**2 + (config.depth - full) * sum(length**2 for length in windows)
            flops += 4 * config.hidden_size * pairs
        weights = sum(p.nbytes for p in tower.parameters())
        return Cost(weights + patches * config.patch_dim * self._itemsize, flops)

    def _keys_read(self, batch: Batch, contexts: NDArray[np.int64]) -> int:
        read = int(contexts.sum())
        if not self._shares:
            return read
        full = contexts // self._block_size
        blocks = np.concatenate([table[:count] for table, count in zip(batch.block_tables, full, strict=True)])
        return read - self._block_size * (len(blocks) - len(np.unique(blocks)))


def causal_pairs(counts: NDArray[np.int64], contexts: NDArray[np.int64]) -> int:
    """Pairs of a query and a key that it sees, where the last `counts` tokens of each context are the queries."""
    return int((counts * contexts - counts * (counts - 1) // 2).sum())


def _matrix_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
