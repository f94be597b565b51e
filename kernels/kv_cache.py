"""Turn the queries and keys of new tokens and write keys and values into the paged cache, in one pass.

    q, k, v = heads of qkv + bias;  q, k = mrope(q), mrope(k);  k_cache[slot], v_cache[slot] = k, v;  returns q

Slot s of the cache is place s % block_size of block s // block_size; token t goes to slot_mapping[t], -1 to nowhere.

Shapes: qkv [T, Nq + 2 Nkv, D] as the projection leaves it; k_cache, v_cache [blocks, block_size, Nkv, D], contiguous;
slot_mapping [T] int64.
Numerics: qkv + bias is rounded to their dtype, then turned in float32 and rounded, as the separate steps round. What a
cache in 8 bits gets is rounded once more, each head of a token under a scale of its own.
Traffic: 2 (Nq + 2 Nkv) D elements a token, where mrope and a write apart move 2 (Nq + 3 Nkv) D, and a bias added apart
as much again: what it saves on few tokens is launches.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme import _native
from thyme.kernels.attention_tiles import power_of_two
from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_range, check_tensor, on_its_device
from thyme.kernels.fp8 import check_capability, quantize_heads
from thyme.kernels.fp8_cache import check_cache
from thyme.kernels.library import registered
from thyme.kernels.mrope import check_heads, launch_config, mrope_ref, turn_on_cpu, turned
from thyme.kernels.native import NATIVE, array_of, native


def mrope_write_kv_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    bias: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`mrope_write_kv` in torch: the definition."""
    return _write(mrope_ref, _store_ref, qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, k_scales, v_scales)


def _store_ref(cache: Tensor, slots: Tensor, heads: Tensor) -> None:
    _check_slots(slots, cache)
    used = (slots >= 0).nonzero().flatten()
    cache.flatten(0, 1).index_copy_(0, slots[used], heads[used])


def _store_codes(
    store: Callable[[Tensor, Tensor, Tensor], None], cache: Tensor, scales: Tensor, slots: Tensor, heads: Tensor
) -> None:
    codes, biased = quantize_heads(heads)
    store(cache.view(torch.uint8), slots, codes.view(torch.uint8))
    _store_ref(scales, slots, biased)


def _store_native(cache: Tensor, slots: Tensor, heads: Tensor) -> None:
    """The same in C++ (csrc/slot_rows.hpp), on a CPU, for any dtype: nothing is computed."""
    if heads.numel() > 0:
        rows, table = (
            x.view(torch.int16).numpy() for x in (heads.detach().flatten(1), cache.view(-1, heads[0].numel()))
        )
        try:
            _native.write_slots(rows, slots.contiguous().numpy(), table)
        except ValueError:  # it has looked at them before it wrote anything
            _check_slots(slots, cache)
            raise


def _check_slots(slots: Tensor, cache: Tensor) -> None:
    check_range("slot_mapping", slots, -1, cache.shape[0] * cache.shape[1] - 1)


def _write(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor],
    store: Callable[[Tensor, Tensor, Tensor], None],
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    bias: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> Tensor:
    scales = (k_scales, v_scales)
    queries, keys = _check(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, scales, FLOATS_AND_DOUBLE)
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[1:])
    turning, v = qkv.split((queries + keys, keys), 1)
    q, k = turn(turning, cos, sin).split((queries, keys), 1)
    for cache, scale, heads in ((k_cache, k_scales, k), (v_cache, v_scales, v)):
        if scale is None:
            store(cache, slot_mapping, heads)
        else:
            _store_codes(store, cache, scale, slot_mapping, heads)
    return q


@triton.jit
def biased_scale(largest):
    """The exponent + 127 of the least power of two that brings float32 numbers >= 0 to 448 = 1.75 x 2^8 or less."""
    bits = largest.to(tl.int32, bitcast=True)
    return tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)


@triton.jit
def _mrope_kernel(
    qkv_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    stride,
    head_stride,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for HEADS heads of one token: queries first, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    in_head = pair < HALF
    ok = (head < QUERIES + 2 * KEYS) & in_head
    at = qkv_ptr + token * stride + head * head_stride + pair
    a = tl.load(at, mask=ok, other=0.0)
    b = tl.load(at + HALF, mask=ok, other=0.0)
    if bias_ptr is not None:
        bias = bias_ptr + head * (2 * HALF) + pair
        a = (a.to(tl.float32) + tl.load(bias, mask=ok, other=0.0).to(tl.float32)).to(a.dtype)
        b = (b.to(tl.float32) + tl.load(bias + HALF, mask=ok, other=0.0).to(tl.float32)).to(b.dtype)
    cos = tl.load(cos_ptr + token * HALF + pair, mask=in_head, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + pair, mask=in_head, other=0.0)
    turned_a, turned_b = turned(a.to(tl.float32), b.to(tl.float32), cos, sin)
    turned_a, turned_b = turned_a.to(a.dtype), turned_b.to(b.dtype)

    is_query = in_head & (head < QUERIES)
    q = q_ptr + (token * QUERIES + head) * (2 * HALF) + pair
    tl.store(q, turned_a, mask=is_query)
    tl.store(q + HALF, turned_b, mask=is_query)
    slot = tl.load(slot_ptr + token)
    written = in_head & (head >= QUERIES) & (slot >= 0)
    is_key = written & (head < QUERIES + KEYS)
    if k_scale_ptr is not None:
        # Of the rounded numbers, as of a cache that keeps them.
        a = tl.where(is_key, turned_a.to(tl.float32), a.to(tl.float32))
        b = tl.where(is_key, turned_b.to(tl.float32), b.to(tl.float32))
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1)
        biased = biased_scale(largest)
        inverse = power_of_two(254 - biased)[:, None]
        a, b = (a * inverse).to(tl.float8e4nv), (b * inverse).to(tl.float8e4nv)
        turned_a, turned_b = a, b
        own = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        named = (own >= QUERIES) & (slot >= 0)
        at_key = slot * KEYS + own - QUERIES
        tl.store(k_scale_ptr + at_key, biased.to(tl.uint8), mask=named & (own < QUERIES + KEYS))
        is_v = named & (own >= QUERIES + KEYS) & (own < QUERIES + 2 * KEYS)
        tl.store(v_scale_ptr + at_key - KEYS, biased.to(tl.uint8), mask=is_v)
    k = k_cache_ptr + (slot * KEYS + head - QUERIES) * (2 * HALF) + pair
    tl.store(k, turned_a, mask=is_key)
    tl.store(k + HALF, turned_b, mask=is_key)
    is_value = written & (head >= QUERIES + KEYS) & (head < QUERIES + 2 * KEYS)
    v = v_cache_ptr + (slot * KEYS + head - QUERIES - KEYS) * (2 * HALF) + pair
    tl.store(v, a, mask=is_value)
    tl.store(v + HALF, b, mask=is_value)


@on_its_device
def mrope_write_kv_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    bias: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`mrope_write_kv` in Triton; float32, bfloat16 or float16, tables of float32."""
    queries, keys = _check(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, (k_scales, v_scales), FLOATS)
    _check_slots(slot_mapping, k_cache)
    if k_scales is not None:
        check_capability(qkv.device)
    num_tokens, num_heads, dim = qkv.shape
    q = torch.empty(num_tokens, queries, dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens > 0:
        qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
        config = launch_config(num_heads, dim // 2)
        _mrope_kernel[(num_tokens, triton.cdiv(num_heads, config["HEADS"]))](
            qkv,
            None if bias is None else bias.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            slot_mapping.contiguous(),
            q,
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            qkv.stride(0),
            qkv.stride(1),
            QUERIES=queries,
            KEYS=keys,
            HALF=dim // 2,
            **config,
        )
    return q


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    dtypes: tuple[torch.dtype, ...],
) -> tuple[int, int]:
    """(query heads, key heads)."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("qkv requires a gradient, and mrope_write_kv has none: call it under torch.no_grad()")
    check_tensor("qkv", qkv, (None, None, None), dtypes)
    num_tokens, num_heads, dim = qkv.shape
    check_cache(k_cache, v_cache, *scales, qkv)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), qkv.device)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous: a slot is addressed by its number")
    keys = k_cache.shape[2]
    queries = num_heads - 2 * keys
    if queries < 1:
        raise ValueError(f"qkv has {num_heads} heads, of which keys and values take 2 x {keys}: no query is left")
    check_heads(qkv, cos, sin, dtypes)
    if bias is not None:
        check_tensor("bias", bias, (num_heads * dim,), (qkv.dtype,), qkv.device)
    return queries, keys


@registered
@on_its_device
def mrope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    bias: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Turns the queries and keys of T tokens and writes keys and values into their slots, in place; Triton on a GPU,
    C++ on a CPU where it has the dtype.

    Args:
        qkv: [T, Nq + 2 Nkv, D] of the caches' dtype, D even: query heads, key heads, value heads.
        cos, sin: [T, 1, D / 2] float32 (or float64 on a CPU), of `mrope_tables`.
        k_cache, v_cache: [blocks, block_size, Nkv, D], contiguous; of qkv's dtype, or float8_e4m3fn with scales.
        slot_mapping: [T] int64, block * block_size + place of each token; -1: the token is padding, of which only the
            queries are returned. No slot twice.
        bias: [(Nq + 2 Nkv) D] of qkv's dtype, added first; None where the projection has added it.
        k_scales, v_scales: [blocks, block_size, Nkv] uint8, written beside codes in 8 bits: each head of a token has
            the least power of two under which it fits (fp8.py).

    Returns:
        the turned queries, [T, Nq, D] in qkv's dtype; not differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or a gradient asked for; on a CPU, or under
            THYME_VALIDATE=1, also a slot out of range.
    """
    if qkv.is_cuda:
        return mrope_write_kv_triton(
            qkv, cos, sin, k_cache, v_cache, slot_mapping, bias=bias, k_scales=k_scales, v_scales=v_scales
        )
    if qkv.dtype in NATIVE and cos.dtype == torch.float32 and k_scales is None:
        return _write_native(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias)
    return _write(turn_on_cpu, _store_native, qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, k_scales, v_scales)


def _write_native(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, bias: Tensor | None
) -> Tensor:
    """In one pass of C++, on a CPU."""
    queries, _ = _check(qkv, cos, sin, k_cache, v_cache, slots, bias, (None, None), NATIVE)
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[1:])
    q = torch.empty(len(qkv), queries, qkv.shape[2], dtype=qkv.dtype)
    if len(qkv) > 0:
        tables = cos.contiguous().numpy(), sin.contiguous().numpy(), slots.contiguous().numpy()
        arrays = array_of(k_cache), array_of(v_cache), array_of(q)
        heads = array_of(qkv if qkv.stride(2) == 1 else qkv.contiguous())
        try:
            native("turn_and_store", qkv.dtype)(heads, *tables, *arrays, torch.get_num_threads())
        except ValueError:  # it has looked at them before it wrote anything
            _check_slots(slots, k_cache)
            raise
    return q
