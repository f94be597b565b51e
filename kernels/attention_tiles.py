"""What the kernels of paged attention share: the step of the running softmax, the fold of splits, tile sizes.

The sum over a context has two levels, whoever computes it. Within a split, a run of at most SPLIT keys, tiles of keys
go one after another through an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), begun anew for each
split. The results of splits are folded in ascending order, one at a time:

    m' = max(m, m_s),  total' = total 2^(m - m') + total_s 2^(m_s - m'),  acc' alike

A split that sees nothing has m_s = -1e38 and changes no bit. Products with a correction are fused multiply-adds by
name, so that no compiler chooses which of two products it rounds.
"""

# mypy: disable-error-code="no-untyped-def"

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 512
"""The most keys of a split, and where splits begin that must not depend on the batch. A partial result costs 1/64 of
the traffic of 512 keys (7 heads)."""

FINEST = 128
"""The fewest keys of a split where a small batch is cut finer to fill the card: a partial result costs 1/16 of them."""


class Problem(NamedTuple):
    """One call of paged attention, as its kernels take it: checked, in the layouts that they read."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    scale_log2e: float
    batch_invariant: bool
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        """Of a cache in 8 bits, as the kernels name them."""
        return {"k_scale_ptr": self.k_scales, "v_scale_ptr": self.v_scales}

    @property
    def group(self) -> int:
        """Query heads of each key-value head."""
        return self.q.shape[1] // self.k_cache.shape[2]

    @property
    def strides(self) -> tuple[int, ...]:
        """In the kernels' order."""
        return (self.q.stride(0), self.q.stride(1), *self.k_cache.stride()[:3], self.block_tables.stride(0))

    def config(self, kernel: str) -> dict[str, int]:
        """Constants, warps and stages of one of prefill, prefix and decode."""
        shape = {"BLOCK_SIZE": self.k_cache.shape[1], "GROUP": self.group, "DIM": self.q.shape[2]}
        hopper = capability(self.q.device) == 9
        sizes = (self.group, self.q.shape[2], self.q.itemsize)
        kind = {"batch_invariant": self.batch_invariant, "is_fp8": self.k_scales is not None}
        return shape | launch_config(kernel, *sizes, **kind, hopper=hopper)


@cache
def capability(device: torch.device) -> int:
    """The first number of a GPU's; that of Hopper where there is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; those of an H100 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch_config(
    kernel: str,
    group: int,
    dim: int,
    itemsize: int,
    *,
    batch_invariant: bool = False,
    is_fp8: bool = False,
    hopper: bool = True,
) -> dict[str, int]:
    """Tiles, warps and stages of one of prefill, prefix and decode.

    Rows are filled with the heads of a group (7 of them need no eighth) times queries or sequences. Decode is bound by
    reading keys: the 16 rows a tensor core wants at least. A prefix is read once for as many sequences as fit. Prefill
    takes what fills a Hopper SM with three tiles of keys and values on their way. Tiles of wide heads are smaller, so
    that nothing spills, as are those of a cache in 8 bits, which is widened in registers; those of float32 most, which
    has no tensor cores here.

    With batch_invariant all three multiply tiles of one shape, by one instruction: only then has a query the same bits
    whichever of them computes it. It is the largest for which prefill has the registers to keep two sums.
    """
    dim_padded = max(16, triton.next_power_of_2(dim))
    rows = {"prefill": 128, "prefix": 64, "decode": 16}[kernel]
    keys, warps, stages = 64, 8 if kernel == "prefill" else 4, 3
    if batch_invariant:
        rows, keys, warps = 64, 32, 4
    elif kernel == "prefill" and hopper:
        keys = 64 if is_fp8 else 128
    elif kernel == "prefix" and is_fp8:
        keys = 32
    if itemsize == 4 and dim_padded >= 64:
        rows, keys, stages = min(rows, 32), 16, 2
        warps = 16 if kernel == "prefix" and not batch_invariant else 8
    elif dim_padded > 128:
        rows, keys, warps, stages = min(rows, 64), 32, 8, 2
    config = {
        "DIM_PADDED": dim_padded,
        "ROWS": max(rows, triton.next_power_of_2(group)),
        "KEYS": keys,
        "num_warps": warps,
        "num_stages": stages,
    }
    return config | ({"LAST_KEYS": min(keys, 64)} if kernel == "prefill" else {})


@triton.jit
def run_of(starts_ptr, num_runs, tile, PER_TILE: tl.constexpr):
    """Of runs of things, starts[i] to starts[i + 1], the one that `tile` of PER_TILE things belongs to.

    Run i's tiles begin at number starts[i] // PER_TILE + i: at least as many as it needs, without anyone having to know
    the lengths on the host.
    """
    run = 0
    beyond = num_runs
    while run + 1 < beyond:
        middle = (run + beyond) // 2
        if tl.load(starts_ptr + middle) // PER_TILE + middle <= tile:
            run = middle
        else:
            beyond = middle
    return run


@triton.jit
def split_length(context, at_least, FINEST: tl.constexpr, SPLIT: tl.constexpr):
    """Keys of each split of a context that is to be cut into `at_least` splits or SPLIT keys, whichever is finer."""
    wanted = tl.cdiv(tl.cdiv(context, at_least), FINEST) * FINEST
    return tl.minimum(tl.maximum(wanted, FINEST), SPLIT)


@triton.jit
def nothing(ROWS: tl.constexpr, DIM_PADDED: tl.constexpr):
    """(largest score in octaves, sum of powers, weighted sum of values) of rows that have seen no key."""
    largest = tl.full([ROWS], -1.0e38, tl.float32)
    return largest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM_PADDED], tl.float32)


@triton.jit
def power_of_two(biased):
    """2^(biased - 127) of a byte, 0 for 0: it is the exponent of a float32."""
    return (biased.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def absorb(
    q,
    largest,
    total,
    acc,
    k_ptr,
    v_ptr,
    block,
    start,
    end,
    position,
    scale_log2e,
    block_stride,
    slot_stride,
    k_scale_ptr,
    v_scale_ptr,
    num_kv,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The running softmax of the rows of q, with the KEYS keys from `start` on, which lie in the blocks `block`. A row
    sees those up to its position and before `end`; where position is None, all of them.

    Of a cache in 8 bits, a key's scale multiplies its scores and a value's its weight, which are fewer numbers than
    codes are and, since scales are powers of two, rounds nothing: bits are those of a widened cache."""
    key = start + tl.arange(0, KEYS)
    dim = tl.arange(0, acc.shape[1])
    ok = (dim < DIM)[None, :]
    if position is not None:
        ok = ok & (key < end)[:, None]
    slot = block.to(tl.int64) * block_stride + (key % BLOCK_SIZE) * slot_stride
    k = tl.load(k_ptr + slot[:, None] + dim[None, :], mask=ok, other=0.0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if k_scale_ptr is not None:
        place = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * num_kv
        scores *= power_of_two(tl.load(k_scale_ptr + place, mask=key < end, other=0))[None, :]
    if position is not None:
        scores = tl.where(key[None, :] <= position[:, None], scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2e)
    p = tl.exp2(tl.fma(scores, scale_log2e, -new_largest[:, None]))
    correction = tl.exp2(largest - new_largest)
    total = tl.fma(total, correction, tl.sum(p, 1))
    v = tl.load(v_ptr + slot[:, None] + dim[None, :], mask=ok, other=0.0)
    if v_scale_ptr is not None:
        place = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * num_kv
        v_scale = power_of_two(tl.load(v_scale_ptr + place, mask=key < end, other=0))
        if q.dtype == tl.float16:  # whose exponents have no room for a weight times a scale
            v = v.to(tl.float32) * v_scale[:, None]
        else:
            p *= v_scale[None, :]
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * correction[:, None], input_precision="ieee")
    return new_largest, total, acc


@triton.jit
def fold(largest, total, acc, split_largest, split_total, split_acc):
    """One more split's result among those of the splits before it."""
    new_largest = tl.maximum(largest, split_largest)
    before = tl.exp2(largest - new_largest)
    weight = tl.exp2(split_largest - new_largest)
    total = tl.fma(total, before, split_total * weight)
    acc = tl.fma(acc, before[:, None], split_acc * weight[:, None])
    return new_largest, total, acc
