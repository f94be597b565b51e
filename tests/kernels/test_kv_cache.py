"""mrope_write_kv: against its steps one by one, and what it must leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.fp8 import FP8, quantize_heads
from thyme.kernels.kv_cache import mrope_write_kv, mrope_write_kv_ref, mrope_write_kv_triton
from thyme.kernels.mrope import mrope, mrope_ref, mrope_tables, mrope_triton
from thyme.kernels.paged_attention import paged_attention

RUNS = [mrope_write_kv_ref, mrope_write_kv, mrope_write_kv_triton]
ALL = pytest.mark.parametrize("run", RUNS, ids=["ref", "native", "triton"])
Run = Callable[..., Tensor]


def problem(tokens: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Caches of 4 blocks of 5 slots that hold NaN; every third token is padding."""
    frequencies = 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    half = dim // 2
    sections = (half // 3, half // 3, half - 2 * (half // 3))
    cos, sin = mrope_tables(torch.randint(0, 100, (3, tokens)), frequencies, sections)
    slots = torch.randperm(20)[:tokens]
    slots[1::3] = -1
    return {
        "qkv": torch.randn(tokens, queries + 2 * keys, dim).to(dtype),
        "cos": cos,
        "sin": sin,
        "k_cache": torch.full((4, 5, keys, dim), torch.nan, dtype=dtype),
        "v_cache": torch.full((4, 5, keys, dim), torch.nan, dtype=dtype),
        "slot_mapping": slots,
    }


def call(run: Run, args: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k_cache, v_cache), the caches given left as they were."""
    args = args | {name: args[name].clone() for name in ("k_cache", "v_cache")} | more
    return run(**args), args["k_cache"], args["v_cache"]


def oracle(args: dict[str, Any], bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token and head by head, in float64."""
    keys = args["k_cache"].shape[2]
    queries = args["qkv"].shape[1] - 2 * keys
    q = torch.empty(len(args["qkv"]), queries, args["qkv"].shape[2], dtype=torch.float64)
    caches = [args[name].double() for name in ("k_cache", "v_cache")]
    for token, slot in enumerate(args["slot_mapping"].tolist()):
        turn = torch.complex(args["cos"][token, 0].double(), args["sin"][token, 0].double())
        for head, x in enumerate(args["qkv"][token].double()):
            if bias is not None:
                x = x + bias.view(-1, len(x))[head].double()
            a, b = x.chunk(2)
            turned = torch.complex(a, b) * turn
            if head < queries:
                q[token, head] = torch.cat((turned.real, turned.imag))
            elif slot >= 0 and head < queries + keys:
                caches[0][slot // 5, slot % 5, head - queries] = torch.cat((turned.real, turned.imag))
            elif slot >= 0:
                caches[1][slot // 5, slot % 5, head - queries - keys] = x
    return q, *caches


# Tokens, query and key heads, D: groups of 7, one of each, halves that are no power of two, more heads than a program
# takes, one token.
SHAPES = [(8, 7, 1, 24), (6, 1, 1, 6), (4, 14, 5, 64), (2, 20, 6, 128), (1, 4, 2, 16)]


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
def test_against_the_loop(run: Run, shape: tuple[int, ...], has_bias: bool, tolerances: dict) -> None:
    """What no token owns stays NaN, as the loop leaves it."""
    args = problem(*shape)
    bias = torch.randn(args["qkv"][0].numel()) if has_bias else None
    atol, rtol = tolerances["grad", torch.float32]
    for got, wanted in zip(call(run, args, bias=bias), oracle(args, bias), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("is_half", [False, True], ids=["float32", "half"])
@ALL
def test_the_bits_are_those_of_the_separate_steps(run: Run, is_half: bool) -> None:
    """Also in half precision: the sum with the bias is rounded before it is turned."""
    turn, half = (mrope if run is mrope_write_kv else mrope_ref), torch.bfloat16
    if run is mrope_write_kv_triton:
        turn, half = mrope_triton, torch.float16  # the interpreter cannot round to bfloat16
    dtype = half if is_half else torch.float32
    args = problem(7, 6, 2, 24, dtype)
    bias = torch.randn(240).to(dtype)
    qkv = args["qkv"] + bias.view(10, 24)
    k_cache, v_cache = args["k_cache"].clone(), args["v_cache"].clone()
    q, k = turn(qkv[:, :8], args["cos"], args["sin"]).split((6, 2), 1)
    for token, slot in enumerate(args["slot_mapping"].tolist()):
        if slot >= 0:
            k_cache[slot // 5, slot % 5], v_cache[slot // 5, slot % 5] = k[token], qkv[token, 8:]
    for got, wanted in zip(call(run, args, bias=bias), (q, k_cache, v_cache), strict=True):
        assert torch.equal(got.nan_to_num(99.0), wanted.nan_to_num(99.0))


@ALL
def test_only_the_named_slots_are_written(run: Run) -> None:
    """Bit by bit, NaN in padding tokens included; and their queries come back all the same."""
    args = problem(7, 3, 2, 8)
    padding = args["slot_mapping"] < 0
    assert padding.any()
    args["qkv"][padding, 3:] = torch.nan
    guarded = torch.full((2, 6, 5, 2, 8), 1234.5)  # a block before and one after each cache
    k_cache, v_cache = guarded[:, 1:5]
    q = run(**args | {"k_cache": k_cache, "v_cache": v_cache})
    assert q.isfinite().all()
    assert (guarded[:, 0] == 1234.5).all() and (guarded[:, 5] == 1234.5).all()
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[args["slot_mapping"][~padding]] = False
    for cache in (k_cache, v_cache):
        assert (cache.flatten(0, 1)[untouched] == 1234.5).all()
        assert cache.isfinite().all() and (cache.flatten(0, 1)[~untouched] != 1234.5).all()


@ALL
def test_nothing_but_padding_writes_nothing(run: Run) -> None:
    args = problem(4, 2, 1, 8) | {"slot_mapping": torch.full((4,), -1)}
    q, k_cache, v_cache = call(run, args)
    assert q.isfinite().all() and k_cache.isnan().all() and v_cache.isnan().all()


@ALL
def test_the_projection_is_read_where_it_lies(run: Run) -> None:
    args = problem(6, 3, 2, 12)
    expected = call(run, args)
    wide = torch.randn(6, 9, 20)
    wide[:, 1:8, 4:16] = args["qkv"]
    turned = args["qkv"].transpose(1, 2).contiguous().transpose(1, 2)
    for qkv in (wide[:, 1:8, 4:16], turned):
        for got, wanted in zip(call(run, args, qkv=qkv), expected, strict=True):
            assert torch.equal(got.nan_to_num(99.0), wanted.nan_to_num(99.0))


def test_a_token_does_not_know_its_batch_in_triton() -> None:
    args = problem(9, 5, 2, 24)
    whole = call(mrope_write_kv_triton, args)
    for token in (0, 1, 8):
        at = slice(token, token + 1)
        alone = call(mrope_write_kv_triton, args, **{n: args[n][at] for n in ("qkv", "cos", "sin", "slot_mapping")})
        assert torch.equal(alone[0][0], whole[0][token])
        if (slot := args["slot_mapping"][token]) >= 0:
            for one, many in zip(alone[1:], whole[1:], strict=True):
                assert torch.equal(one.flatten(0, 1)[slot], many.flatten(0, 1)[slot])


@ALL
def test_write_then_attend(run: Run) -> None:
    """A prompt through shuffled blocks whose unused slots are NaN attends as plain causal attention does."""
    args = problem(11, 4, 2, 16) | {
        "slot_mapping": (torch.tensor([3, 0, 2])[:, None] * 5 + torch.arange(5)).flatten()[:11]
    }
    q, k_cache, v_cache = call(run, args)
    tables, one = torch.tensor([[3, 0, 2]], dtype=torch.int32), torch.tensor([0, 11], dtype=torch.int32)
    out = paged_attention(q, k_cache, v_cache, tables, one[1:], one, scale=0.25)
    q, k = mrope_ref(args["qkv"][:, :6], args["cos"], args["sin"]).split((4, 2), 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, args["qkv"][:, 6:])), is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=2e-6, rtol=1e-5)


@ALL
def test_no_tokens(run: Run) -> None:
    q, k_cache, _ = call(run, problem(0, 3, 1, 8))
    assert q.shape == (0, 3, 8) and k_cache.isnan().all()


def test_the_public_op_is_the_reference_in_bfloat16_on_a_cpu() -> None:
    args = problem(5, 3, 1, 8, torch.bfloat16)
    for got, wanted in zip(call(mrope_write_kv, args), call(mrope_write_kv_ref, args), strict=True):
        assert torch.equal(got.nan_to_num(99.0), wanted.nan_to_num(99.0))


@ALL
def test_a_gradient_is_refused_not_lost(run: Run) -> None:
    args = problem(5, 3, 1, 8)
    args["qkv"].requires_grad_()
    with pytest.raises(ValueError, match=r"mrope_write_kv has none: call it under torch\.no_grad"):
        call(run, args)
    with torch.no_grad():
        assert call(run, args)[0].isfinite().all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"qkv": torch.ones(2, 40)}, r"qkv must have shape \[any, any, any\], got \[2, 40\]"),
    "type": ({"qkv": torch.ones(2, 5, 8).int()}, "qkv must be torch.float32 or .*, got torch.int32"),
    "dim": ({"qkv": torch.ones(2, 5, 6)}, r"k_cache must have shape \[any, any, any, 6\], got \[4, 5, 1, 8\]"),
    "no query": (
        {"qkv": torch.ones(2, 2, 8)},
        "qkv has 2 heads, of which keys and values take 2 x 1: no query is left",
    ),
    "tables": ({"cos": torch.ones(3, 1, 4)}, r"cos must have shape \[2, 1, 4\], got \[3, 1, 4\]"),
    "cache type": ({"k_cache": torch.ones(4, 5, 1, 8).half()}, "k_cache must be torch.float32, got torch.float16"),
    "caches": ({"v_cache": torch.ones(4, 5, 2, 8)}, r"v_cache must have shape \[4, 5, 1, 8\], got \[4, 5, 2, 8\]"),
    "layout": ({"v_cache": torch.ones(4, 8, 1, 5).transpose(1, 3)}, "k_cache and v_cache must be contiguous"),
    "slot": ({"slot_mapping": torch.tensor([0, 20])}, r"slot_mapping must be in \[-1, 19\], got 20"),
    "slot type": ({"slot_mapping": torch.tensor([0, 1]).int()}, "slot_mapping must be torch.int64, got torch.int32"),
    "bias": ({"bias": torch.ones(5, 8)}, r"bias must have shape \[40\], got \[5, 8\]"),
    "bias type": ({"bias": torch.ones(40).half()}, "bias must be torch.float32, got torch.float16"),
    "device": ({"bias": torch.ones(40, device="meta")}, "bias is on meta, the other arguments on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**(problem(2, 3, 1, 8) | change))


# Caches in 8 bits.


def in_8_bits(args: dict[str, Any]) -> dict[str, Any]:
    """The same caches as codes, all of them no number, and scales of 99."""
    shape = args["k_cache"].shape
    codes = {name: torch.full(shape, 127, dtype=torch.uint8).view(FP8) for name in ("k_cache", "v_cache")}
    return args | codes | {name: torch.full(shape[:3], 99, dtype=torch.uint8) for name in ("k_scales", "v_scales")}


def call_8_bits(run: Run, args: dict[str, Any]) -> list[Tensor]:
    """[q, k_cache, v_cache, k_scales, v_scales], codes as bytes."""
    args = args | {name: args[name].clone() for name in ("k_cache", "v_cache", "k_scales", "v_scales")}
    q = run(**args)
    return [q, *(args[name].view(torch.uint8) for name in ("k_cache", "v_cache", "k_scales", "v_scales"))]


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
def test_codes_are_those_of_what_a_cache_would_keep(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool
) -> None:
    """Written and quantized apart, to the bit; nothing else is touched."""
    if run is mrope_write_kv_triton and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter cannot round to bfloat16
    args = problem(*shape, dtype)
    args["qkv"] *= torch.logspace(-3, 3, len(args["qkv"]))[:, None, None].to(dtype)
    if has_bias:
        args["bias"] = torch.randn(args["qkv"][0].numel()).to(dtype)
    q, *kept = call(run, args)
    slots = args["slot_mapping"][args["slot_mapping"] >= 0]
    got = call_8_bits(run, in_8_bits(args))
    assert torch.equal(got[0], q)
    for cache, codes, scales in zip(kept, got[1:3], got[3:], strict=True):
        wanted, biased = (torch.full_like(x, value) for x, value in ((codes, 127), (scales, 99)))
        made = quantize_heads(cache.flatten(0, 1)[slots])
        wanted.flatten(0, 1)[slots], biased.flatten(0, 1)[slots] = made[0].view(torch.uint8), made[1]
        assert torch.equal(codes, wanted)
        assert torch.equal(scales, biased)


BAD_8_BITS: dict[str, tuple[dict[str, Any], str]] = {
    "one of two": ({"v_scales": None}, "k_scales and v_scales go together: give both or neither"),
    "none": ({"k_scales": None, "v_scales": None}, "k_cache is in float8_e4m3fn, whose codes mean nothing without"),
    "not in 8 bits": ({"k_cache": torch.ones(4, 5, 1, 8)}, "k_cache must be torch.float8_e4m3fn, got torch.float32"),
    "shape": ({"v_scales": torch.ones(4, 5, 2).byte()}, r"v_scales must have shape \[4, 5, 1\], got \[4, 5, 2\]"),
    "type": ({"k_scales": torch.ones(4, 5, 1)}, "k_scales must be torch.uint8, got torch.float32"),
    "layout": ({"k_scales": torch.ones(5, 4, 1).byte().transpose(0, 1)}, "k_scales must be contiguous"),
}


@pytest.mark.parametrize(("change", "message"), BAD_8_BITS.values(), ids=BAD_8_BITS)
@ALL
def test_bad_caches_in_8_bits(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**(in_8_bits(problem(2, 3, 1, 8)) | change))
