"""RMSNorm with and without the residual addition, forward and backward: torch, torch.compile of it, peers, and ours.

    pytest bench/bench_rmsnorm.py

Bytes counted, forward: rows read and written once (the addition: two read, two written); backward: what is read and
written for the rows' gradient, the weight's not. Liger-Kernel and quack take part where they are installed.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref

EPS = 1e-6
SHAPES = [(2_000, 512, torch.float32)]
if torch.cuda.is_available():
    SHAPES = [(rows, 3_584, torch.bfloat16) for rows in (64, 8_192)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def plain_add(delta: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = delta + residual
    return plain(total, weight), total


def alone() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    runs = {
        "torch": plain,
        "torch.compile": plain,
        "ours": lambda x, weight: rmsnorm(x, weight, EPS),
    }
    if torch.cuda.is_available():
        runs["reference"] = lambda x, weight: rmsnorm_ref(x, weight, EPS)
        if find_spec("liger_kernel"):
            function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
            runs["liger"] = lambda x, weight: function.apply(x, weight, EPS, 0.0, "llama", False)
        if find_spec("quack"):
            peer = importlib.import_module("quack").rmsnorm
            runs["quack"] = lambda x, weight: peer(x, weight, eps=EPS)
    return runs


def added() -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    runs = {
        "torch": plain_add,
        "torch.compile": plain_add,
        "ours": lambda delta, residual, weight: add_rmsnorm(delta, residual, weight, EPS),
    }
    if torch.cuda.is_available():
        runs["reference"] = lambda delta, residual, weight: add_rmsnorm_ref(delta, residual, weight, EPS)
    return runs


ALONE, ADDED = alone(), added()


def runner(rivals: dict[str, Callable[..., Any]], rival: str) -> Callable[..., Any]:
    return torch.compile(rivals[rival]) if rival == "torch.compile" else rivals[rival]


@pytest.mark.parametrize("rival", ALONE)
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES, ids=str)
def test_rmsnorm(
    measure: Callable[..., None], device: torch.device, rows: int, width: int, dtype: torch.dtype, rival: str
) -> None:
    x, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    run = runner(ALONE, rival)
    with torch.no_grad():
        measure(lambda: run(x, weight), 2 * x.nbytes, f"rmsnorm: {rows} x {width} {str(dtype)[6:]}")


@pytest.mark.parametrize("rival", ADDED)
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES, ids=str)
def test_add_rmsnorm(
    measure: Callable[..., None], device: torch.device, rows: int, width: int, dtype: torch.dtype, rival: str
) -> None:
    delta, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    group = f"add_rmsnorm: {rows} x {width} {str(dtype)[6:]}"
    run = runner(ADDED, rival)
    with torch.no_grad():
        measure(lambda: run(delta, residual, weight), 4 * delta.nbytes, group)


@pytest.mark.parametrize("rival", ADDED)
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES, ids=str)
def test_add_rmsnorm_backward(
    measure: Callable[..., None], device: torch.device, rows: int, width: int, dtype: torch.dtype, rival: str
) -> None:
    delta, residual, *upstream = torch.randn(4, rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    inputs = [tensor.requires_grad_() for tensor in (delta, residual, weight)]
    outs = runner(ADDED, rival)(*inputs)
    group = f"add_rmsnorm backward: {rows} x {width} {str(dtype)[6:]}"
    measure(lambda: torch.autograd.grad(outs, inputs, upstream, retain_graph=True), 4 * delta.nbytes, group)
