"""SwiGLU over a fused projection, forward and backward: torch, torch.compile of it, Liger-Kernel, FlashInfer, and ours.

    pytest bench/bench_swiglu.py

Bytes counted: forward 3 I numbers a row, backward 5 I. Liger-Kernel takes the two halves as copies, made outside of
what is timed; FlashInfer has no backward.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders
from selection import shapes
from torch import Tensor

from thyme.kernels.swiglu import swiglu, swiglu_ref

GPU_SHAPES = [(rows, 18_944, torch.bfloat16) for rows in (64, 8_192)]
CPU_SHAPES = [(2_000, 1_536, torch.float32)]
SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES)
Shape = tuple[int, int, torch.dtype]


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def liger() -> Callable[..., Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def flashinfer() -> Callable[..., Tensor]:
    from flashinfer.activation import silu_and_mul

    return silu_and_mul


RUNS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "torch": lambda: plain,
    "torch.compile": lambda: compiled(plain),
    "reference": lambda: swiglu_ref,
    "ours": lambda: swiglu,
    "liger": liger,
    "flashinfer": flashinfer,
}
OURS = ("torch", "torch.compile", "reference", "ours")
DIFFERENTIABLE = {"liger": "liger_kernel"}
PEERS = DIFFERENTIABLE | {"flashinfer": "flashinfer"}


def title(what: str, shape: Shape) -> str:
    rows, width, dtype = shape
    return f"swiglu{what}: {rows} x {width} {str(dtype)[6:]}"


def inputs_of(name: str, gate_up: Tensor) -> list[Tensor]:
    return [half.contiguous() for half in gate_up.chunk(2, -1)] if name == "liger" else [gate_up]


def forward_group(shape: Shape) -> Group:
    rows, width, dtype = shape
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)

    @torch.no_grad()
    def call(run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        run(*inputs)

    return Group(
        title=title("", shape),
        num_bytes=gate_up.nbytes // 2 * 3,
        dtype=dtype,
        names=contenders(*OURS, **PEERS),
        build=lambda name: partial(call, RUNS[name](), inputs_of(name, gate_up)),
    )


def training_group(shape: Shape) -> Group:
    """With the forward pass: some peers write the gradient over what it kept."""
    rows, width, dtype = shape
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)
    upstream = torch.randn(rows, width, device=DEVICE).to(dtype)

    def step(run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.autograd.grad(run(*leaves), leaves, upstream)

    return Group(
        title=title(" forward + backward", shape),
        num_bytes=gate_up.nbytes // 2 * 8,
        dtype=dtype,
        names=contenders(*OURS, **DIFFERENTIABLE),
        build=lambda name: partial(step, RUNS[name](), inputs_of(name, gate_up)),
        training=True,
    )


@pytest.mark.parametrize("contender", contenders(*OURS, **PEERS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: forward_group(shape), absent(**PEERS))


@pytest.mark.parametrize("contender", contenders(*OURS, **DIFFERENTIABLE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_backward(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: training_group(shape), absent(**DIFFERENTIABLE))
