"""Attention compiled: every dtype, group and block size at real lengths, splits, shared prefixes, flash-attn, bits."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels import attention_decode, attention_merge, attention_prefill, attention_prefix
from thyme.kernels.attention_backend import flash_paged_attention
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref
from thyme.kernels.shared_prefix import SharedPrefix

pytestmark = pytest.mark.gpu
Args = dict[str, Any]

DECODE = ([1] * 6, [1, 63, 512, 513, 4097, 9000])
MIXED = ([1, 64, 1, 200, 2, 1], [700, 90, 17, 513, 1500, 8193])


def problem(
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    group: int = 1,
    prefix: int = 0,
) -> Args:
    """Blocks in random order; every slot no sequence uses is NaN. Groups of neighbors share their first blocks."""
    needed = [-(-context // block_size) for context in contexts]
    caches = torch.full((2, sum(needed) + 1, block_size, kv_heads, dim), torch.nan, dtype=dtype, device="cuda")
    order = torch.randperm(sum(needed) + 1).to(torch.int32)
    tables = torch.full((len(contexts), max(needed)), -1, dtype=torch.int32)
    for row, own in enumerate(order[: sum(needed)].split(needed)):
        tables[row, : len(own)] = own
        tables[row, :prefix] = tables[row // group * group, :prefix].clone()
        places = torch.arange(contexts[row])
        blocks = tables[row, places // block_size].long()
        fresh = slice(prefix * block_size if row % group else 0, None)
        kv = torch.randn(2, contexts[row], kv_heads, dim, device="cuda").to(dtype)
        caches[:, blocks[fresh].cuda(), (places % block_size)[fresh].cuda()] = kv[:, fresh]
    return {
        "q": torch.randn(sum(queries), heads, dim, device="cuda").to(dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "block_tables": tables.cuda(),
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        "cu_seqlens_q": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda(),
        "scale": dim**-0.5,
    }


def exact(args: Args) -> Tensor:
    """In float64 on the CPU."""
    wide = {"q", "k_cache", "v_cache"}
    tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
    there = {name: x.cpu().double() if name in wide else x.cpu() for name, x in tensors.items()}
    return paged_attention_ref(**there, scale=args["scale"])


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype, tolerances: dict) -> None:
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "contexts"), [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(28, 4, 128, 16), (8, 8, 64, 32), (16, 2, 80, 64), (4, 2, 256, 128), (7, 1, 128, 256), (2, 1, 16, 16)],
)
def test_against_float64(
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    tolerances: dict,
) -> None:
    args = problem(queries, contexts, heads, kv_heads, dim, block_size, dtype)
    out = paged_attention(**args)
    assert_near(out, exact(args), dtype, tolerances)
    assert torch.equal(out, paged_attention(**args, max_query_len=max(queries)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "prefix"), [(2, 64), (8, 64), (16, 70), (16, 31)])
def test_shared_prefix(group: int, prefix: int, dtype: torch.dtype, tolerances: dict) -> None:
    """Prefixes of 1,024 tokens, of 1,120, and of less than one split."""
    contexts = [1_121 + 97 * i for i in range(16)]
    args = problem([1] * 16, contexts, 28, 4, 128, 16, dtype, group=group, prefix=prefix)
    num_groups = 16 // group
    shared = SharedPrefix(
        torch.arange(num_groups + 1, dtype=torch.int32, device="cuda") * group,
        torch.full((num_groups,), prefix, dtype=torch.int32, device="cuda"),
    )
    out = paged_attention(**args, shared=shared)
    assert_near(out, exact(args), dtype, tolerances)
    assert torch.equal(out, paged_attention(**args, shared=shared, max_query_len=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_know_its_batch(dtype: torch.dtype) -> None:
    """Bitwise, alone and in reverse among others, decoded or prefilled."""
    args = problem(*MIXED, 28, 4, 128, 16, dtype) | {"batch_invariant": True}
    whole = paged_attention(**args)
    queries, contexts = MIXED
    first = 0
    for row, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        alone = args | {
            "q": args["q"][first : first + count],
            "block_tables": args["block_tables"][row : row + 1, : -(-context // 16)],
            "context_lens": args["context_lens"][row : row + 1],
            "cu_seqlens_q": torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        }
        assert torch.equal(paged_attention(**alone), whole[first : first + count]), row
        first += count
    parts = whole.split(queries)
    reverse = args | {
        "q": torch.cat(args["q"].split(queries)[::-1]),
        "block_tables": args["block_tables"].flip(0),
        "context_lens": args["context_lens"].flip(0),
        "cu_seqlens_q": torch.tensor([0, *queries[::-1]], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda(),
    }
    assert torch.equal(paged_attention(**reverse), torch.cat(parts[::-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [300, 577, 700, 5000])
def test_a_token_has_the_same_bits_decoded_and_in_any_chunk(context: int, dtype: torch.dtype) -> None:
    """What no CPU can show: that a tensor core computes a row alike wherever it stands in a tile."""
    args = problem([20], [context], 28, 4, 128, 16, dtype) | {"batch_invariant": True}
    chunk = paged_attention(**args)
    for length in (1, 2, 7):
        part = args | {
            "q": args["q"][-length:],
            "cu_seqlens_q": torch.tensor([0, length], dtype=torch.int32, device="cuda"),
        }
        assert torch.equal(paged_attention(**part), chunk[-length:]), length


if importlib.util.find_spec("flash_attn"):

    @pytest.mark.parametrize(("queries", "contexts"), [DECODE, MIXED], ids=["decode", "mixed"])
    def test_flash_attn_agrees(queries: list[int], contexts: list[int], tolerances: dict) -> None:
        args = problem(queries, contexts, 28, 4, 128, 256, torch.bfloat16)
        out = flash_paged_attention(**args, max_query_len=max(queries), generation=2)
        assert_near(out, exact(args), torch.bfloat16, tolerances)


if importlib.util.find_spec("flash_attn_interface"):

    @pytest.mark.parametrize("block_size", [16, 256])
    @pytest.mark.parametrize(("queries", "contexts"), [DECODE, MIXED], ids=["decode", "mixed"])
    def test_flash_attn_3_agrees(queries: list[int], contexts: list[int], block_size: int, tolerances: dict) -> None:
        args = problem(queries, contexts, 28, 4, 128, block_size, torch.bfloat16)
        out = flash_paged_attention(**args, max_query_len=max(queries), generation=3)
        assert_near(out, exact(args), torch.bfloat16, tolerances)


def each_form(args: Args) -> list[Callable[[], Tensor]]:
    num_seqs = len(args["context_lens"])
    shared = SharedPrefix(
        torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda"),
        torch.zeros(num_seqs, dtype=torch.int32, device="cuda"),
    )
    return [
        lambda: paged_attention(**args),
        lambda: paged_attention(**args, max_query_len=200),
        lambda: paged_attention(**args, shared=shared),
    ]


def test_nothing_waits_for_the_device() -> None:
    forms = each_form(problem(*MIXED, 28, 4, 128, 16, torch.bfloat16))
    for form in forms:
        form()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for form in forms:
            form()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_lengths() -> None:
    """Captured once, replayed with other lengths in the same tensors."""
    args = problem([1] * 4, [600, 1300, 40, 2100], 28, 4, 128, 16, torch.bfloat16)
    paged_attention(**args, max_query_len=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(**args, max_query_len=1)
    args["context_lens"] -= 39
    graph.replay()
    assert torch.equal(out, paged_attention(**args, max_query_len=1))


def test_nothing_recompiles_for_another_batch() -> None:
    kernels = [
        attention_prefill._prefill_kernel,
        attention_decode._decode_kernel,
        attention_prefix._prefix_kernel,
        attention_merge._merge_kernel,
    ]
    counts = []
    for queries, contexts in (MIXED, ([1, 3], [513, 2048]), ([1] * 17, [600] * 17)):
        for form in each_form(problem(queries, contexts, 28, 4, 128, 16, torch.bfloat16)):
            form()
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(count == counts[0] for count in counts), counts
