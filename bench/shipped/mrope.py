"""What is compiled of kernels/mrope.py: the heads of Qwen2.5-VL-7B there and back, and those of its vision tower."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import mrope

WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    for what, heads, half, sign in (
        ("bf16, 28 + 4 heads of 128", 32, 64, 1),
        ("bf16, 28 + 4 heads of 128, backward", 32, 64, -1),
        ("bf16, 16 + 16 heads of 80", 32, 40, 1),
    ):
        yield {
            "kernel": "_turn_kernel",
            "what": what,
            "types": "heads_ptr:*bf16 cos_ptr:*fp32 sin_ptr:*fp32 out_ptr:*bf16 stride:i64 head_stride:i64",
            "constants": {"SIGN": sign, "NUM_HEADS": heads, "HALF": half},
            "options": mrope.launch_config(heads, half),
            "aligned": "stride head_stride",
            "instructions": (WIDE_LOAD, WIDE_STORE),
            "spot": half == 64 and sign == 1,
        }
