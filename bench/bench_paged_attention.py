"""Attention over the paged cache: decode of equal and of ragged contexts, chunked prefill, and groups with one prefix.

    pytest bench/bench_paged_attention.py

Contenders: gather + scaled_dot_product_attention, the reference, the reference compiled, ours, and on a GPU flash-attn
2 and 3 and FlashInfer. Bytes counted: every key and value in context read once (those of a shared prefix once for its
group), queries read and outputs written; flops: the products that causality leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders
from selection import chosen, shapes
from torch import Tensor

from thyme.kernels.attention_backend import flash_paged_attention
from thyme.kernels.paged_attention import SharedPrefix, paged_attention, paged_attention_ref


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    contexts: list[int]
    new: int = 1
    """New tokens of each sequence."""
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype
    block_size: int = 16
    group: int = 1
    """Neighbouring sequences that begin alike."""
    prefix: int = 0
    """Tokens they share."""

    @property
    def title(self) -> str:
        what = f"{len(self.contexts)} x {self.new} new of up to {max(self.contexts)}"
        return (
            f"paged_attention {self.name}: {what}, {self.heads[0]}/{self.heads[1]} heads of {self.dim}, "
            f"blocks of {self.block_size}"
        )

    @property
    def num_bytes(self) -> int:
        keys = sum(self.contexts) - (len(self.contexts) - len(self.contexts) // self.group) * self.prefix
        rows = 2 * len(self.contexts) * self.new * self.heads[0]
        return (2 * keys * self.heads[1] + rows) * self.dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        seen = sum(self.new * context - self.new * (self.new - 1) // 2 for context in self.contexts)
        return 4 * seen * self.heads[0] * self.dim


QWEN: dict[str, Any] = dict(heads=(28, 4), dim=128, dtype=torch.bfloat16)
RAGGED = [100 + (16_000 - 100) * i * i // 63**2 for i in range(64)]
GPU_SHAPES = [
    Shape(name="decode", contexts=[4_096] * 64, **QWEN),
    Shape(name="decode, blocks of 256", contexts=[4_096] * 64, block_size=256, **QWEN),
    Shape(name="decode, ragged", contexts=RAGGED, **QWEN),
    Shape(name="decode, one sequence", contexts=[16_384], **QWEN),
    Shape(name="decode, few sequences", contexts=[4_096] * 8, **QWEN),
    Shape(name="prefill", contexts=[8_192], new=8_192, block_size=256, **QWEN),
    Shape(name="prefill in chunks", contexts=[4_096] * 4, new=512, **QWEN),
    Shape(name="shared prefix", contexts=[4_096] * 64, group=8, prefix=3_584, **QWEN),
]
SMALL: dict[str, Any] = dict(heads=(8, 4), dim=64, dtype=torch.float32)
CPU_SHAPES = [
    Shape(name="decode", contexts=[256] * 64, **SMALL),
    Shape(name="decode, ragged", contexts=list(range(8, 520, 8)), **SMALL),
    Shape(name="prefill in chunks", contexts=[512] * 2, new=256, **SMALL),
    Shape(name="shared prefix", contexts=[576] * 16, group=8, prefix=512, **SMALL),
]


def decoding(sequences: int, context: int = 4_096, *more: int) -> Shape | None:
    """Of --shapes: sequences x tokens of context, which decode one token each."""
    sizes = dict(QWEN if GPU else SMALL)
    sizes["dtype"] = chosen.dtype or sizes["dtype"]
    return None if more else Shape(name="decode", contexts=[context] * sequences, **sizes)


SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES, decoding)


@dataclass(frozen=True)
class Problem:
    shape: Shape
    args: tuple[Tensor, ...]
    """q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q."""
    more: dict[str, Any]


def problem(shape: Shape) -> Problem:
    device = DEVICE
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device, dtype=shape.dtype)
    num_seqs, needed = len(shape.contexts), [-(-context // shape.block_size) for context in shape.contexts]
    caches = random(2, sum(needed), shape.block_size, shape.heads[1], shape.dim)
    order = torch.randperm(sum(needed), generator=generator, device=device).to(torch.int32)
    tables = torch.zeros(num_seqs, max(needed), dtype=torch.int32, device=device)
    shared_blocks = shape.prefix // shape.block_size
    for row, own in enumerate(order.split(needed)):
        tables[row, : len(own)] = own
        tables[row, :shared_blocks] = tables[row // shape.group * shape.group, :shared_blocks].clone()
    lengths = torch.tensor(shape.contexts, dtype=torch.int32, device=device)
    cu = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * shape.new
    q = random(num_seqs * shape.new, shape.heads[0], shape.dim)
    return Problem(shape, (q, *caches, tables, lengths, cu), dict(scale=shape.dim**-0.5, max_query_len=shape.new))


def gathered(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    context: Tensor,
    cu: Tensor,
    *,
    scale: float,
    visible: Tensor | None,
) -> Tensor:
    """What torch can do at its best; visible [B, 1, new, longest] is made beforehand, None where all is."""
    num_seqs, (heads, dim) = len(context), q.shape[1:]
    k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    q = q.view(num_seqs, -1, heads, dim).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, heads, dim)


def with_torch(case: Problem) -> Callable[[], Tensor]:
    q, _, _, tables, lengths, _ = case.args
    longest = tables.shape[1] * case.shape.block_size
    position = torch.arange(longest, device=q.device)
    last = lengths[:, None] - case.shape.new + torch.arange(case.shape.new, device=q.device)
    visible = (position <= last[:, :, None])[:, None]
    return partial(gathered, *case.args, scale=case.more["scale"], visible=None if visible.all() else visible)


def with_torch_compile(case: Problem) -> Callable[[], Tensor]:
    return partial(compiled(paged_attention_ref), *case.args, **case.more)


def ours(case: Problem) -> Callable[[], Tensor]:
    shape, more = case.shape, dict(case.more)
    if shape.prefix:
        num_groups = len(shape.contexts) // shape.group
        device = case.args[0].device
        more["shared"] = SharedPrefix(
            torch.arange(num_groups + 1, dtype=torch.int32, device=device) * shape.group,
            torch.full((num_groups,), shape.prefix // shape.block_size, dtype=torch.int32, device=device),
        )
    return partial(paged_attention, *case.args, **more)


def with_flashinfer(case: Problem) -> Callable[[], Tensor]:
    """Planned beforehand: its plan is made once a step and serves all layers."""
    import flashinfer

    q, k_cache, v_cache, tables, lengths, cu = case.args
    size = case.shape.block_size
    needed = [-(-context // size) for context in case.shape.contexts]
    indptr = torch.tensor([0, *needed], dtype=torch.int32, device=q.device).cumsum(0, dtype=torch.int32)
    indices = torch.cat([row[:count] for row, count in zip(tables, needed, strict=True)])
    pages = (indptr, indices, (lengths - 1) % size + 1, *case.shape.heads, case.shape.dim, size)
    types = dict(q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=case.more["scale"])
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    if case.shape.new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*pages, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(cu, *pages, causal=True, **types)
    return partial(wrapper.run, q, (k_cache, v_cache))


def with_flash_attn_3(case: Problem) -> Callable[[], Tensor]:
    """The package of the Hopper kernels."""
    from flash_attn_interface import flash_attn_with_kvcache

    q, k_cache, v_cache, tables, lengths, cu = case.args
    more = {"cu_seqlens_q": cu, "max_seqlen_q": case.shape.new, "softmax_scale": case.more["scale"], "causal": True}
    return partial(flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=lengths, page_table=tables, **more)


RUNS: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "torch": with_torch,
    "torch.compile": with_torch_compile,
    "reference": lambda case: partial(paged_attention_ref, *case.args, **case.more),
    "ours": ours,  # on a CPU in C++
    "flash-attn": lambda case: partial(flash_paged_attention, *case.args, **case.more),
    "flash-attn 3": with_flash_attn_3,
    "flashinfer": with_flashinfer,
}
PEERS = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface", "flashinfer": "flashinfer"}


def names_for(shape: Shape) -> list[str]:
    """Each where it can: flash-attn wants large blocks, one long prompt is too much for those that store all scores,
    and on a CPU compiling takes longer than all the rest."""
    names = contenders("torch", *["torch.compile"] * (GPU or shape.name == "decode"), "reference", "ours", **PEERS)
    if shape.block_size % 256 != 0:
        names = [name for name in names if name != "flash-attn"]
    return names if shape.new < 8_192 else [name for name in names if name in ("ours", *PEERS)]


def group(shape: Shape) -> Group:
    case, names = problem(shape), names_for(shape)
    expected = paged_attention_ref(*case.args, **case.more) if "reference" in names else None

    def build(name: str) -> Callable[[], object]:
        run = torch.inference_mode()(RUNS[name](case))
        if expected is not None:
            torch.testing.assert_close(run(), expected, atol=2e-2, rtol=2e-2)
        return run

    return Group(
        title=shape.title, num_bytes=shape.num_bytes, flops=shape.flops, dtype=shape.dtype, names=names, build=build
    )


@pytest.mark.parametrize(
    ("shape", "contender"),
    [pytest.param(shape, name, id=f"{shape.name}-{name}") for shape in SHAPES for name in names_for(shape)],
)
def test_paged_attention(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: group(shape), absent(**PEERS))
