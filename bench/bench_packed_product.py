"""A projection on a CPU with a weight that was packed once: F.linear, oneDNN's product, and ours.

    pytest bench/bench_packed_product.py

Bytes counted: the weight, x and y. A weight is larger than what a processor keeps, so that few rows wait for memory.
Packing is not timed.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import GPU, Group, contenders
from selection import shapes
from torch import Tensor

from thyme.kernels.packed_product import PackedProjection, has_products

# rows, inputs, outputs, dtype: gate and up of a model of 2 B parameters
CPU_SHAPES = [
    (rows, 1_536, 17_920, dtype) for dtype in (torch.float32, torch.bfloat16) for rows in (1, 8, 16, 32, 64, 1_024)
]
SHAPES = shapes(CPU_SHAPES)
Shape = tuple[int, int, int, torch.dtype]
NAMES = ("torch", "onednn", "ours")


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")


RUNS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "torch": lambda weight: lambda x: torch.nn.functional.linear(x, weight),
    "onednn": onednn,
    "ours": PackedProjection,
}


@torch.no_grad()
def _call(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x)


def product_group(shape: Shape) -> Group:
    rows, inputs, outputs, dtype = shape
    x, weight = (torch.randn(size, inputs).to(dtype) for size in (rows, outputs))
    return Group(
        title=f"packed_product: {rows} x {inputs} x {outputs} {str(dtype)[6:]}",
        num_bytes=x.nbytes + weight.nbytes + rows * outputs * dtype.itemsize,
        flops=2 * rows * inputs * outputs,
        dtype=dtype,
        names=contenders(*NAMES),
        build=lambda name: partial(_call, RUNS[name](weight), x),
    )


@pytest.mark.skipif(GPU, reason="a product of a CPU")
@pytest.mark.parametrize("contender", contenders(*NAMES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_product(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    if not has_products(shape[3]):
        pytest.skip(f"this processor has no products in {shape[3]}")
    compare(contender, lambda: product_group(shape), {})
