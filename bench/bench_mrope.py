"""M-RoPE of query and key heads, forward and backward: torch, torch.compile of it, Liger-Kernel, and ours.

    pytest bench/bench_mrope.py

Bytes counted: the heads read and written once, tables read once. The tables are made outside of what is timed, as a
model does once for all layers; Liger-Kernel gets its own layout of heads and tables, and turns its heads in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders
from selection import shapes
from torch import Tensor

from thyme.kernels.mrope import mrope, mrope_ref, mrope_tables

# tokens, query heads, key heads, D, sections, dtype
GPU_SHAPES = [(tokens, 28, 4, 128, (16, 24, 24), torch.bfloat16) for tokens in (64, 8_192)]
CPU_SHAPES = [(2_000, 8, 4, 64, (8, 12, 12), torch.float32)]
Shape = tuple[int, int, int, int, tuple[int, int, int], torch.dtype]
PEERS = {"liger": "liger_kernel"}
CONTENDERS = contenders("torch", "torch.compile", "reference", "ours", **PEERS)
OPS: dict[str, Any] = {"reference": mrope_ref, "ours": mrope}


def plain(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = heads.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(heads.dtype)


def call(
    name: str, heads: Tensor, positions: Tensor, sections: tuple[int, ...], queries: int
) -> tuple[list[Tensor], Callable[..., Any]]:
    """The tensors to differentiate, and the function of them."""
    half = heads.shape[2] // 2
    frequencies = 1e6 ** -(torch.arange(half, device=heads.device) / half)
    if name != "liger":
        tables = mrope_tables(positions, frequencies, sections)
        run = compiled(plain) if name == "torch.compile" else OPS.get(name, plain)
        return [heads], lambda x: run(x, *tables)
    from liger_kernel.ops.qwen2vl_mrope import LigerQwen2VLMRopeFunction

    angles = positions[:, None, :, None].float() * torch.cat((frequencies, frequencies))
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    q, k = (part.transpose(0, 1)[None].contiguous() for part in heads.split((queries, heads.shape[1] - queries), 1))
    return [q, k], lambda q, k: LigerQwen2VLMRopeFunction.apply(q, k, cos[:, None], sin[:, None], list(sections))


def title(shape: Shape, training: bool) -> str:
    tokens, queries, keys, dim, _, dtype = shape
    what = f"mrope{' forward + backward' * training}: {tokens} tokens, {queries}/{keys} heads of {dim}"
    return f"{what} {str(dtype)[6:]}"


def group(shape: Shape, training: bool) -> Group:
    tokens, queries, keys, dim, sections, dtype = shape
    heads = torch.randn(tokens, queries + keys, dim, device=DEVICE).to(dtype)
    positions = torch.randint(0, 4_096, (3, tokens), device=DEVICE)

    def step(inputs: list[Tensor], turn: Callable[..., Any]) -> None:
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        out = turn(*tensors)
        torch.autograd.backward(out, inputs if isinstance(out, tuple) else inputs[0])

    @torch.no_grad()
    def forward(inputs: list[Tensor], turn: Callable[..., Any]) -> None:
        turn(*inputs)

    run = step if training else forward
    return Group(
        title=title(shape, training),
        num_bytes=(1 + training) * (2 * heads.nbytes + tokens * dim * 4),
        dtype=dtype,
        names=CONTENDERS,
        build=lambda name: partial(run, *call(name, heads, positions, sections, queries)),
        training=training,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", shapes(GPU_SHAPES if GPU else CPU_SHAPES), ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward + backward"])
def test_mrope(compare: Callable[..., None], shape: Shape, training: bool, contender: str) -> None:
    compare(contender, lambda: group(shape, training), absent(**PEERS))
