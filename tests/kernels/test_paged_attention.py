"""paged_attention: against a loop over queries and heads in float64, and kv_cache, which fills what it reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.kv_cache import write_kv, write_kv_ref, write_kv_triton
from thyme.kernels.paged_attention import (
    paged_attention,
    paged_attention_native,
    paged_attention_ref,
    paged_attention_triton,
)

ALL = pytest.mark.parametrize(
    "run", [paged_attention_ref, paged_attention_triton, paged_attention_native], ids=["ref", "triton", "native"]
)
Run = Callable[..., Tensor]


def oracle(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, context: Tensor, cu: Tensor, *, scale: float) -> Tensor:
    """Query by query and head by head, positions gathered one at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out, block_size, group = torch.empty_like(q), k.shape[1], q.shape[1] // k.shape[2]
    for sequence in range(len(context)):
        first, last = cu[sequence].item(), cu[sequence + 1].item()
        for token in range(first, last):
            seen = context[sequence].item() - last + token + 1
            places = [(tables[sequence, p // block_size].item(), p % block_size) for p in range(seen)]
            keys = torch.stack([k[block, place] for block, place in places])
            values = torch.stack([v[block, place] for block, place in places])
            for head in range(q.shape[1]):
                probability = (keys[:, head // group] @ q[token, head] * scale).softmax(0)
                out[token, head] = probability @ values[:, head // group]
    return out


def problem(
    queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, block_size: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Sequences in blocks in random order; what no sequence uses is NaN, table entries past a context are nonsense."""
    needed = [-(-context // block_size) for context in contexts]
    num_blocks = sum(needed) + 2
    k, v = torch.randn(2, num_blocks, block_size, kv_heads, dim).to(dtype)
    order = torch.randperm(num_blocks).to(torch.int32)
    tables = torch.full((len(contexts), max(needed) + 2), -(2**30), dtype=torch.int32)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for sequence, (count, context) in enumerate(zip(needed, contexts, strict=True)):
        tables[sequence, :count], order = order[:count], order[count:]
        for position in range(context):
            used[tables[sequence, position // block_size], position % block_size] = True
    k[~used] = v[~used] = torch.nan
    return {
        "q": torch.randn(sum(queries), heads, dim).to(dtype),
        "k_cache": k,
        "v_cache": v,
        "block_tables": tables,
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "scale": dim**-0.5,
    }


def call(run: Run, args: dict[str, Any]) -> Tensor:
    return run(*(value for name, value in args.items() if name != "scale"), scale=args["scale"])


# queries, contexts, query heads, kv heads, head dim, block size
SHAPES = {
    "decode": ([1] * 5, [1, 16, 17, 64, 130], 4, 2, 16, 16),
    "decode, group of 7, odd dim": ([1, 1, 1], [3, 9, 40], 7, 1, 24, 8),
    "one token": ([1], [1], 1, 1, 16, 1),
    "prefill": ([33, 70], [33, 70], 4, 4, 16, 16),
    "chunks": ([5, 64, 20], [90, 64, 21], 6, 2, 32, 4),
    "mixed, with an idle one": ([1, 17, 0, 1, 1], [40, 30, 12, 1, 66], 4, 1, 16, 16),
    "block of 3": ([2, 3], [7, 11], 2, 2, 16, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@ALL
def test_against_the_loop(run: Run, shape: tuple[Any, ...], dtype: torch.dtype, tolerances: dict) -> None:
    if run is paged_attention_native:
        dtype = torch.float32
    args = problem(*shape, dtype=dtype)
    out = call(run, args)
    assert (out.dtype, out.shape) == (dtype, args["q"].shape)
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.double(), call(oracle, args), atol=atol, rtol=rtol)


def test_float64_is_computed_in_float64() -> None:
    args = problem(*SHAPES["chunks"], dtype=torch.float64)
    torch.testing.assert_close(call(paged_attention_ref, args), call(oracle, args), atol=1e-14, rtol=1e-12)


@ALL
def test_large_scores_do_not_overflow(run: Run) -> None:
    """Scores of +-3000: each query's largest wins, in whatever tile of the context it stands."""
    args = problem([1, 1], [150, 150], 2, 1, 16, 16)
    args["q"].fill_(50.0)
    finite = args["k_cache"].isfinite()
    args["k_cache"][finite] = torch.sign(args["k_cache"][finite]) * 15
    torch.testing.assert_close(call(run, args).double(), call(oracle, args), atol=2e-5, rtol=1e-5)


@ALL
def test_chunks_of_a_prompt_equal_the_whole(run: Run) -> None:
    """Bounded by rounding only: chunk boundaries move queries between tiles."""
    whole = problem([45], [45], 4, 2, 16, 4)
    expected = call(run, whole)
    for chunk in (1, 7, 16):
        parts = []
        for start in range(0, 45, chunk):
            stop = min(start + chunk, 45)
            part = whole | {
                "q": whole["q"][start:stop],
                "context_lens": torch.tensor([stop], dtype=torch.int32),
                "cu_seqlens_q": torch.tensor([0, stop - start], dtype=torch.int32),
            }
            parts.append(call(run, part))
        torch.testing.assert_close(torch.cat(parts), expected, atol=2e-6, rtol=1e-5)


def test_a_sequence_does_not_know_its_batch_in_triton() -> None:
    """Bitwise, alone or not, and wherever its blocks lie."""
    args = problem([1] * 4, [5, 70, 33, 129], 4, 2, 16, 16)
    whole = call(paged_attention_triton, args)
    for sequence in range(4):
        one = args | {
            "q": args["q"][sequence : sequence + 1],
            "block_tables": args["block_tables"][sequence : sequence + 1],
            "context_lens": args["context_lens"][sequence : sequence + 1],
            "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
        }
        assert torch.equal(call(paged_attention_triton, one)[0], whole[sequence])
    order = torch.randperm(len(args["k_cache"]))
    moved = args | {name: args[name][order] for name in ("k_cache", "v_cache")}
    tables = args["block_tables"].clone()
    tables[tables >= 0] = order.argsort()[tables[tables >= 0]].to(torch.int32)
    assert torch.equal(call(paged_attention_triton, moved | {"block_tables": tables}), whole)


def test_public_op_is_native_in_float32_and_the_reference_elsewhere() -> None:
    for dtype, run in ((torch.float32, paged_attention_native), (torch.float16, paged_attention_ref)):
        args = problem(*SHAPES["chunks"], dtype=dtype)
        assert torch.equal(call(paged_attention, args), call(run, args))
    strided = problem(*SHAPES["chunks"])
    strided["q"] = strided["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(call(paged_attention, strided), call(paged_attention_ref, strided))


@ALL
def test_no_tokens(run: Run) -> None:
    args = problem([0, 0], [4, 9], 2, 1, 16, 4)
    assert call(run, args).shape == (0, 2, 16)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "q": ({"q": torch.zeros(3, 8)}, r"q must have shape \[any, any, any\], got \[3, 8\]"),
    "heads": ({"q": torch.zeros(7, 3, 16)}, "q has 3 heads, which 2 key-value heads cannot share evenly"),
    "dim": ({"q": torch.zeros(7, 4, 8)}, r"k_cache must have shape \[any, any, any, 8\]"),
    "cache type": ({"v_cache": torch.zeros(7, 4, 2, 16).half()}, "v_cache must be torch.float32, got torch.float16"),
    "table type": ({"block_tables": torch.zeros(2, 5, dtype=torch.int64)}, "block_tables must be torch.int32"),
    "cu": (
        {"cu_seqlens_q": torch.tensor([0, 2, 6], dtype=torch.int32)},
        "cu_seqlens_q must run from 0 to the 7 tokens",
    ),
    "context": (
        {"context_lens": torch.tensor([3, 99], dtype=torch.int32)},
        r"context_lens\[1\] is 99, more than a row of block",
    ),
    "too little": (
        {"context_lens": torch.tensor([3, 4], dtype=torch.int32)},
        r"context_lens\[1\] is 4, less than its 5 query tokens",
    ),
    "block": (
        {"block_tables": torch.full((2, 5), 7, dtype=torch.int32)},
        r"block_tables\[0\]\[0\] is 7, the cache has 7 blocks",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    good = problem([2, 5], [8, 9], 4, 2, 16, 4)
    assert good["k_cache"].shape[0] == 7
    with pytest.raises(ValueError, match=message):
        call(run, good | change)


WRITES = pytest.mark.parametrize("write", [write_kv_ref, write_kv_triton, write_kv], ids=["ref", "triton", "public"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@WRITES
def test_write_kv(write: Callable[..., None], dtype: torch.dtype) -> None:
    """Every token in its slot, padding nowhere, all other slots untouched; k is a slice of a fused projection."""
    fused = torch.randn(6, 5, 12).to(dtype)
    k, v = fused[:, :3], fused[:, 2:]
    caches = torch.full((2, 4, 5, 3, 12), torch.nan, dtype=dtype)
    slots = torch.tensor([19, -1, 0, 7, -1, 4])
    write(k, v, caches[0], caches[1], slots)
    for cache, tokens in zip(caches, (k, v), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots[slots >= 0]], tokens[slots >= 0])
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[slots[slots >= 0]] = False
        assert flat[untouched].isnan().all()


@WRITES
def test_write_then_attend(write: Callable[..., None]) -> None:
    """A prompt written through shuffled blocks attends as plain causal attention does."""
    q, k, v = torch.randn(3, 11, 2, 16)
    caches = torch.full((2, 5, 4, 2, 16), torch.nan)
    table = torch.tensor([4, 0, 2])
    write(k, v, *caches, (table[:, None] * 4 + torch.arange(4)).flatten()[:11])
    lengths = torch.tensor([11], dtype=torch.int32)
    cu = torch.tensor([0, 11], dtype=torch.int32)
    out = paged_attention(q, *caches, table[None].to(torch.int32), lengths, cu, scale=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.25
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 20])}, r"slot_mapping must be in \[-1, 19\], got 20"),
        ({"slot_mapping": torch.tensor([0, -2])}, r"slot_mapping must be in \[-1, 19\], got -2"),
        ({"slot_mapping": torch.tensor([0, 1], dtype=torch.int32)}, "slot_mapping must be torch.int64"),
        ({"k": torch.zeros(2, 3, 8)}, r"v must have shape \[2, 3, 8\], got \[2, 3, 12\]"),
        ({"k_cache": torch.zeros(4, 3, 5, 12).transpose(1, 2)}, "k_cache and v_cache must be contiguous"),
    ],
)
@WRITES
def test_write_kv_bad_arguments(write: Callable[..., None], change: dict[str, Tensor], message: str) -> None:
    good = {"k": torch.zeros(2, 3, 12), "v": torch.zeros(2, 3, 12), "k_cache": torch.zeros(4, 5, 3, 12)}
    good |= {"v_cache": torch.zeros(4, 5, 3, 12), "slot_mapping": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        write(**(good | change))
