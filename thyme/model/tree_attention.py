"""Causal attention over a tree of prefixes: packed sequences whose common beginnings are there once.

A token sees its node up to itself and all of its node's ancestors. Nodes lie depth first, so whoever sees a node whole
is one run of tokens behind it, and no key is copied for anyone: each node attends to itself, causally, and all that
descends from it to all of it. Of a token's parts, each a softmax over other keys with log-sum-exp l_i and output o_i,

    l = log sum_i exp(l_i)        o = sum_i exp(l_i - l) o_i

is the softmax over all of them. With p = exp(s - l) and delta = do . o of the whole, the gradient is a sum over parts,

    dv = p^T do        ds = p (do v^T - delta)        dq = scale ds k        dk = scale ds^T q

so that a node's keys and values get it from all that descends from them. It is flash attention's backward given l and o
of the whole, as in ring attention (Liu et al., arXiv 2310.01889). Nothing of the size tokens x tokens is stored.

Shapes: T packed tokens, N query heads, K key/value heads, D head dim; q, o [T, N, D]; k, v [T, K, D]; l [T, N].
Numerics: parts as their backend gives them (thyme.model.tree_parts), rounded to the inputs' dtype; they are put
together, and gradients added up, in float32 (float64 for float64).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme.model.attention import PackedAttention
from thyme.model.prefix_tree import PrefixTree
from thyme.model.tree_parts import Backend, Part, accumulator, backend_of, parts_of


class TreeAttention(PackedAttention):
    """`PackedAttention` over the nodes of a tree in place of sequences."""

    def __init__(self, tree: PrefixTree) -> None:
        super().__init__(tree.lengths)
        self.tree = tree

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, self.tree)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    backend: type[Backend] | None = None,
) -> Tensor:
    """Each token attends to its node up to itself, and to all of its node's ancestors.

    Args:
        q: [T, N, D]; any row stride, so slices of a fused projection need no copy.
        k, v: [T, K, D], N a multiple of K.
        tree: of the T tokens.
        scale: factor on q k^T; D ** -0.5 by default.
        backend: computes the parts; the fastest one by default.

    Returns:
        [T, N, D] in q's dtype.

    Raises:
        ValueError: the tree is of another number of tokens.
    """
    if sum(tree.lengths) != len(q):
        raise ValueError(f"tree_attention: the tree has {sum(tree.lengths)} tokens, q has {len(q)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attend.apply(q, k, v, tree, scale, backend or backend_of(q))
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float, backend: type[Backend]
    ) -> Tensor:
        wide = accumulator(q.dtype)
        out, lse = torch.empty(q.shape, dtype=wide, device=q.device), q.new_empty(q.shape[:2], dtype=wide)
        selves, ancestors = _plan(tree, q.device, backend.together)
        for part in selves:
            out[part.queries], lse[part.queries] = _forward(part, q, k, v, scale, backend)
        for part in ancestors:
            found, found_lse = _forward(part, q, k, v, scale, backend)
            had = lse[part.queries]
            both = torch.logaddexp(had, found_lse)
            was, new = ((x - both).exp()[..., None] for x in (had, found_lse))
            out[part.queries] = out[part.queries] * was + found * new
            lse[part.queries] = both
        rounded = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, rounded, lse)
        ctx.parts, ctx.scale, ctx.backend = (*selves, *ancestors), scale, backend
        return rounded

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for part in ctx.parts:
            queries = (x[part.queries] for x in (out, lse))
            seen = (grad[part.queries], q[part.queries], k[part.keys], v[part.keys], *queries)
            part_dq, part_dk, part_dv = ctx.backend.backward(part, *seen, ctx.scale)
            for total, where, found in (
                (dq, part.queries, part_dq),
                (dk, part.keys, part_dk),
                (dv, part.keys, part_dv),
            ):
                total[where] += found
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _forward(
    part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: type[Backend]
) -> tuple[Tensor, Tensor]:
    out, lse = backend.forward(part, q[part.queries], k[part.keys], v[part.keys], scale)
    return out.to(lse.dtype), lse


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _plan(tree: PrefixTree, device: torch.device, together: bool) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The nodes' own parts, and those of what descends from them, in an order in which they may be put together."""
    selves, levels = parts_of(tree, device, together=together)
    return tuple(selves), tuple(part for level in levels for part in level)
