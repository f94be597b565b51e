"""What is compiled of kernels/swiglu.py: the MLP of Qwen2.5-VL-7B and that of its vision tower, halves side by side.

The tower's are 3,420 numbers wide, so that the second half of a row of 16-bit numbers begins between two 16-byte lines:
8 bytes are loaded at once.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from thyme.kernels import swiglu

ROWS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    forward = ("_forward_kernel", "gate up out", "gate_stride up_stride")
    backward = ("_backward_kernel", "gate up grad grad_gate grad_up")
    backward += ("gate_stride up_stride grad_gate_stride grad_up_stride",)
    for width, dtype, (kernel, pointers, strides) in product((18_944, 3_420), ("bf16", "fp32"), (forward, backward)):
        tile, whole = swiglu._launch_config(width), width % 16 == 0
        types = [*(f"{name}_ptr:*{dtype}" for name in pointers.split()), *(f"{name}:i32" for name in strides.split())]
        yield {
            "kernel": kernel,
            "what": f"{dtype}, {width}",
            "types": " ".join(types),
            "constants": {"WIDTH": width, "ALIGN": 16 if whole or dtype == "fp32" else 8},
            "options": tile,
            "elements": tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{ROWS} x {width}",
                "elements": ROWS * width,
                "num_bytes": len(pointers.split()) * ROWS * width * (2 if dtype == "bf16" else 4),
            },
            "aligned": strides if whole else "",
            "unaligned": "" if whole or dtype == "fp32" else "up_ptr grad_up_ptr",
            "instructions": (r"ex2\.approx", WIDE_LOAD, WIDE_STORE),
            "spot": whole and kernel == "_forward_kernel" and dtype == "bf16",
            "rare": dtype == "fp32",
        }
