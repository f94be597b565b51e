"""The results of a decoded sequence's splits, folded in ascending order."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.attention_tiles import FINEST, fold, nothing, split_length

AT_ONCE = 8
"""Splits whose results are asked for together, before the first of them is folded."""


@triton.jit(do_not_specialize=["at_least", "num_splits"])
def _merge_kernel(
    context_ptr,
    cu_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    at_least,
    num_splits,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FINEST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program per query head and decoded sequence of more than one split."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(cu_ptr + sequence)
    context = tl.load(context_ptr + sequence)
    length = split_length(context, at_least, FINEST, SPLIT)
    if (tl.load(cu_ptr + sequence + 1) - token != 1) | (context <= length):
        return
    dim = tl.arange(0, DIM_PADDED)[None, :]
    used = tl.cdiv(context, length)
    largest, total, acc = nothing(1, DIM_PADDED)
    one = tl.arange(0, 1)
    for start in range(0, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = start + i + one
            place = (tl.cast(sequence, tl.int64) * num_splits + split) * tl.num_programs(0) + head
            part_largest = tl.load(stats_ptr + place * 2, mask=split < used, other=-1.0e38)
            part_total = tl.load(stats_ptr + place * 2 + 1, mask=split < used, other=0.0)
            ok = (split < used)[:, None] & (dim < DIM)
            part = tl.load(partial_ptr + place[:, None] * DIM + dim, mask=ok, other=0.0)
            largest, total, acc = fold(largest, total, acc, part_largest, part_total, part)
    out = out_ptr + (tl.cast(token, tl.int64) * tl.num_programs(0) + head) * DIM + dim
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=dim < DIM)


def merge(
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    partial: Tensor,
    stats: Tensor,
    out: Tensor,
    at_least: int,
    split: int,
) -> None:
    """Fills in the rows of decoded sequences of several splits, cut as for `decode`."""
    num_heads, dim = out.shape[1:]
    _merge_kernel[(num_heads, len(context_lens))](
        context_lens,
        cu_seqlens_q,
        partial,
        stats,
        out,
        at_least,
        partial.shape[1],
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        AT_ONCE=AT_ONCE,
        FINEST=min(FINEST, split),
        SPLIT=split,
        num_warps=1,
    )
