"""What is compiled of kernels/swiglu.py: the MLP of Qwen2.5-VL-7B, its halves side by side."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from thyme.kernels import swiglu

WIDTH = 18_944
ROWS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    forward = ("_forward_kernel", "gate up out", "gate_stride up_stride")
    backward = ("_backward_kernel", "gate up grad grad_gate grad_up")
    backward += ("gate_stride up_stride grad_gate_stride grad_up_stride",)
    tile = swiglu._launch_config(WIDTH)
    for dtype, (kernel, pointers, strides) in product(("bf16", "fp32"), (forward, backward)):
        types = [*(f"{name}_ptr:*{dtype}" for name in pointers.split()), *(f"{name}:i32" for name in strides.split())]
        yield {
            "kernel": kernel,
            "what": f"{dtype}, {WIDTH}",
            "types": " ".join(types),
            "constants": {"WIDTH": WIDTH},
            "options": tile,
            "elements": tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{ROWS} x {WIDTH}",
                "elements": ROWS * WIDTH,
                "num_bytes": len(pointers.split()) * ROWS * WIDTH * (2 if dtype == "bf16" else 4),
            },
            "aligned": strides,
            "instructions": (r"ex2\.approx", WIDE_LOAD, WIDE_STORE),
            "spot": kernel == "_forward_kernel" and dtype == "bf16",
            "rare": dtype == "fp32",
        }
