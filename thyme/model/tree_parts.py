"""Attention of some packed tokens to some others, with log-sum-exps, forward and backward: a part of a tree's.

A backend computes a part, out [Tq, N, D] in the inputs' dtype and lse [Tq, N] in float32 (float64 for float64), and its
gradients given out and lse of the whole softmax that the part belongs to (thyme.model.tree_attention).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from thyme.model.prefix_tree import PrefixTree

_log = logging.getLogger(__name__)

Grads = tuple[Tensor, Tensor, Tensor]
Run = tuple[int, int]
"""Packed tokens: the first, and the one behind the last."""
_BLOCK = 256
"""Queries whose scores plain torch has at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Pairs of a run of queries and the run of keys that these see; no query is in two of them."""

    queries: slice | Tensor
    """The packed tokens that look, one pair after another: a run of them, or i64."""
    keys: slice | Tensor
    """Those they look at."""
    query_lengths: tuple[int, ...]
    """Of each pair."""
    key_lengths: tuple[int, ...]
    causal: bool
    """Queries and keys are the same, and none sees what comes after it; else all see all."""
    cu_queries: Tensor
    """[pairs + 1] i32, on the queries' device."""
    cu_keys: Tensor


class Backend(Protocol):
    """How a part is computed; `together` says which pairs may be in one: any, or those of equal lengths."""

    together: bool

    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def backward(
        part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads: ...


class CpuFlash:
    """torch's flash attention for CPUs, on pairs of equal lengths as a batch."""

    together = False

    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        pairs = len(part.query_lengths)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _batch(q, pairs), _batch(k, pairs), _batch(v, pairs), 0.0, part.causal, scale=scale
        )
        return _flat(out), _flat(lse)

    @staticmethod
    def backward(
        part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        pairs = len(part.query_lengths)
        tensors = [_batch(x, pairs) for x in (grad, q, k, v, out, lse)]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, part.causal, scale=scale
        )
        return _flat(dq), _flat(dk), _flat(dv)


class CudaFlash:
    """torch's flash attention for GPUs in 16 bits, any pairs in one launch."""

    together = True

    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        longest = (max(part.query_lengths), max(part.key_lengths))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, part.cu_queries, part.cu_keys, *longest, 0.0, part.causal, False, scale=scale
        )
        return out, lse.transpose(0, 1)

    @staticmethod
    def backward(
        part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        longest = (max(part.query_lengths), max(part.key_lengths))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        tensors = (grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous())
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *tensors, part.cu_queries, part.cu_keys, *longest, 0.0, part.causal, *no_dropout, scale=scale
        )
        return dq, dk, dv


class Plain:
    """Plain torch, by blocks of queries: the definition, and where no flash attention is."""

    together = False

    @staticmethod
    def forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
        for at, keys, scores in _scores(part, q, k, scale):
            lse[at] = scores.logsumexp(-1).flatten(0, 1).T
            weights = (scores - lse[at].T.unflatten(0, scores.shape[:2])[..., None]).exp()
            out[at] = _ungrouped(weights @ _heads(v[keys])[:, None]).to(q.dtype)
        return out, lse

    @staticmethod
    def backward(
        part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        dq, dk, dv = (torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (q, k, v))
        for at, keys, scores in _scores(part, q, k, scale):
            weights = (scores - lse[at].T.unflatten(0, scores.shape[:2])[..., None]).exp()  # [K, G, L, keys]
            do, o = (_grouped(x[at], k.shape[1]) for x in (grad, out))
            dv[keys] += (weights.transpose(-1, -2) @ do).sum(1).transpose(0, 1)
            ds = weights * (do @ _heads(v[keys])[:, None].transpose(-1, -2) - (do * o).sum(-1, keepdim=True))
            dq[at] = scale * _ungrouped(ds @ _heads(k[keys])[:, None])
            dk[keys] += scale * (ds.transpose(-1, -2) @ _grouped(q[at], k.shape[1])).sum(1).transpose(0, 1)
        return dq, dk, dv


def backend_of(q: Tensor) -> type[Backend]:
    """The fastest there is for these queries."""
    if q.device.type == "cpu":
        return CpuFlash
    is_short = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return CudaFlash if q.device.type == "cuda" and is_short and serves(CudaFlash, q.device, q.dtype) else Plain


@lru_cache(maxsize=16)
def serves(backend: type[Backend], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend computes here what plain torch does: what it calls in torch is private, and may change."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(size, heads, 64, generator=generator).to(device, dtype)
        for size, heads in ((8, 4), (12, 2), (12, 2), (8, 4))
    )
    ends = [torch.tensor([0, one, 2 * one], dtype=torch.int32, device=device) for one in (4, 6)]
    part = Part(
        queries=slice(0, 8),
        keys=slice(0, 12),
        query_lengths=(4, 4),
        key_lengths=(6, 6),
        causal=False,
        cu_queries=ends[0],
        cu_keys=ends[1],
    )
    out, lse = Plain.forward(part, q, k, v, 0.125)
    expected = [out, lse, *Plain.backward(part, grad, q, k, v, out, lse, 0.125)]
    found: Any
    try:
        found = [*backend.forward(part, q, k, v, 0.125), *backend.backward(part, grad, q, k, v, out, lse, 0.125)]
        agrees = all(torch.allclose(a.float(), b.float(), atol=0.03) for a, b in zip(found, expected, strict=True))
    except (RuntimeError, TypeError, AttributeError) as error:
        found, agrees = str(error).partition("\n")[0], False
    if not agrees:
        _log.warning(
            "torch %s: %s does not compute what plain torch does on %s in %s (%s): shared prefixes take plain torch, "
            "which is slower; rl.share_prefixes = false leaves them out",
            *(torch.__version__, backend.__name__, device, dtype, found if isinstance(found, str) else "other values"),
        )
    return agrees


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which sums are made."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parts_of(tree: PrefixTree, device: torch.device, *, together: bool) -> tuple[list[Part], list[list[Part]]]:
    """How the nodes see themselves, and then how what descends from them sees the nodes, by the nodes' depth.

    Args:
        together: pairs of different lengths may be in one part.
    """
    starts, ends, depths = tree.starts, tree.ends, tree.depths
    own = [(start, start + n) for start, n in zip(starts, tree.lengths, strict=True)]
    selves = _grouped_pairs([(node, node) for node in own], device, causal=True, together=together)
    levels: list[list[tuple[Run, Run]]] = [[] for _ in range(max(depths) + 1)]
    for node, end, depth in zip(own, ends, depths, strict=True):
        if end > node[1]:
            levels[depth].append(((node[1], end), node))
    return selves, [_grouped_pairs(level, device, causal=False, together=together) for level in levels if level]


def _grouped_pairs(
    pairs: Sequence[tuple[Run, Run]], device: torch.device, *, causal: bool, together: bool
) -> list[Part]:
    groups: dict[tuple[int, int], list[tuple[Run, Run]]] = {}
    for queries, keys in pairs:
        key = (0, 0) if together else (queries[1] - queries[0], keys[1] - keys[0])
        groups.setdefault(key, []).append((queries, keys))
    return [_part([q for q, _ in group], [k for _, k in group], device, causal) for group in groups.values()]


def _part(queries: Sequence[Run], keys: Sequence[Run], device: torch.device, causal: bool) -> Part:
    query_lengths, key_lengths = (tuple(end - start for start, end in runs) for runs in (queries, keys))
    return Part(
        queries=_where(queries, device),
        keys=_where(keys, device),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        causal=causal,
        cu_queries=torch.tensor((0, *query_lengths)).cumsum(0).to(device, torch.int32),
        cu_keys=torch.tensor((0, *key_lengths)).cumsum(0).to(device, torch.int32),
    )


def _where(runs: Sequence[Run], device: torch.device) -> slice | Tensor:
    if all(before[1] == after[0] for before, after in pairwise(runs)):
        return slice(runs[0][0], runs[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in runs]).to(device)


def _scores(part: Part, q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """By blocks of a pair's queries: which they are, their keys, and scores [K, N / K, L, keys]."""
    first_query = first_key = 0
    for queries, keys in zip(part.query_lengths, part.key_lengths, strict=True):
        seen = slice(first_key, first_key + keys)
        for start in range(0, queries, _BLOCK):
            end = min(start + _BLOCK, queries)
            at = slice(first_query + start, first_query + end)
            scores = scale * _grouped(q[at], k.shape[1]) @ _heads(k[seen])[:, None].transpose(-1, -2)
            if part.causal:
                later = torch.arange(keys, device=q.device) > torch.arange(start, end, device=q.device)[:, None]
                scores = scores.masked_fill(later, -torch.inf)
            yield at, seen, scores
        first_query, first_key = first_query + queries, first_key + keys


def _heads(x: Tensor) -> Tensor:
    """[L, K, D] -> [K, L, D] in which sums are made."""
    return x.transpose(0, 1).to(accumulator(x.dtype))


def _grouped(x: Tensor, num_kv: int) -> Tensor:
    """[L, N, D] -> [K, N / K, L, D], the query heads by the key/value head they read."""
    return _heads(x).unflatten(0, (num_kv, -1))


def _ungrouped(x: Tensor) -> Tensor:
    """[K, N / K, L, D] -> [L, N, D]."""
    return x.flatten(0, 1).transpose(0, 1)


def _batch(x: Tensor, pairs: int) -> Tensor:
    """[pairs * L, N, ...] -> [pairs, N, L, ...]."""
    return x.unflatten(0, (pairs, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """Its inverse."""
    return x.transpose(1, 2).flatten(0, 1)
