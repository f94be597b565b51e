"""RMSNorm with and without the residual addition, forward and backward: torch, torch.compile of it, peers, and ours.

    pytest bench/bench_rmsnorm.py

Bytes counted, forward: rows read and written once (the addition: two read, two written); backward: what is read and
written for the rows' gradient, the weight's not. FlashInfer and quack have no backward; FlashInfer adds in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders
from selection import shapes
from torch import Tensor

from thyme.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref

EPS = 1e-6
GPU_SHAPES = [(rows, 3_584, torch.bfloat16) for rows in (64, 8_192)]
CPU_SHAPES = [(2_000, 512, torch.float32)]
SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES)
Shape = tuple[int, int, torch.dtype]
Run = Callable[..., Any]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def plain_add(delta: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = delta + residual
    return plain(total, weight), total


def liger() -> Run:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def liger_add() -> Run:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda delta, residual, weight: LigerFusedAddRMSNormFunction.apply(
        delta, residual, weight, EPS, 0.0, "llama", False
    )


def quack() -> Run:
    from quack import rmsnorm as peer

    return lambda x, weight: peer(x, weight, eps=EPS)


def flashinfer() -> Run:
    from flashinfer.norm import rmsnorm as peer

    return lambda x, weight: peer(x, weight, EPS)


def flashinfer_add() -> Run:
    from flashinfer.norm import fused_add_rmsnorm

    return lambda delta, residual, weight: fused_add_rmsnorm(delta, residual, weight, EPS)


ALONE: dict[str, Callable[[], Run]] = {
    "torch": lambda: plain,
    "torch.compile": lambda: compiled(plain),
    "reference": lambda: lambda x, weight: rmsnorm_ref(x, weight, EPS),
    "ours": lambda: lambda x, weight: rmsnorm(x, weight, EPS),
    "liger": liger,
    "quack": quack,
    "flashinfer": flashinfer,
}
ADDED: dict[str, Callable[[], Run]] = {
    "torch": lambda: plain_add,
    "torch.compile": lambda: compiled(plain_add),
    "reference": lambda: lambda *tensors: add_rmsnorm_ref(*tensors, EPS),
    "ours": lambda: lambda *tensors: add_rmsnorm(*tensors, EPS),
    "liger": liger_add,
    "flashinfer": flashinfer_add,
}
OURS = ("torch", "torch.compile", "reference", "ours")
DIFFERENTIABLE = {"liger": "liger_kernel"}
ADDING = DIFFERENTIABLE | {"flashinfer": "flashinfer"}
PEERS = ADDING | {"quack": "quack"}


def title(op: str, shape: Shape) -> str:
    rows, width, dtype = shape
    return f"{op}: {rows} x {width} {str(dtype)[6:]}"


def random(shape: Shape, count: int) -> list[Tensor]:
    rows, width, dtype = shape
    return [*torch.randn(count, rows, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(dtype)]


@torch.no_grad()
def _call(run: Run, *tensors: Tensor) -> None:
    run(*tensors)


def forward_group(op: str, runs: dict[str, Callable[[], Run]], names: list[str], shape: Shape, count: int) -> Group:
    *rows, weight = random(shape, count)
    return Group(
        title=title(op, shape),
        num_bytes=2 * sum(x.nbytes for x in rows),
        dtype=shape[2],
        names=names,
        # Each its own rows: a peer may add in place.
        build=lambda name: partial(_call, runs[name](), *(x.clone() for x in rows), weight),
    )


def backward_group(shape: Shape, names: list[str]) -> Group:
    delta, residual, *upstream, weight = random(shape, 4)
    inputs = [tensor.requires_grad_() for tensor in (delta, residual, weight)]

    def backward(outs: Any) -> None:
        torch.autograd.grad(outs, inputs, upstream, retain_graph=True)

    return Group(
        title=title("add_rmsnorm backward", shape),
        num_bytes=4 * delta.nbytes,
        dtype=shape[2],
        names=names,
        build=lambda name: partial(backward, ADDED[name]()(*inputs)),
        training=True,
    )


@pytest.mark.parametrize("contender", contenders(*OURS, **PEERS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    names = contenders(*OURS, **PEERS)
    compare(contender, lambda: forward_group("rmsnorm", ALONE, names, shape, 1), absent(**PEERS))


@pytest.mark.parametrize("contender", contenders(*OURS, **ADDING))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rmsnorm(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    names = contenders(*OURS, **ADDING)
    compare(contender, lambda: forward_group("add_rmsnorm", ADDED, names, shape, 2), absent(**ADDING))


@pytest.mark.parametrize("contender", contenders(*OURS, **DIFFERENTIABLE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rmsnorm_backward(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    names = contenders(*OURS, **DIFFERENTIABLE)
    compare(contender, lambda: backward_group(shape, names), absent(**DIFFERENTIABLE))
