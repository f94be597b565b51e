"""A projection with its weight in fp8, against the same in bfloat16 or float32, torch's scaled product, and vLLM's.

    pytest bench/bench_fp8_linear.py

Bytes counted: the weight in 8 bits, its scales, x and y. torch.linear has the weight in x's dtype, twice or four times
as much, which is what the rest is measured against. torch.scaled is torch._scaled_mm on weight and activations of one
scale each, where the card has it: less exact, since activations are quantized too, outside of what is timed.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import DEVICE, GPU, Group, compiled, contenders
from selection import shapes
from torch import Tensor

from thyme.kernels.fp8 import FP8, dequantize_weight, quantize_weight
from thyme.kernels.fp8_linear import fp8_linear, fp8_linear_ref

# tokens, inputs, outputs, dtype: projections of the 7B, decoding and prefilling
GPU_SHAPES = [
    (tokens, inputs, outputs, torch.bfloat16)
    for tokens in (16, 64, 8_192)
    for inputs, outputs in ((3_584, 4_608), (3_584, 37_888), (18_944, 3_584))
]
CPU_SHAPES = [(16, 1_536, 2_048, torch.float32)]
SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES)
Shape = tuple[int, int, int, torch.dtype]


def plain(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """What torch makes of the definition, the weight widened in x's dtype."""
    return torch.nn.functional.linear(x, dequantize_weight(codes, scales, x.dtype))


def title(shape: Shape) -> str:
    tokens, inputs, outputs, dtype = shape
    return f"fp8_linear: {tokens} x {inputs} x {outputs} {str(dtype)[6:]}"


RUNS: dict[str, Callable[..., Tensor]] = {
    "torch": plain,
    "torch.compile": plain,
    "torch.linear": torch.nn.functional.linear,
    "torch.scaled": partial(torch._scaled_mm, use_fast_accum=True),
    "reference": fp8_linear_ref,
    "ours": fp8_linear,
}
if not GPU:
    del RUNS["torch.scaled"], RUNS["reference"]  # no such product | which ours is


@torch.no_grad()
def _call(run: Callable[..., Tensor], *args: Tensor, **more: object) -> None:
    run(*args, **more)


def linear_group(shape: Shape) -> Group:
    tokens, inputs, outputs, dtype = shape
    x = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
    codes, scales = quantize_weight(torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5)

    def build(name: str) -> Callable[[], None]:
        run = compiled(RUNS[name]) if name == "torch.compile" else RUNS[name]
        if name == "torch.linear":
            return partial(_call, run, x, dequantize_weight(codes, scales, dtype))
        if name == "torch.scaled":
            one = torch.ones((), device=DEVICE)
            return partial(_call, run, x.to(FP8), codes.t(), scale_a=one, scale_b=one, out_dtype=dtype)
        return partial(_call, run, x, codes, scales)

    return Group(
        title=title(shape),
        num_bytes=codes.nbytes + scales.nbytes + x.nbytes + tokens * outputs * x.itemsize,
        flops=2 * tokens * inputs * outputs,
        dtype=dtype,
        names=contenders(*RUNS),
        build=build,
    )


@pytest.mark.parametrize("contender", contenders(*RUNS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_linear(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: linear_group(shape), {})
