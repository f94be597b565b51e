"""RolloutAttention: the forward of the engine, the gradient of packed attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.paged_attention import paged_attention
from thyme.model.attention import PackedAttention
from thyme.train.attention import RolloutAttention


@pytest.mark.parametrize("lengths", [(1,), (5, 5, 5), (3, 70, 1, 130)], ids=str)
def test_forward_is_the_engines_and_gradient_packed_attentions(lengths: tuple[int, ...], tolerances: Any) -> None:
    fused = torch.randn(sum(lengths), 4 + 2 * 2, 12)  # views of one projection, as in the decoder

    def run(attention: PackedAttention) -> tuple[Tensor, Tensor]:
        qkv = fused.clone().requires_grad_()
        out = attention.attend(*qkv.split((4, 2, 2), 1))
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out).cumsum(0))
        return out.detach(), grad

    (out, grad), (packed, packed_grad) = run(RolloutAttention(lengths)), run(PackedAttention(lengths))
    atol, rtol = tolerances["attention", torch.float32]
    torch.testing.assert_close(out, packed, atol=atol, rtol=rtol)
    assert torch.equal(grad, packed_grad)

    # As the engine had it: the last token of each sequence decoded from a cache of larger blocks, in another order.
    size, order = 16, list(range(len(lengths)))[::-1]
    blocks = [-(-length // size) for length in lengths]
    q, k, v = fused.split((4, 2, 2), 1)
    caches = torch.full((2, sum(blocks), size, 2, 12), torch.nan)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    ends = torch.tensor(lengths).cumsum(0)
    for i, length in enumerate(lengths):
        first = sum(blocks[:i])
        tables[i, : blocks[i]] = torch.arange(first, first + blocks[i])
        for cache, x in zip(caches, (k, v), strict=True):
            cache[first : first + blocks[i]].flatten(0, 1)[:length] = x[ends[i] - length : ends[i]]
    decoded = paged_attention(
        q[ends[order] - 1],
        *caches,
        tables[order],
        torch.tensor(lengths, dtype=torch.int32)[order],
        torch.arange(len(lengths) + 1, dtype=torch.int32),
        scale=12**-0.5,
    )
    assert torch.equal(decoded, out[ends[order] - 1])
