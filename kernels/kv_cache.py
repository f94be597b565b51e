"""Write the keys and values of new tokens into the paged cache; alone, or with all that precedes it in one launch.

Slot s of the cache is place s % block_size of block s // block_size; token t goes to slot_mapping[t], -1 to nowhere.

    write_kv:        k_cache[slot], v_cache[slot] = k, v
    mrope_write_kv:  q, k, v = heads of qkv + bias;  q, k = mrope(q), mrope(k);  write_kv(k, v);  returns q

Shapes: k, v [T, Nkv, D]; qkv [T, Nq + 2 Nkv, D] as the projection leaves it; k_cache, v_cache
[blocks, block_size, Nkv, D], contiguous; slot_mapping [T] int64.
Numerics: qkv + bias is rounded to their dtype, then turned in float32 and rounded, as the separate steps round.
Traffic, elements a token: write_kv 4 Nkv D; mrope_write_kv 2 (Nq + 2 Nkv) D where mrope and write_kv apart move
2 (Nq + 3 Nkv) D, and a bias added apart as much again: what it saves on few tokens is launches.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_range, check_tensor
from thyme.kernels.mrope import check_heads, launch_config, mrope_ref, turned


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv` in torch: the definition, and the CPU path."""
    _check(k, v, k_cache, v_cache, slot_mapping, FLOATS_AND_DOUBLE)
    if len(slot_mapping) > 0 and bool((slot_mapping < 0).any()):
        used = (slot_mapping >= 0).nonzero().flatten()
        k, v, slot_mapping = k[used], v[used], slot_mapping[used]
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per token; its Nkv * D numbers lie together in k, v and the caches."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    tl.store(k_cache_ptr + slot * WIDTH + column, tl.load(k_ptr + token * k_stride + column, mask=ok), mask=ok)
    tl.store(v_cache_ptr + slot * WIDTH + column, tl.load(v_ptr + token * v_stride + column, mask=ok), mask=ok)


def write_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv` in Triton."""
    _check(k, v, k_cache, v_cache, slot_mapping, FLOATS)
    width = k.shape[1] * k.shape[2]
    k, v = _tokens_together(k), _tokens_together(v)
    if len(k) > 0:
        _write_kernel[(len(k),)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), k.stride(0), v.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


def _tokens_together(x: Tensor) -> Tensor:
    """x itself when each token's heads are contiguous, as in a slice of a fused projection; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:  # fmt: skip
    check_tensor("k", k, (None, None, None), dtypes)
    check_tensor("v", v, tuple(k.shape), (k.dtype,), k.device)
    check_tensor("k_cache", k_cache, (None, None, k.shape[1], k.shape[2]), (k.dtype,), k.device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), (k.dtype,), k.device)
    check_tensor("slot_mapping", slot_mapping, (len(k),), (torch.int64,), k.device)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous: a slot is addressed by its number")
    check_range("slot_mapping", slot_mapping, -1, k_cache.shape[0] * k_cache.shape[1] - 1)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k and v of T tokens into their slots of the caches, in place; Triton on a GPU, torch on a CPU.

    Args:
        k, v: [T, Nkv, D], of the caches' dtype.
        k_cache, v_cache: [blocks, block_size, Nkv, D], contiguous.
        slot_mapping: [T] int64, block * block_size + place of each token; -1: the token is padding and not written.
            No slot twice.

    Raises:
        ValueError: a wrong shape, dtype, device or layout; on a CPU, or under THYME_VALIDATE=1, also a slot out of
            range.
    """
    run = write_kv_triton if k.is_cuda else write_kv_ref
    run(k, v, k_cache, v_cache, slot_mapping)


# --- with the bias and the rotation in front --------------------------------------------------------------------------


def mrope_write_kv_ref(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`mrope_write_kv` in torch: the definition, and the CPU path."""
    queries, keys = _check_qkv(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, FLOATS_AND_DOUBLE)
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[1:])
    turning, v = qkv.split((queries + keys, keys), 1)
    q, k = mrope_ref(turning, cos, sin).split((queries, keys), 1)
    write_kv_ref(k, v, k_cache, v_cache, slot_mapping)
    return q


@triton.jit
def _mrope_kernel(
    qkv_ptr, bias_ptr, cos_ptr, sin_ptr, slot_ptr, q_ptr, k_cache_ptr, v_cache_ptr, stride, head_stride,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    k = k_cache_ptr + (slot * KEYS + head - QUERIES) * (2 * HALF) + pair
    tl.store(k, turned_a, mask=is_key)
    tl.store(k + HALF, turned_b, mask=is_key)
    is_value = written & (head >= QUERIES + KEYS) & (head < QUERIES + 2 * KEYS)
    v = v_cache_ptr + (slot * KEYS + head - QUERIES - KEYS) * (2 * HALF) + pair
    tl.store(v, a, mask=is_value)
    tl.store(v + HALF, b, mask=is_value)


def mrope_write_kv_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`mrope_write_kv` in Triton; float32, bfloat16 or float16, tables of float32."""
    queries, keys = _check_qkv(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias, FLOATS)
    num_tokens, num_heads, dim = qkv.shape
    q = torch.empty(num_tokens, queries, dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens > 0:
        qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
        config = launch_config(num_heads, dim // 2)
        _mrope_kernel[(num_tokens, triton.cdiv(num_heads, config["HEADS"]))](
            qkv, None if bias is None else bias.contiguous(), cos.contiguous(), sin.contiguous(),
            slot_mapping.contiguous(), q, k_cache, v_cache, qkv.stride(0), qkv.stride(1),
            QUERIES=queries, KEYS=keys, HALF=dim // 2, **config,
        )  # fmt: skip
    return q


def _check_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    bias: Tensor | None, dtypes: tuple[torch.dtype, ...],
) -> tuple[int, int]:  # fmt: skip
    """(query heads, key heads)."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("qkv requires a gradient, and mrope_write_kv has none: call it under torch.no_grad()")
    check_tensor("qkv", qkv, (None, None, None), dtypes)
    check_tensor("k_cache", k_cache, (None, None, None, qkv.shape[2]), (qkv.dtype,), qkv.device)
    keys = k_cache.shape[2]
    queries = qkv.shape[1] - 2 * keys
    if queries < 1:
        raise ValueError(f"qkv has {qkv.shape[1]} heads, of which keys and values take 2 x {keys}: no query is left")
    check_heads(qkv, cos, sin, dtypes)
    key = qkv[:, queries : queries + keys]
    _check(key, key, k_cache, v_cache, slot_mapping, dtypes)
    if bias is not None:
        check_tensor("bias", bias, (qkv.shape[1] * qkv.shape[2],), (qkv.dtype,), qkv.device)
    return queries, keys


def mrope_write_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Turns the queries and keys of T tokens and writes keys and values into their slots, in place; for rollout.

    Args:
        qkv: [T, Nq + 2 Nkv, D] of the caches' dtype, D even: query heads, key heads, value heads.
        cos, sin: [T, 1, D / 2] float32, of `mrope_tables`.
        k_cache, v_cache, slot_mapping: as in `write_kv`; the queries of a token of slot -1 are returned all the same.
        bias: [(Nq + 2 Nkv) D] of qkv's dtype, added first; None where the projection has added it.

    Returns:
        the turned queries, [T, Nq, D] in qkv's dtype; not differentiable.

    Raises:
        ValueError: as in `write_kv` and `mrope`.
    """
    run = mrope_write_kv_triton if qkv.is_cuda else mrope_write_kv_ref
    return run(qkv, cos, sin, k_cache, v_cache, slot_mapping, bias=bias)
