"""The C++ paged attention against a float64 oracle, and the bits it promises to keep."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from thyme import _native
from thyme.kernels.paged_attention import paged_attention_native

LEVELS = _native.PAGED_ATTENTION_LEVELS
ATOL, RTOL = 2e-6, 1e-5  # ("attention", float32) of the table of tolerances


@dataclass
class Problem:
    q: NDArray
    k_cache: NDArray
    v_cache: NDArray
    block_tables: NDArray
    context_lens: NDArray
    cu_seqlens_q: NDArray
    scale: float

    def run(self, threads: int = 1, level: str = "best") -> NDArray:
        """bfloat16 is held as int16, out too."""
        out = np.full_like(self.q, -1 if self.q.dtype == np.int16 else np.nan)  # -1 is a NaN in bfloat16
        run = _native.paged_attention_bf16 if self.q.dtype == np.int16 else _native.paged_attention_f32
        run(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.context_lens,
            self.cu_seqlens_q,
            self.scale,
            out,
            threads,
            level,
        )
        return out

    def context(self, b: int) -> tuple[NDArray, NDArray]:
        """Keys and values of a sequence, [context, kv heads, dim], gathered slot by slot."""
        size = self.k_cache.shape[1]
        at = [(self.block_tables[b, i // size], i % size) for i in range(self.context_lens[b])]
        return np.stack([self.k_cache[s] for s in at]), np.stack([self.v_cache[s] for s in at])

    def oracle(self) -> NDArray:
        out = np.full(self.q.shape, np.nan)
        group = self.q.shape[1] // self.k_cache.shape[2]
        for b, context in enumerate(self.context_lens):
            if self.cu_seqlens_q[b] == self.cu_seqlens_q[b + 1]:
                continue
            k, v = self.context(b)
            for t in range(self.cu_seqlens_q[b], self.cu_seqlens_q[b + 1]):
                seen = context - self.cu_seqlens_q[b + 1] + t + 1
                for head in range(self.q.shape[1]):
                    scores = (
                        k[:seen, head // group].astype(np.float64) @ self.q[t, head].astype(np.float64) * self.scale
                    )
                    weights = np.exp(scores - scores.max())
                    out[t, head] = weights @ v[:seen, head // group].astype(np.float64) / weights.sum()
        return out


def in_bfloat16(given: Problem) -> tuple[Problem, Problem]:
    """The problem with its numbers rounded, as bfloat16 and as the float32 that mean the same."""
    rounded = {name: torch.from_numpy(getattr(given, name)).bfloat16() for name in ("q", "k_cache", "v_cache")}
    narrow = {name: x.view(torch.int16).numpy() for name, x in rounded.items()}
    return replace(given, **narrow), replace(given, **{name: x.float().numpy() for name, x in rounded.items()})


def widened(bits: NDArray) -> NDArray:
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()


def problem(
    queries: list[int],
    contexts: list[int],
    *,
    block_size: int = 16,
    q_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    seed: int = 0,
    spread: float = 1.0,
) -> Problem:
    """Random tensors in shuffled blocks. Unused slots are NaN, table entries past a context are garbage."""
    rng = np.random.default_rng(seed)
    pages = [-(-context // block_size) for context in contexts]
    blocks = sum(pages) + 3
    cache = np.full((2, blocks, block_size, kv_heads, dim), np.nan, np.float32)
    tables = rng.integers(-(2**31), 2**31, size=(len(queries), max(pages) + 2)).astype(np.int32)
    free = rng.permutation(blocks)
    for b, context in enumerate(contexts):
        own, free = free[: pages[b]], free[pages[b] :]
        tables[b, : pages[b]] = own
        for i in range(context):
            cache[:, own[i // block_size], i % block_size] = rng.standard_normal((2, kv_heads, dim))
    return Problem(
        q=(spread * rng.standard_normal((sum(queries), q_heads, dim))).astype(np.float32),
        k_cache=cache[0],
        v_cache=cache[1],
        block_tables=tables,
        context_lens=np.array(contexts, np.int32),
        cu_seqlens_q=np.cumsum([0, *queries]).astype(np.int32),
        scale=dim**-0.5,
    )


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (14, 2), (24, 1), (20, 20)])  # tiles of one key head, and of several
@pytest.mark.parametrize("dim", [16, 20, 64, 127, 128])
def test_equals_oracle(block_size: int, heads: tuple[int, int], dim: int) -> None:
    # Decode, prefill from nothing, a later chunk, contexts around the softmax chunk of 64, a sequence without queries.
    queries, contexts = [1, 1, 5, 3, 0, 1, 1, 37], [1, 64, 5, 130, 9, 65, 63, 70]
    given = problem(queries, contexts, block_size=block_size, q_heads=heads[0], kv_heads=heads[1], dim=dim)
    expected = given.oracle()
    for level in LEVELS:
        np.testing.assert_allclose(given.run(level=level), expected, rtol=RTOL, atol=ATOL, err_msg=level)


@pytest.mark.parametrize("heads", [(4, 2), (14, 2), (20, 20)])
@pytest.mark.parametrize("dim", [16, 20, 64, 127, 128])
def test_equals_oracle_in_bfloat16(heads: tuple[int, int], dim: int) -> None:
    queries, contexts = [1, 1, 5, 3, 0, 1, 1, 37], [1, 64, 5, 130, 9, 65, 63, 70]
    narrow, wide = in_bfloat16(problem(queries, contexts, q_heads=heads[0], kv_heads=heads[1], dim=dim))
    expected = wide.oracle()
    for level in LEVELS:
        out = widened(narrow.run(level=level))
        np.testing.assert_allclose(out, expected, rtol=2**-8 * 1.01, atol=ATOL, err_msg=level)  # half an ulp


@pytest.mark.parametrize("level", LEVELS)
def test_a_tie_is_rounded_to_even(level: str) -> None:
    """The mean of two neighbours in bfloat16 lies between them: the even one is taken. NaN stays NaN."""
    narrow, _ = in_bfloat16(problem([1], [2], q_heads=2, kv_heads=1, dim=32))
    narrow.q[:] = 0
    low = np.arange(0x3F80, 0x3F80 + 31, dtype=np.int16)
    for slot, bits in ((0, low), (1, low + 1)):
        narrow.v_cache[narrow.block_tables[0, 0], slot, 0, :31] = bits
        narrow.v_cache[narrow.block_tables[0, 0], slot, 0, 31] = 0x7FC0
    out = narrow.run(level=level)
    assert (out[..., :31] == low + (low & 1)).all()
    assert np.isnan(widened(out[..., 31])).all()


@pytest.mark.parametrize("spread", [0.0, 30.0, 3000.0])
def test_flat_and_sharp_softmax(spread: float) -> None:
    # Scores of +-10000 leave one key; most weights underflow, and the largest score changes from chunk to chunk.
    given = problem([1, 50], [300, 200], spread=spread)
    # Rounding of a score grows with the score: the oracle itself moves by this much when q moves by half an ulp.
    np.testing.assert_allclose(given.run(), given.oracle(), rtol=RTOL, atol=ATOL * max(1.0, spread))


def test_strided_views() -> None:
    given = problem([1, 9, 1], [40, 30, 80])
    expected = given.run()
    fused = np.full((11, 8, 64), np.nan, np.float32)
    fused[:, 2:6] = given.q
    layers = np.full((*given.k_cache.shape[:2], 3, 2, 2, 64), np.nan, np.float32)
    layers[:, :, 1, 0], layers[:, :, 1, 1] = given.k_cache, given.v_cache
    given.q, given.k_cache, given.v_cache = fused[:, 2:6], layers[:, :, 1, 0], layers[:, :, 1, 1]
    out = np.full((11, 6, 64), np.nan, np.float32)
    _native.paged_attention_f32(
        given.q,
        given.k_cache,
        given.v_cache,
        given.block_tables,
        given.context_lens,
        given.cu_seqlens_q,
        given.scale,
        out[:, 1:5],
        1,
    )
    assert out[:, 1:5].tobytes() == expected.tobytes()
    assert np.isnan(out[:, [0, 5]]).all()


def test_nan_in_one_sequence_stays_there() -> None:
    given = problem([1, 1, 1], [70, 70, 70])
    before = given.run()
    block = given.block_tables[1, 2]
    given.k_cache[block, 3, 0] = np.nan
    after = given.run()
    assert np.isnan(after[1, :2]).all(), "the heads that read it"
    after[1, :2] = before[1, :2]
    assert after.tobytes() == before.tobytes()


# ---- bits ----------------------------------------------------------------------------------------------------------

RAGGED = ([1, 33, 1, 70, 1, 2, 1, 1], [200, 33, 64, 200, 17, 130, 1, 333])


@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3)])
@pytest.mark.parametrize("dim", [20, 64])
def test_threads_do_not_change_bits(heads: tuple[int, int], dim: int) -> None:
    # 20x the smallest work that is shared out.
    given = problem(
        [q * 3 for q in RAGGED[0]], [c * 3 for c in RAGGED[1]], q_heads=heads[0], kv_heads=heads[1], dim=dim
    )
    expected = given.run(1).tobytes()
    for threads in (2, 3, 8):
        assert given.run(threads).tobytes() == expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3)])
@pytest.mark.parametrize("dim", [20, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_query_alone_gives_the_same_bits(level: str, heads: tuple[int, int], dim: int, dtype: str) -> None:
    given = problem(*RAGGED, q_heads=heads[0], kv_heads=heads[1], dim=dim)
    given = in_bfloat16(given)[0] if dtype == "bfloat16" else given
    batch = given.run(level=level)
    for b, context in enumerate(given.context_lens):
        first, end = given.cu_seqlens_q[b : b + 2]
        for t in range(first, end):
            alone = Problem(
                q=given.q[t : t + 1],
                k_cache=given.k_cache,
                v_cache=given.v_cache,
                block_tables=given.block_tables[b : b + 1],
                context_lens=np.array([context - end + t + 1], np.int32),
                cu_seqlens_q=np.array([0, 1], np.int32),
                scale=given.scale,
            )
            assert alone.run(level=level).tobytes() == batch[t : t + 1].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_chunked_prefill_gives_the_same_bits(chunk: int, dtype: str) -> None:
    whole = problem([150], [150])
    whole = in_bfloat16(whole)[0] if dtype == "bfloat16" else whole
    expected = whole.run()
    for start in range(0, 150, chunk):
        end = min(start + chunk, 150)
        part = Problem(
            q=whole.q[start:end],
            k_cache=whole.k_cache,
            v_cache=whole.v_cache,
            block_tables=whole.block_tables,
            context_lens=np.array([end], np.int32),
            cu_seqlens_q=np.array([0, end - start], np.int32),
            scale=whole.scale,
        )
        assert part.run().tobytes() == expected[start:end].tobytes()


def test_blocks_do_not_change_bits() -> None:
    small, large = problem([3, 1], [100, 90], block_size=1), problem([3, 1], [100, 90], block_size=64)
    large.q = small.q
    for b in range(2):
        keys, values = small.context(b)
        for i in range(small.context_lens[b]):
            at = large.block_tables[b, i // 64], i % 64
            large.k_cache[at], large.v_cache[at] = keys[i], values[i]
    assert small.run().tobytes() == large.run().tobytes()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("q", np.zeros((2, 3, 64), np.float32), "multiple"),
        ("q", np.zeros((2, 64), np.float32), r"q must be \[tokens"),
        ("q", np.zeros((2, 4, 128), np.float32)[:, :, ::2], "must be dense"),
        ("v_cache", np.zeros((9, 16, 2, 32), np.float32), "v_cache must have the shape"),
        ("context_lens", np.array([-1, 20], np.int32), r"context_lens\[0\] is -1, less than its 1 query"),
        ("context_lens", np.array([20, 2000], np.int32), r"context_lens\[1\] is 2000, more than"),
        ("context_lens", np.array([20], np.int32), "context_lens must have the shape"),
        ("block_tables", np.array([[0, 1, 2], [3, 99, 0]], np.int32), r"block_tables\[1\]\[1\] is 99"),
        ("block_tables", np.array([[0, -1, 2], [3, 4, 0]], np.int32), r"block_tables\[0\]\[1\] is -1"),
        ("cu_seqlens_q", np.array([0, 1, 3], np.int32), "2 tokens"),
        ("cu_seqlens_q", np.array([0, 3, 2], np.int32), "smaller than the entry before"),
    ],
)
def test_what_does_not_fit_is_a_value_error(field: str, value: NDArray, message: str) -> None:
    given = problem([1, 1], [20, 20])
    setattr(given, field, value)
    with pytest.raises(ValueError, match=message):
        given.run()


def test_unknown_level_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="does not run the level x87"):
        problem([1], [20]).run(level="x87")


def test_wrong_dtypes_are_never_converted() -> None:
    given = problem([1, 1], [20, 20])
    given.q = given.q.astype(np.float64)
    with pytest.raises(TypeError):
        given.run()


def test_a_row_without_a_context_fills_up_a_batch() -> None:
    """Captured decode steps have one size: such a row is 0, whatever its table holds, and the others do not know it."""
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.standard_normal((3, 4, 64), dtype=np.float32))
    caches = torch.from_numpy(rng.standard_normal((2, 6, 16, 2, 64), dtype=np.float32))
    tables = torch.tensor([[0, 1], [99, -1], [2, 3]], dtype=torch.int32)
    cu = torch.arange(4, dtype=torch.int32)
    lengths = torch.tensor([20, 0, 31], dtype=torch.int32)
    out = paged_attention_native(q, *caches, tables, lengths, cu, scale=0.125)
    assert (out[1] == 0).all()
    alone = paged_attention_native(q[::2], *caches, tables[::2], lengths[::2], cu[:3], scale=0.125)
    assert torch.equal(out[::2], alone)
