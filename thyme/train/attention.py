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
from thyme.model.attention import PackedAttention, packed_attention


class RolloutAttention(PackedAttention):
    """The engine's kernel forward, over the packed keys as a cache of blocks of one token; the gradient is that of
    `packed_attention`, computed anew in the backward."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.context_lens = torch.tensor(self.lengths, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(self.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self.block_tables = self.cu_seqlens[:-1, None] + torch.arange(max(self.lengths), dtype=torch.int32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Attend.apply(q, k, v, self)
        return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: RolloutAttention) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths = attention.lengths
        k_cache, v_cache = (x.contiguous()[:, None] for x in (k, v))
        tables, contexts, cumulative = attention.block_tables, attention.context_lens, attention.cu_seqlens
        return paged_attention(q, k_cache, v_cache, tables, contexts, cumulative, scale=q.shape[-1] ** -0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = packed_attention(q, k, v, ctx.lengths, causal=True)
        return *torch.autograd.grad(out, (q, k, v), grad), None
