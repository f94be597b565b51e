"""SwiGLU over a fused projection, forward and backward: torch, torch.compile of it, Liger-Kernel, and ours.

    pytest bench/bench_swiglu.py

Bytes counted: forward 3 I numbers a row, backward 5 I. Liger-Kernel, where installed, takes the two halves as copies,
made outside of what is timed.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from thyme.kernels.swiglu import swiglu, swiglu_ref

SHAPES = [(2_000, 1_536, torch.float32)]
if torch.cuda.is_available():
    SHAPES = [(rows, 18_944, torch.bfloat16) for rows in (64, 8_192)]


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rivals() -> dict[str, Callable[..., Tensor]]:
    runs = {"torch": plain, "torch.compile": plain, "ours": swiglu}
    if torch.cuda.is_available():
        runs["reference"] = swiglu_ref
        if find_spec("liger_kernel"):
            function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
            runs["liger"] = function.apply
    return runs


RIVALS = rivals()


def runner(rival: str) -> Callable[..., Tensor]:
    return torch.compile(RIVALS[rival]) if rival == "torch.compile" else RIVALS[rival]


def inputs_of(rival: str, gate_up: Tensor) -> list[Tensor]:
    return [half.contiguous() for half in gate_up.chunk(2, -1)] if rival == "liger" else [gate_up]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES, ids=str)
def test_swiglu(
    measure: Callable[..., None], device: torch.device, rows: int, width: int, dtype: torch.dtype, rival: str
) -> None:
    gate_up = torch.randn(rows, 2 * width, device=device).to(dtype)
    inputs, run = inputs_of(rival, gate_up), runner(rival)
    num_bytes = gate_up.nbytes // 2 * 3
    with torch.no_grad():
        measure(lambda: run(*inputs), num_bytes, f"swiglu: {rows} x {width} {str(dtype)[6:]}")


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES, ids=str)
def test_swiglu_backward(
    measure: Callable[..., None], device: torch.device, rows: int, width: int, dtype: torch.dtype, rival: str
) -> None:
    gate_up = torch.randn(rows, 2 * width, device=device).to(dtype)
    upstream = torch.randn(rows, width, device=device).to(dtype)

    run = runner(rival)

    def step() -> None:  # with the forward pass: some peers write the gradient over what it kept
        inputs = [tensor.detach().requires_grad_() for tensor in inputs_of(rival, gate_up)]
        torch.autograd.grad(run(*inputs), inputs, upstream)

    measure(step, gate_up.nbytes // 2 * 8, f"swiglu forward + backward: {rows} x {width} {str(dtype)[6:]}")
