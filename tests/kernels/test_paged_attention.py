"""paged_attention: against a loop over queries and heads in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thyme.kernels import attention_tiles, shared_prefix
from thyme.kernels import paged_attention as attention_module
from thyme.kernels.fp8 import dequantize_heads, quantize_heads
from thyme.kernels.paged_attention import (
    paged_attention,
    paged_attention_native,
    paged_attention_ref,
    paged_attention_triton,
)
from thyme.kernels.shared_prefix import SharedPrefix, check_shared_prefix

ALL = pytest.mark.parametrize(
    "run", [paged_attention_ref, paged_attention_triton, paged_attention_native], ids=["ref", "triton", "native"]
)
Run = Callable[..., Tensor]
SPLIT = 64


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that contexts of a few hundred keys are cut into several."""
    monkeypatch.setattr(attention_tiles, "SPLIT", SPLIT)


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
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Sequences in blocks in random order; what no sequence uses is NaN, block 0 among it, where a masked read of a
    table may lead; table entries past a context are nonsense."""
    needed = [-(-context // block_size) for context in contexts]
    num_blocks = sum(needed) + 2
    k, v = torch.randn(2, num_blocks, block_size, kv_heads, dim).to(dtype)
    order = torch.randperm(num_blocks - 1).to(torch.int32) + 1
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
    "group of 8, D 64, blocks of 32": ([1, 1, 9], [65, 31, 70], 8, 1, 64, 32),
    "group of 7, D 128, blocks of 256": ([1, 3], [130, 66], 14, 2, 128, 256),
    "group of 2, D 80, blocks of 64": ([1, 20], [200, 64], 4, 2, 80, 64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ALL
def test_against_the_loop(run: Run, shape: tuple[Any, ...], dtype: torch.dtype, tolerances: dict) -> None:
    if run is paged_attention_native:
        dtype = torch.float32
    args = problem(*shape, dtype=dtype)
    out = call(run, args)
    assert (out.dtype, out.shape) == (dtype, args["q"].shape)
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.double(), call(oracle, args), atol=atol, rtol=rtol)


@pytest.mark.soak
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1), (16, 2)])
def test_every_shape_in_triton(heads: int, kv_heads: int, dim: int, block_size: int, tolerances: dict) -> None:
    """Decode, chunks and whole prompts in one batch, around the blocks."""
    contexts = [1, block_size - 1, block_size, block_size + 1, 130, 40, 70]
    args = problem([1, 1, 1, 1, 1, 40, 20], contexts, heads, kv_heads, dim, block_size)
    exact = {name: x.double() if name in {"q", "k_cache", "v_cache"} else x for name, x in args.items()}
    atol, rtol = tolerances["attention", torch.float32]
    out = call(paged_attention_triton, args)
    torch.testing.assert_close(out.double(), call(paged_attention_ref, exact), atol=atol, rtol=rtol)


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
            parts.append(run(**part, max_query_len=chunk))
        torch.testing.assert_close(torch.cat(parts), expected, atol=2e-6, rtol=1e-5)


def alone(args: dict[str, Any], sequence: int) -> dict[str, Any]:
    """That sequence as a batch of its own, with a table no wider than it needs."""
    first, last = args["cu_seqlens_q"][sequence : sequence + 2].tolist()
    context = args["context_lens"][sequence : sequence + 1]
    return args | {
        "q": args["q"][first:last],
        "block_tables": args["block_tables"][sequence : sequence + 1, : -(-context // args["k_cache"].shape[1])],
        "context_lens": context,
        "cu_seqlens_q": torch.tensor([0, last - first], dtype=torch.int32),
    }


def test_a_sequence_does_not_know_its_batch_in_triton() -> None:
    """Bitwise, alone or not, among decoded and prefilled ones, and wherever its blocks lie."""
    args = problem([1, 1, 5, 1, 1, 40], [5, 70, 66, 33, 129, 40], 4, 2, 16, 16)
    run = partial(paged_attention_triton, batch_invariant=True)
    whole = call(run, args)
    cu = args["cu_seqlens_q"].tolist()
    for sequence in range(6):
        one = call(run, alone(args, sequence))
        assert torch.equal(one, whole[cu[sequence] : cu[sequence + 1]])
    order = torch.randperm(len(args["k_cache"]))
    moved = args | {name: args[name][order] for name in ("k_cache", "v_cache")}
    tables = args["block_tables"].clone()
    tables[tables >= 0] = order.argsort()[tables[tables >= 0]].to(torch.int32)
    assert torch.equal(call(run, moved | {"block_tables": tables}), whole)


# Around blocks, tiles of keys and splits; and more splits than are merged at once.
BOUNDARIES = {
    "blocks of 16": ([1, 15, 16, 17, 63, 64, 65, 127, 128, 129], 16),
    "blocks of 256": ([1, 64, 65, 255, 256, 257], 256),
    "16 splits": ([16 * SPLIT], 32),
    "17 splits": ([16 * SPLIT + 1], 128),
}


@pytest.mark.parametrize(("contexts", "block_size"), BOUNDARIES.values(), ids=BOUNDARIES)
def test_decode_at_every_boundary(contexts: list[int], block_size: int, tolerances: dict) -> None:
    """NaN follows each context. What the host knows of the lengths changes no bit."""
    args = problem([1] * len(contexts), contexts, 1, 1, 16, block_size)
    exact = {name: x.double() if name in {"q", "k_cache", "v_cache"} else x for name, x in args.items()}
    expected = call(paged_attention_ref, exact)
    out = paged_attention_triton(**args, max_query_len=1)
    atol, rtol = tolerances["attention", torch.float32]
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)
    if len(contexts) == 1:
        assert torch.equal(call(paged_attention_triton, args), out)


def test_splits_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert attention_tiles.SPLIT == 512
    args = problem([1] * 3, [512, 513, 1025], 1, 1, 16, 16)
    out = paged_attention_triton(**args, max_query_len=1)
    torch.testing.assert_close(out, call(paged_attention_ref, args), atol=2e-6, rtol=1e-5)


@ALL
def test_decode_is_the_last_row_of_prefill(run: Run) -> None:
    """Bounded by rounding only: decode merges splits."""
    prompt = problem([150], [150], 7, 1, 16, 16)
    last = prompt | {"q": prompt["q"][-1:], "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32)}
    torch.testing.assert_close(call(run, last)[0], call(run, prompt)[-1], atol=2e-6, rtol=1e-5)


def share(args: dict[str, Any], groups: list[int], prefix: list[int]) -> SharedPrefix:
    """Makes the first blocks of each group those of its first sequence."""
    cu = torch.tensor([0, *groups], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for first, count, blocks in zip(cu.tolist(), groups, prefix, strict=False):
        args["block_tables"][first : first + count, :blocks] = args["block_tables"][first, :blocks].clone()
    return SharedPrefix(cu, torch.tensor(prefix, dtype=torch.int32))


# queries, contexts, sequences of each group, blocks of 16 each group shares, query heads, kv heads
GROUPS = {
    "one group of two splits": ([1] * 3, [129, 150, 200], [3], [8], 2, 1),
    "several, and single ones": ([1] * 6, [70, 100, 300, 20, 140, 139], [2, 1, 1, 2], [4, 0, 1, 8], 4, 2),
    "a part of a split": ([1] * 3, [90, 120, 130], [3], [5], 7, 1),
    "less than a split": ([1, 1], [60, 130], [2], [3], 2, 2),
    "more than one tile holds": ([1] * 11, [64 + i for i in range(1, 12)], [11], [4], 7, 1),
    "one of them is prefilled": ([1, 6, 1, 3], [80, 100, 90, 70], [3, 1], [4, 0], 4, 2),
    "an empty one": ([1, 0, 1], [80, 90, 100], [2, 0, 1], [4, 0, 4], 2, 1),
}


@pytest.mark.parametrize(("queries", "contexts", "groups", "prefix", "heads", "kv_heads"), GROUPS.values(), ids=GROUPS)
@ALL
def test_shared_prefix(
    run: Run,
    queries: list[int],
    contexts: list[int],
    groups: list[int],
    prefix: list[int],
    heads: int,
    kv_heads: int,
    tolerances: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = problem(queries, contexts, heads, kv_heads, 16, 16)
    shared = share(args, groups, prefix)
    expected = call(oracle, args)
    if run is paged_attention_triton:
        # The whole splits are read through the first sequence alone: another's table may lead to NaN.
        nothing = args["k_cache"].isnan().flatten(1).all(1).nonzero()[0, 0].to(torch.int32)
        for first, count, blocks in zip(shared.cu_groups.tolist(), groups, prefix, strict=False):
            for sequence in range(first + 1, first + count):
                if queries[sequence] == 1:
                    args["block_tables"][sequence, : blocks * 16 // SPLIT * SPLIT // 16] = nothing
        for module in (attention_module, shared_prefix):
            monkeypatch.setattr(module, "values_visible", lambda tensor: False)
    out = run(**args, shared=shared, max_query_len=max(queries))
    atol, rtol = tolerances["attention", torch.float32]
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)


def exact_within_tiles(args: dict[str, Any], keys: int) -> None:
    """Makes sums inside a tile of `keys` keys exact, whoever computes them and in whatever order, and those across
    tiles inexact: scores are whole numbers of octaves, values small integers at another power of two in each tile."""
    block_size = args["k_cache"].shape[1]
    args["q"] = torch.randint(-1, 2, args["q"].shape).float()
    args["q"][..., 3:] = 0.0
    args["scale"] = math.log(2)
    assert np.float32(args["scale"] * math.log2(math.e)) == 1
    for name, low, beyond in (("k_cache", -1, 2), ("v_cache", -4, 5)):
        cache = args[name]
        args[name] = torch.where(cache.isnan(), cache, torch.randint(low, beyond, cache.shape).float())
    tables = args["block_tables"]
    for row, column in (tables >= 0).nonzero().tolist():
        if not (tables[:row, column] == tables[row, column]).any():  # a shared one is scaled once
            args["v_cache"][tables[row, column]] *= 2.0 ** (-9 * (column * block_size // keys % 3))


@pytest.mark.parametrize(("queries", "contexts", "groups", "prefix", "heads", "kv_heads"), GROUPS.values(), ids=GROUPS)
def test_a_shared_prefix_changes_no_step_of_the_sum(
    queries: list[int],
    contexts: list[int],
    groups: list[int],
    prefix: list[int],
    heads: int,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tiles of keys, in the same order. The interpreter multiplies a tile of more rows by other instructions
    too, so the sums inside a tile are exact here. A split has four tiles, so that their order counts."""
    launch_config = attention_tiles.launch_config

    def quartered(*shape: Any, **more: Any) -> dict[str, int]:
        return launch_config(*shape, **more) | {"KEYS": SPLIT // 4}

    monkeypatch.setattr(attention_tiles, "launch_config", quartered)
    monkeypatch.setattr(attention_module, "num_processors", lambda device: 1)  # no batch is cut finer
    args = problem(queries, contexts, heads, kv_heads, 16, 16)
    shared = share(args, groups, prefix)
    exact_within_tiles(args, SPLIT // 4)
    plain = paged_attention_triton(**args)
    assert plain.isfinite().all()
    assert torch.equal(paged_attention_triton(**args, shared=shared), plain)


def common_entries(tables: np.ndarray, one: int, other: int, most: int) -> int:
    count = 0
    while count < most and tables[one, count] == tables[other, count]:
        count += 1
    return count


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([16, 24, 64, 128]))
def test_groups_found_are_those_of_a_loop(data: st.DataObject, block_size: int) -> None:
    num_seqs, width = data.draw(st.integers(0, 9)), 40 * 16 // block_size
    tables = np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width)
    for row in range(1, num_seqs):
        alike = data.draw(st.integers(0, width))
        tables[row, :alike] = tables[row - 1, :alike]
    lengths = st.lists(st.integers(1, width * block_size), min_size=num_seqs, max_size=num_seqs)
    contexts = np.array(data.draw(lengths), dtype=np.int32)
    counts = np.array(data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 0, 2]), min_size=num_seqs, max_size=num_seqs)))
    counts = np.minimum(counts, contexts).astype(np.int64)

    common = []  # of each sequence and the next: entries, and whole splits
    for row in range(num_seqs - 1):
        most = min((contexts[row] - 1) // block_size, (contexts[row + 1] - 1) // block_size)
        decode = counts[row] == counts[row + 1] == 1
        entries = common_entries(tables, row, row + 1, most) if decode else 0
        common.append((entries, entries * block_size // SPLIT))
    starts = [0]
    for row, (_, splits) in enumerate(common):
        beside = [common[other][1] for other in (row - 1, row + 1) if 0 <= other < len(common)]
        if splits == 0 or splits < max(beside, default=0):
            starts.append(row + 1)
    ends = [*starts[1:], num_seqs]
    expected = [
        min((common[row][0] for row in range(start, end - 1)), default=0)
        for start, end in zip(starts, ends, strict=True)
    ]

    found = SharedPrefix.find(tables, contexts, counts, block_size, torch.device("cpu"))
    if not any(splits for _, splits in common):
        assert found is None
        return
    assert found is not None
    assert found.cu_groups.tolist() == [*starts, num_seqs]
    assert found.num_blocks.tolist() == expected
    cu = torch.from_numpy(np.append(0, counts.cumsum())).to(torch.int32)
    cache = torch.zeros(int(tables.max()) + 1, block_size, 1, 1)
    check_shared_prefix(cache, torch.from_numpy(tables), torch.from_numpy(contexts), cu, found)


def test_groups_of_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"must have a row for each sequence, got \[2, 3, 3\]"):
        SharedPrefix.find(
            np.zeros((2, 4), np.int32), np.ones(3, np.int32), np.ones(3, np.int64), 16, torch.device("cpu")
        )


def test_groups_below_a_prompt_that_all_share() -> None:
    """Two splits of a system prompt, four more in each of two groups, and two loners."""
    tables = np.arange(8 * 30, dtype=np.int32).reshape(8, 30)
    tables[:, :8] = tables[0, :8]
    tables[:3, :24], tables[5:, :24] = tables[0, :24], tables[5, :24]
    found = SharedPrefix.find(tables, np.full(8, 30 * 16, np.int32), np.ones(8, np.int64), 16, torch.device("cpu"))
    assert found is not None
    assert found.cu_groups.tolist() == [0, 3, 5, 8]
    assert found.num_blocks.tolist() == [24, 8, 24]


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
    "scale": ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    "scale is NaN": ({"scale": float("nan")}, "scale must be positive and finite, got nan"),
    "q type": ({"q": torch.zeros(7, 4, 16).int()}, "q must be torch.float32.*, got torch.int32"),
    "device": (
        {"context_lens": torch.zeros(2, dtype=torch.int32, device="meta")},
        "context_lens is on meta, the other arguments on cpu",
    ),
    "strides": (
        {"block_tables": torch.zeros(5, 2, dtype=torch.int32).T},
        r"block_tables must be contiguous along its last dimension, got strides \(1, 2\)",
    ),
    "cache strides": (
        {"k_cache": torch.zeros(7, 4, 16, 2).transpose(2, 3)},
        r"k_cache must be contiguous along its last dimension, got strides \(128, 32, 1, 2\)",
    ),
    "caches unlike": (
        {"v_cache": torch.zeros(7, 2, 4, 16).transpose(1, 2)},
        r"v_cache must lie as k_cache does, got strides \(128, 16, 64, 1\) and \(128, 32, 16, 1\)",
    ),
    "hint": ({"max_query_len": 3}, "max_query_len is 3, too little for 7 tokens of 2 sequences"),
    "groups type": (
        {"shared": SharedPrefix(torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32))},
        r"shared.cu_groups must be torch.int32",
    ),
    "groups": (
        {"shared": SharedPrefix(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))},
        "shared.cu_groups must run from 0 to the 2 sequences",
    ),
    "prefix": (
        {"shared": SharedPrefix(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))},
        r"shared.num_blocks\[0\] is 2, sequence 0 of that group has 1 full blocks before its new tokens",
    ),
    "not shared": (
        {"shared": SharedPrefix(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))},
        r"block_tables\[1\]\[0\] is \d, not what the first sequence of its group has",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    good = problem([2, 5], [8, 9], 4, 2, 16, 4)
    assert good["k_cache"].shape[0] == 7
    with pytest.raises(ValueError, match=message):
        run(**(good | change))


def test_more_sequences_than_an_axis_of_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 65_536
    args = problem([1], [3], 2, 1, 16, 4)
    args["q"] = torch.zeros(count, 2, 16)
    args["block_tables"] = args["block_tables"].expand(count, -1)
    args["context_lens"] = torch.full((count,), 3, dtype=torch.int32)
    args["cu_seqlens_q"] = torch.arange(count + 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"context_lens has 65536 sequences, a launch takes 65535: split the batch"):
        paged_attention_triton(**args)


def test_a_wrong_hint_is_seen_where_values_are() -> None:
    args = problem([2, 0, 1], [8, 9, 3], 4, 2, 16, 4)
    for run in (paged_attention_ref, paged_attention_triton):
        with pytest.raises(ValueError, match="max_query_len is 1, a sequence has 2 new tokens"):
            run(**args, max_query_len=1)


# Caches in 8 bits.


def in_8_bits(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the problem with its caches in 8 bits, and with caches of q's dtype that hold what those say)."""
    narrow, wide = dict(args), dict(args)
    for name in ("k_cache", "v_cache"):
        magnitudes = torch.logspace(-4, 4, args[name][..., 0].numel()).view(args[name].shape[:3])
        codes, scales = quantize_heads(args[name] * magnitudes[..., None] ** 0.1)
        narrow |= {name: codes, f"{name[0]}_scales": scales}
        wide[name] = dequantize_heads(codes, scales, args["q"].dtype)
    return narrow, wide


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ALL
def test_a_cache_in_8_bits_against_the_loop(
    run: Run, shape: tuple[Any, ...], dtype: torch.dtype, tolerances: dict
) -> None:
    """The rounding of keys and values aside, whatever is no number in slots that nobody uses, and in their scales."""
    if run is paged_attention_native and dtype == torch.float16:
        dtype = torch.bfloat16
    narrow, wide = in_8_bits(problem(*shape, dtype=dtype))
    out = run(**narrow)
    assert (out.dtype, out.shape) == (dtype, narrow["q"].shape)
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.double(), call(oracle, wide), atol=8 * atol, rtol=rtol)


@pytest.mark.parametrize(
    "more", [{}, {"batch_invariant": True}, {"shared": True}], ids=["plain", "any batch", "shared"]
)
@ALL
def test_its_bits_are_those_of_a_widened_cache(run: Run, more: dict[str, Any]) -> None:
    """Powers of two round nothing, wherever they are multiplied in. Of a shared prefix tiles are smaller in 8 bits."""
    args = problem([1, 1, 1, 5], [200, 190, 70, 66], 4, 2, 32, 16)
    if "shared" in more:
        args["block_tables"][1, :8] = args["block_tables"][0, :8]
        groups, blocks = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 4], [8, 0]))
        more = {"shared": SharedPrefix(groups, blocks)}
    narrow, wide = in_8_bits(args)
    got, wanted = run(**narrow, **more), run(**wide, **more)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(got, wanted) or (run is paged_attention_triton and "shared" in more)


BAD_8_BITS: dict[str, tuple[dict[str, Any], str]] = {
    "one of two": ({"v_scales": None}, "k_scales and v_scales go together: give both or neither"),
    "none": ({"k_scales": None, "v_scales": None}, "k_cache is in float8_e4m3fn, whose codes mean nothing without"),
    "not in 8 bits": ({"v_cache": torch.ones(4, 16, 2, 16)}, "v_cache must be torch.float8_e4m3fn, got torch.float32"),
    "shape": ({"v_scales": torch.ones(4, 16, 1).byte()}, r"v_scales must have shape \[4, 16, 2\], got \[4, 16, 1\]"),
    "type": ({"k_scales": torch.ones(4, 16, 2)}, "k_scales must be torch.uint8, got torch.float32"),
}


@pytest.mark.parametrize(("change", "message"), BAD_8_BITS.values(), ids=BAD_8_BITS)
@ALL
def test_bad_caches_in_8_bits(run: Run, change: dict[str, Any], message: str) -> None:
    narrow, _ = in_8_bits(problem([1], [20], 4, 2, 16, 16))
    with pytest.raises(ValueError, match=message):
        run(**narrow | change)
