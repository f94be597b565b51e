"""Attention of training with the bits of the rollout.

Everything else in the model works row by row, so with it the log-probs that training computes are those that a
deterministic engine on a CPU recorded, bit for bit: at the first update every ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thyme.kernels.paged_attention import paged_attention
from thyme.model.attention import PackedAttention
from thyme.model.prefix_tree import PrefixTree
from thyme.model.tree_attention import TreeAttention


class RolloutAttention(PackedAttention):
    """The engine's kernel forward, over the packed keys as a cache of blocks of one token; the gradient is that of
    `packed_attention`, or of `tree_attention`, computed anew in the backward.

    A node of a tree is to the kernel what a chunk of a prompt is: queries whose context is the way from the root.
    """

    def __init__(self, lengths: Sequence[int], tree: PrefixTree | None = None) -> None:
        super().__init__(lengths)
        self.differentiable = PackedAttention(lengths) if tree is None else TreeAttention(tree)
        own = torch.tensor(self.lengths, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(own.cumsum(0, dtype=torch.int32), (1, 0))
        if tree is None:
            self.context_lens = own
            self.block_tables = self.cu_seqlens[:-1, None] + torch.arange(max(self.lengths), dtype=torch.int32)
        else:
            self.context_lens, self.block_tables = _contexts(tree)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Attend.apply(q, k, v, self)
        return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: RolloutAttention) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.differentiable = attention.differentiable
        k_cache, v_cache = (x.contiguous()[:, None] for x in (k, v))
        tables, contexts, cumulative = attention.block_tables, attention.context_lens, attention.cu_seqlens
        return paged_attention(q, k_cache, v_cache, tables, contexts, cumulative, scale=q.shape[-1] ** -0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = ctx.differentiable.attend(q, k, v)
        return *torch.autograd.grad(out, (q, k, v), grad), None


def _contexts(tree: PrefixTree) -> tuple[Tensor, Tensor]:
    """By node, tokens from the root to its end, and which they are; both int32, the latter [nodes, longest]."""
    starts = tree.starts
    runs = [torch.arange(start, start + n) for start, n in zip(starts, tree.lengths, strict=True)]
    ways = [torch.cat([runs[node] for node in tree.path(last)]) for last in range(len(runs))]
    tables = torch.nn.utils.rnn.pad_sequence(ways, batch_first=True).to(torch.int32)
    return torch.tensor([len(way) for way in ways], dtype=torch.int32), tables
