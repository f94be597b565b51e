"""Packed attention against a loop over sequences in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thyme.kernels.mrope import mrope
from thyme.model import PackedAttention, packed_attention
from thyme.model.attention import _plan


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    out, start = [], 0
    share = q.shape[1] // k.shape[1]
    for n in lengths:
        rows = slice(start, start + n)
        for i in range(n):
            seen = slice(start, start + i + 1) if causal else rows
            heads = []
            for head in range(q.shape[1]):
                scores = k[seen, head // share] @ q[start + i, head] * scale
                heads.append(scores.softmax(0) @ v[seen, head // share])
            out.append(torch.stack(heads))
        start += n
    return torch.stack(out)


# Equal lengths (no copy), one sequence, a run that pads together, very unequal ones that must not, single tokens.
LENGTHS = [(5, 5, 5), (7,), (6, 5, 6, 7), (40, 1, 1, 2, 39, 3), (1, 1), (3, 3, 8, 8, 3)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients(lengths: tuple[int, ...], heads: tuple[int, int], causal: bool, tolerances: Any) -> None:
    total, dim = sum(lengths), 8
    q, k, v = (torch.randn(total, n, dim, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = packed_attention(q, k, v, lengths, causal=causal, scale=0.3)
    expected = naive(wide[0], wide[1], wide[2], lengths, causal, 0.3)
    atol, rtol = tolerances[("attention", torch.float32)]
    torch.testing.assert_close(out, expected.float(), atol=atol, rtol=rtol)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for x, y in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-5, rtol=1e-4)


def test_slices_of_a_fused_projection_equal_their_copies() -> None:
    fused = torch.randn(12, 8, 16)
    q, k, v = fused.split((4, 2, 2), 1)
    assert not q.is_contiguous()
    for lengths in ((4, 4, 4), (9, 3)):
        out = packed_attention(q, k, v, lengths, causal=True)
        copies = (x.contiguous() for x in (q, k, v))
        assert torch.equal(out, packed_attention(*copies, lengths, causal=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.booleans())
def test_plan_covers_each_token_once_with_little_padding(lengths: list[int], causal: bool) -> None:
    plan = _plan(tuple(lengths), causal, torch.device("cpu"))
    rows = torch.cat(
        [torch.arange(g.start, g.start + g.count * g.length) if g.gather is None else g.gather for g in plan.groups]
    )
    padded = sum(g.count * g.length for g in plan.groups)
    kept = rows if plan.restore is None else rows[plan.restore]
    assert torch.equal(kept, torch.arange(sum(lengths)))
    assert padded * 0.75 <= sum(lengths)
    assert causal or padded == sum(lengths)


def test_a_sequence_does_not_see_its_neighbors() -> None:
    qkv, angles = torch.randn(9, 6, 8), torch.randn(9, 1, 4)
    attention = PackedAttention((4, 5))
    before = attention(0, qkv, 2, angles.cos(), angles.sin())
    qkv[4:] = torch.nan
    assert torch.equal(attention(0, qkv, 2, angles.cos(), angles.sin())[:4], before[:4])


def test_training_rotates_inside_the_attention() -> None:
    """Tables in float64, so that the gradients can be checked by differences."""
    angles = torch.randn(5, 1, 3, dtype=torch.float64)
    qkv = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)  # two query heads, one key, one value
    cos, sin = angles.cos(), angles.sin()
    attention = PackedAttention((2, 3))
    out = attention(1, qkv, 1, cos, sin)
    q, k = mrope(qkv[:, :3], cos, sin).split((2, 1), 1)
    assert torch.equal(out, packed_attention(q, k, qkv[:, 3:], (2, 3), causal=True))
    assert torch.autograd.gradcheck(lambda x: attention(1, x, 1, cos, sin), qkv)


@pytest.mark.parametrize(
    "lengths, message", [((3, 3), "add up to 6, q has 7"), ((), "at least 1"), ((7, 0), "at least 1")]
)
def test_lengths_that_do_not_fit(lengths: tuple[int, ...], message: str) -> None:
    x = torch.randn(7, 1, 8)
    with pytest.raises(ValueError, match=message):
        packed_attention(x, x, x, lengths, causal=True)
