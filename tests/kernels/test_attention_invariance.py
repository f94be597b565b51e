"""batch_invariant: a query's bits depend on the keys before it alone, whether it is decoded, in a chunk, or after a
shared prefix. In the interpreter, with products in a fixed order and splits of 512 as they are."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import fix_order_of_products
from thyme.kernels import paged_attention as attention_module
from thyme.kernels.attention_tiles import FINEST, SPLIT
from thyme.kernels.paged_attention import paged_attention_ref, paged_attention_triton
from thyme.kernels.shared_prefix import SharedPrefix

BLOCK = 16


@pytest.fixture(autouse=True)
def _order(_bfloat16_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_order_of_products(monkeypatch)


def caches(context: int, dtype: torch.dtype, dim: int = 16) -> dict[str, Any]:
    """One sequence of two query heads and one of keys, its blocks in random order."""
    torch.manual_seed(0)
    num_blocks = -(-context // BLOCK)
    k, v = torch.randn(2, num_blocks, BLOCK, 1, dim).to(dtype)
    return {
        "k_cache": k,
        "v_cache": v,
        "block_tables": torch.randperm(num_blocks).to(torch.int32)[None],
        "scale": dim**-0.5,
        "queries": torch.randn(context, 2, dim).to(dtype),
    }


def attend(sequence: dict[str, Any], first: int, end: int, *, batch_invariant: bool = True, **more: Any) -> Tensor:
    """Of tokens `first` to `end` - 1, as one chunk."""
    sequence = dict(sequence)
    q = sequence.pop("queries")[first:end]
    return paged_attention_triton(
        q,
        context_lens=torch.tensor([end], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, end - first], dtype=torch.int32),
        batch_invariant=batch_invariant,
        **sequence,
        **more,
    )


@pytest.mark.parametrize(
    ("context", "dtype"),
    [(300, torch.float32), (513, torch.float32), (700, torch.bfloat16), (1024, torch.float32), (5000, torch.bfloat16)],
    ids=str,
)
def test_a_token_has_the_same_bits_decoded_and_in_any_chunk(context: int, dtype: torch.dtype, tolerances: Any) -> None:
    sequence = caches(context, dtype)
    decoded = attend(sequence, context - 1, context)
    for length in (2, 20) if context < 5000 else (3,):  # with 64 rows and 2 heads, 32 queries are one tile
        assert torch.equal(attend(sequence, context - length, context)[-1:], decoded), length
    assert torch.equal(attend(sequence, context - 4, context - 1)[-1:], attend(sequence, context - 2, context - 1))
    exact = {name: x.double() if name in {"k_cache", "v_cache"} else x for name, x in sequence.items()}
    q = exact.pop("queries")[-1:].double()
    one = torch.tensor([0, context], dtype=torch.int32)
    expected = paged_attention_ref(q, **exact, context_lens=one[1:], cu_seqlens_q=one.clamp(max=1))
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(decoded.double(), expected, atol=atol, rtol=rtol)


def test_a_whole_prompt_has_the_bits_of_its_parts() -> None:
    """576 and one more, as a prefix cache leaves it; and pieces that end in the middle of splits."""
    sequence = caches(577, torch.float32)
    whole = attend(sequence, 0, 577)
    for cuts in ([576], [512, 513, 540]):
        edges = [0, *cuts, 577]
        parts = [attend(sequence, first, end) for first, end in pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole), cuts


@pytest.mark.parametrize("shape", [(7, 1, 128), (2, 2, 64)], ids=str)
def test_other_tiles(shape: tuple[int, int, int]) -> None:
    """Those of float32 heads of 64 and more."""
    heads, kv_heads, dim = shape
    sequence = caches(700, torch.float32, dim)
    k, v = torch.randn(2, *sequence["k_cache"].shape[:2], kv_heads, dim)
    sequence |= {"k_cache": k, "v_cache": v, "queries": torch.randn(700, heads, dim)}
    assert torch.equal(attend(sequence, 690, 700)[-1:], attend(sequence, 699, 700))


def test_a_shared_prefix_changes_no_bit() -> None:
    """Its tiles are those of decode, where bits count."""
    sequence = caches(1300, torch.float32)
    decoded = attend(sequence, 1299, 1300)
    q = sequence.pop("queries")[-1:].expand(5, -1, -1)
    tables = sequence.pop("block_tables").expand(5, -1).contiguous()
    shared = SharedPrefix(torch.tensor([0, 5], dtype=torch.int32), torch.tensor([80], dtype=torch.int32))
    out = paged_attention_triton(
        q,
        block_tables=tables,
        context_lens=torch.full((5,), 1300, dtype=torch.int32),
        cu_seqlens_q=torch.arange(6, dtype=torch.int32),
        shared=shared,
        batch_invariant=True,
        **sequence,
    )
    assert torch.equal(out, decoded.expand(5, -1, -1))


def test_a_batch_of_any_size_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small card, which one sequence does not fill in splits of 512 keys and nine do."""
    monkeypatch.setattr(attention_module, "num_processors", lambda device: 4)
    sequence = caches(600, torch.float32)
    alone = attend(sequence, 599, 600)
    fast = attend(sequence, 599, 600, batch_invariant=False)
    many = {
        "q": sequence["queries"][-1:].expand(9, -1, -1),
        "block_tables": sequence["block_tables"].expand(9, -1).contiguous(),
        "context_lens": torch.full((9,), 600, dtype=torch.int32),
        "cu_seqlens_q": torch.arange(10, dtype=torch.int32),
        **{name: sequence[name] for name in ("k_cache", "v_cache", "scale")},
    }
    assert torch.equal(paged_attention_triton(**many, batch_invariant=True), alone.expand(9, -1, -1))
    assert not torch.equal(fast, alone)
    torch.testing.assert_close(fast, alone)


def test_sizes_that_the_order_rests_on() -> None:
    assert SPLIT % FINEST == 0
    assert (SPLIT, FINEST) == (512, 128)
