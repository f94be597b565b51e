"""Attention over packed sequences, and the one signature by which engine and trainer differ.

T packed tokens, S sequences, N query heads, K key/value heads, D head dim. Sequences lie one after another without
padding; their lengths are host integers, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from thyme.kernels.mrope import mrope


class Attention(Protocol):
    """Rotates queries and keys and lets the tokens attend. The rotation is the attention's, since an engine does it in
    the pass that writes its cache, and training where autograd sees it."""

    def __call__(self, layer: int, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        """
        Args:
            layer: index of the decoder layer.
            qkv: [T, N + 2 K, D], query, key and value heads as projected (and normalized), not rotated.
            num_kv_heads: K.
            cos, sin: [T, 1, D / 2] float32, the tokens' tables (thyme.kernels.mrope).

        Returns:
            [T, N, D] in qkv's dtype.
        """
        ...


# A causal batch may be padded until this share of its rows is padding; beyond it the sequences are split by length.
_MAX_PADDING = 0.25


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that go through one call: `count` rows of `length` tokens each."""

    count: int
    length: int
    start: int
    """First packed token, where the group is a run of equal lengths, which needs no copy."""
    gather: Tensor | None
    """Else: [count * length] i64, packed token of each padded slot; padding repeats the sequence's last token."""


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_Group, ...]
    restore: Tensor | None
    """[T] i64: row of the concatenated group outputs that belongs to each packed token; None: already in order."""


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """Each sequence attends to itself.

    Args:
        q: [T, N, D]; any row stride, so slices of a fused projection need no copy.
        k, v: [T, K, D], N a multiple of K.
        lengths: tokens of each sequence, sum T.
        causal: token i sees tokens <= i of its sequence; else all of them.
        scale: factor on q k^T; D ** -0.5 by default.

    Returns:
        [T, N, D] in q's dtype.

    Raises:
        ValueError: lengths do not add up to T, or one is not positive.
    """
    plan = _plan(tuple(lengths), causal, q.device)
    total = sum(group.count * group.length for group in plan.groups) if plan.restore is None else len(plan.restore)
    if total != len(q):
        raise ValueError(f"packed_attention: lengths add up to {total}, q has {len(q)} tokens")
    outputs = [_attend(q, k, v, group, causal, scale) for group in plan.groups]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if plan.restore is None else out.index_select(0, plan.restore)


class PackedAttention:
    """Causal attention over packed sequences, every token's keys in the same call: training, scoring, tests."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    def __call__(self, layer: int, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        turning, v = qkv.split((qkv.shape[1] - num_kv_heads, num_kv_heads), 1)
        q, k = mrope(turning, cos, sin).split((turning.shape[1] - num_kv_heads, num_kv_heads), 1)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, N, D] for rotated queries and keys."""
        return packed_attention(q, k, v, self.lengths, causal=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, group: _Group, causal: bool, scale: float | None) -> Tensor:
    rows = group.count * group.length

    def batched(x: Tensor) -> Tensor:
        if group.gather is not None:
            x = x.index_select(0, group.gather)
        elif rows != len(x):
            x = x[group.start : group.start + rows]
        return x.unflatten(0, (group.count, group.length)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        batched(q), batched(k), batched(v), is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # what an engine's step leaves here, training finds
def _plan(lengths: tuple[int, ...], causal: bool, device: torch.device) -> _Plan:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"packed_attention: every length must be at least 1, got {lengths or 'none'}")
    runs = _runs(lengths)
    if len(runs) == 1 or (not causal and len(runs) <= 8):
        return _Plan(tuple(_Group(count, length, start, None) for start, count, length in runs), None)
    starts = torch.tensor((0, *lengths)).cumsum(0)[:-1].tolist()
    groups: list[_Group] = []
    restore = torch.empty(sum(lengths), dtype=torch.int64)
    filled = 0
    for members in _by_length(lengths, causal):
        longest = lengths[members[0]]
        first = torch.tensor([starts[i] for i in members])[:, None]
        length = torch.tensor([lengths[i] for i in members])[:, None]
        slot = torch.arange(longest)[None, :]
        gather = first + slot.minimum(length - 1)
        real = slot < length
        restore[gather[real]] = filled + torch.arange(len(members) * longest).view(len(members), longest)[real]
        groups.append(_Group(len(members), longest, starts[members[0]], gather.flatten().to(device)))
        filled += len(members) * longest
    return _Plan(tuple(groups), restore.to(device))


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Maximal runs of equal neighbors as (first packed token, count, length)."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs


def _by_length(lengths: Sequence[int], causal: bool) -> list[list[int]]:
    """Sequence indices in groups, longest first.

    A causal group is padded on the right, where no real token looks; the padding stays under _MAX_PADDING. Without
    the causal mask padding would be seen, so only equal lengths share a group.
    """
    groups: list[list[int]] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        padded = (len(groups[-1]) + 1) * longest if groups else 0
        fits = padded * (1 - _MAX_PADDING) <= real + lengths[i] if causal else longest == lengths[i]
        if groups and fits:
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return groups
