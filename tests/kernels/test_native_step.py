"""A step's attention on a CPU, all layers with what they share: its ops one after the other, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.kernels.mrope import mrope_tables
from thyme.kernels.native import array_of, native
from thyme.kernels.native_step import NativeStep
from thyme.kernels.paged_attention import paged_attention

BLOCK, QUERIES, KEYS, DIM = 4, 6, 2, 16


def problem(dtype: torch.dtype, counts: list[int], earlier: list[int]) -> dict[str, Any]:
    """Sequences of `earlier` tokens that get `counts` more, with caches of two layers full of noise."""
    contexts = [a + b for a, b in zip(counts, earlier, strict=True)]
    widths = [-(-context // BLOCK) for context in contexts]
    order = torch.randperm(sum(widths)).split(widths)
    tables = torch.zeros(len(counts), max(widths, default=0), dtype=torch.int32)
    slots: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    for row, blocks in enumerate(order if counts else ()):
        tables[row, : len(blocks)] = blocks
        places = torch.arange(earlier[row], contexts[row])
        slots.append(blocks[places // BLOCK] * BLOCK + places % BLOCK)
    tokens = sum(counts)
    frequencies = 1e4 ** -(torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = mrope_tables(torch.randint(0, 100, (3, tokens)), frequencies, (2, 3, 3))
    shape = (2, 2, max(sum(widths), 1), BLOCK, KEYS, DIM)
    return {
        "qkv": torch.randn(2, tokens, QUERIES + 2 * KEYS, DIM).to(dtype),
        "tables": (cos, sin),
        "caches": torch.randn(shape).to(dtype),
        "slots": torch.cat(slots),
        "placement": (
            tables,
            torch.tensor(contexts, dtype=torch.int32),
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "earlier"), [([1] * 7, [0, 3, 4, 9, 1, 2, 30]), ([5, 1, 9], [0, 6, 3]), ([1], [0]), ([], [])]
)
def test_layers_are_the_ops_one_after_the_other(dtype: torch.dtype, counts: list[int], earlier: list[int]) -> None:
    given = problem(dtype, counts, earlier)
    ours, theirs = given["caches"].clone(), given["caches"].clone()
    step = NativeStep([*ours], given["slots"], *given["placement"], scale=0.3)
    for layer, qkv in enumerate(given["qkv"]):
        out = step(layer, qkv, KEYS, *given["tables"])
        q = mrope_write_kv(qkv, *given["tables"], *theirs[layer], given["slots"])
        assert torch.equal(out, paged_attention(q, *theirs[layer], *given["placement"], scale=0.3))
    assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    given = problem(torch.float32, [2, 1], [3, 4])
    caches, before = given["caches"][0], given["caches"][0].clone()
    tables, lengths, starts = given["placement"]
    good = (given["slots"], tables, lengths, starts)

    def attend(*placement: Tensor, qkv: Tensor = given["qkv"][0]) -> None:
        NativeStep([caches], *placement, scale=0.3)(0, qkv, KEYS, *given["tables"])

    for wrong in (-2, len(caches[0]) * BLOCK):
        slots = given["slots"].clone()
        slots[1] = wrong
        with pytest.raises(ValueError, match=rf"slots\[1\] is {wrong}, there are {len(caches[0]) * BLOCK}"):
            attend(slots, *good[1:])
    with pytest.raises(ValueError, match="slots must have the shape"):
        attend(given["slots"][:2], *good[1:])
    with pytest.raises(ValueError, match="slot_mapping must be"):
        attend(given["slots"].int(), *good[1:])
    with pytest.raises(ValueError, match="cu_seqlens_q must have shape"):
        attend(*good[:3], starts[:-1])
    with pytest.raises(ValueError, match="none is a query's"):
        attend(*good, qkv=given["qkv"][0][:, : 2 * KEYS])
    assert torch.equal(caches, before)
    attend(*good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Of what each token or row is by itself, where there is enough to do for several."""
    tokens, heads, dim = 130, 8, 64
    qkv = torch.randn(tokens, 2 * heads, dim).to(dtype)
    frequencies = 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    cos, sin = (x.numpy() for x in mrope_tables(torch.arange(tokens).expand(3, -1), frequencies, (8, 12, 12)))
    slots = np.random.default_rng(0).permutation(40 * BLOCK)[:tokens].astype(np.int64)
    slots[::5] = -1
    rows, weight = torch.randn(tokens, 1408).to(dtype), torch.rand(1408).to(dtype)
    found = []
    for threads in (1, 2, 3):
        caches = torch.zeros(2, 40, BLOCK, 4, dim, dtype=dtype)
        q, normed, total, gated, turned = (
            torch.empty(shape, dtype=dtype)
            for shape in ((tokens, heads, dim), *[rows.shape] * 3, (tokens, 2 * heads, dim))
        )
        native("turn_and_store", dtype)(array_of(qkv), cos, sin, slots, *map(array_of, caches), array_of(q), threads)
        native("turn_heads", dtype)(array_of(qkv), cos, sin, 1.0, array_of(turned), threads)
        native("swiglu", dtype)(array_of(rows), array_of(rows), array_of(gated), threads)
        arrays = array_of(rows), array_of(rows), array_of(weight)
        native("rmsnorm", dtype)(*arrays, 1e-6, array_of(normed), array_of(total), None, threads)
        found.append((q, caches, normed, total, gated, turned))
    assert torch.equal(found[0][0], found[0][-1][:, :heads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_cpp_says_what_does_not_fit() -> None:
    qkv, caches = np.zeros((3, 4, 8), np.float32), np.zeros((2, 5, 2, 1, 8), np.float32)
    cos = np.ones((3, 1, 4), np.float32)
    slots, q = np.arange(3), np.zeros((3, 2, 8), np.float32)
    run = _native.turn_and_store_f32
    run(qkv, cos, cos, slots, *caches, q, 1)
    with pytest.raises(ValueError, match=r"cos must have the shape \[3, 1, 4\], got \[2, 1, 4\]"):
        run(qkv, cos[:2], cos, slots, *caches, q, 1)
    with pytest.raises(ValueError, match=r"q must have the shape \[3, 2, 8\], got \[3, 1, 8\]"):
        run(qkv, cos, cos, slots, *caches, q[:, :1].copy(), 1)
    with pytest.raises(ValueError, match="v_cache must have the shape"):
        run(qkv, cos, cos, slots, caches[0], caches[1, 1:].copy(), q, 1)
    with pytest.raises(ValueError, match="dim even"):
        run(qkv[..., :7].copy(), cos, cos, slots, *caches, q, 1)
    with pytest.raises(ValueError, match="k_cache must be"):
        run(qkv, cos, cos, slots, caches[0, 0], caches[1], q, 1)
