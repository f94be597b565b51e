"""Groups of sequences whose first blocks are the same: found in block tables, checked, read together in decode."""

from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from thyme.kernels import attention_tiles
from thyme.kernels.checks import check_tensor, values_visible


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Neighbouring sequences whose first blocks are the same, as the samples of one prompt: a group.

    In decode the whole splits of a prefix are read once for all of its group (Juravsky et al. 2024, Hydragen; Ye et al.
    2024, cascade attention); what is left of it each sequence reads with its own tokens. Splits, tiles of keys and
    their order are the same with it and without, unless a small batch is cut finer without. On a GPU the result is
    equal up to rounding all the same: tiles of more rows are multiplied and summed by other instructions, unless
    batch_invariant makes all tiles alike.
    """

    cu_groups: Tensor
    """[K + 1] int32, from 0 to B: group i is the sequences cu_groups[i] to cu_groups[i + 1] - 1."""
    num_blocks: Tensor
    """[K] int32: the table entries, from the first on, that are equal throughout a group; no new token lies there."""

    @classmethod
    def find(
        cls,
        block_tables: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        query_lens: NDArray[np.int64],
        block_size: int,
        device: torch.device,
        *,
        num_groups: int | None = None,
    ) -> "SharedPrefix | None":
        """The groups of a batch, told by its block tables; None where nothing can be read together.

        Neighbours that decode and have a whole split in common are of one group, unless one of the two has more splits
        in common with its neighbour on the other side: below a system prompt that all share lie the groups.

        Args:
            block_tables, context_lens: as in `paged_attention`, on the host.
            query_lens: [B], new tokens of each sequence.
            device: where attention will be computed.
            num_groups: make K this, whatever is shared, and never return None: a captured graph has one K. What is too
                many begins where the batch ends. B is always enough.

        Raises:
            ValueError: the arrays are not of the same sequences, or there are more than num_groups.
        """
        found = shared_groups(block_tables, context_lens, query_lens, block_size, num_groups=num_groups)
        if found is None:
            return None
        return cls(*(torch.from_numpy(array).to(device, non_blocking=True) for array in found))


def shared_groups(
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    query_lens: NDArray[np.int64],
    block_size: int,
    *,
    num_groups: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """(cu_groups, num_blocks) of `SharedPrefix.find`, on the host."""
    if not len(block_tables) == len(context_lens) == len(query_lens):
        rows = [len(array) for array in (block_tables, context_lens, query_lens)]
        raise ValueError(f"block_tables, context_lens, query_lens must have a row for each sequence, got {rows}")
    found = _groups(block_tables, context_lens, query_lens == 1, block_size)
    if found is None and num_groups is None:
        return None
    starts, num_blocks = found or (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    missing = 0 if num_groups is None else num_groups - len(starts)
    if missing < 0:
        raise ValueError(f"{len(starts)} groups share a prefix, which is more than num_groups ({num_groups})")
    cu_groups = np.append(starts, np.full(missing + 1, len(context_lens))).astype(np.int32)
    return cu_groups, np.append(num_blocks, np.zeros(missing, dtype=np.int64)).astype(np.int32)


def _groups(
    block_tables: NDArray[np.int32], context_lens: NDArray[np.int32], decodes: NDArray[np.bool_], block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """(the first sequence of each group, entries that it shares); None: nothing can be read together."""
    complete = np.where(decodes, np.maximum(context_lens - 1, 0) // block_size, 0)
    most = np.minimum(complete[:-1], complete[1:])
    # Of the first split's last block, which is enough to look at where nothing is shared.
    column = triton.cdiv(attention_tiles.SPLIT, block_size) - 1
    at_end = block_tables[:, column : column + 1]
    if not (at_end[:-1] == at_end[1:])[most > column].any():
        return None
    width = most.max()
    differs = block_tables[:-1, :width] != block_tables[1:, :width]
    first = differs.argmax(1)
    common = np.minimum(most, np.where(differs[np.arange(len(first)), first], first, width))
    splits = np.zeros(len(common) + 2, dtype=np.int64)
    splits[1:-1] = common * block_size // attention_tiles.SPLIT
    apart = splits[1:-1] < np.maximum(np.maximum(splits[:-2], splits[2:]), 1)
    if apart.all():
        return None
    starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    nobody = np.iinfo(np.int32).max
    num_blocks = np.minimum.reduceat(np.append(np.where(apart, nobody, common), nobody), starts)
    return starts, np.where(num_blocks == nobody, 0, num_blocks)


def check_shared_prefix(
    k_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor, shared: SharedPrefix | None
) -> None:
    """Raises ValueError unless the groups are of this batch and share what they say."""
    if shared is None:
        return
    groups, prefix = shared.cu_groups, shared.num_blocks
    check_tensor("shared.num_blocks", prefix, (None,), (torch.int32,), k_cache.device)
    check_tensor("shared.cu_groups", groups, (len(prefix) + 1,), (torch.int32,), k_cache.device)
    if not values_visible(k_cache):
        return
    num_seqs = len(context_lens)
    if groups[0] != 0 or groups[-1] != num_seqs or bool((groups.diff() < 0).any()):
        raise ValueError(f"shared.cu_groups must run from 0 to the {num_seqs} sequences, got {groups.tolist()[:16]}")
    if num_seqs == 0:
        return
    old_blocks = (context_lens - cu_seqlens_q.diff()).clamp(min=0) // k_cache.shape[1]
    group_of = torch.arange(len(prefix), device=prefix.device).repeat_interleave(groups.diff())
    bad = (prefix[group_of] < 0) | (prefix[group_of] > old_blocks)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"shared.num_blocks[{group_of[at]}] is {prefix[group_of[at]]}, sequence {at} of that group has "
            f"{old_blocks[at]} full blocks before its new tokens"
        )
    column = torch.arange(block_tables.shape[1], device=prefix.device)
    differs = (block_tables != block_tables[groups[group_of].long()]) & (column < prefix[group_of][:, None])
    if bool(differs.any()):
        row, at = differs.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{row}][{at}] is {block_tables[row, at]}, not what the first sequence of its group has, "
            f"though shared.num_blocks[{group_of[row]}] is {prefix[group_of[row]]}"
        )
