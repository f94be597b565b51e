"""What is compiled of kernels/mrope.py: the heads of Qwen2.5-VL-7B there and back, and those of its vision tower."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import mrope

TOKENS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    for what, dtype, heads, half, sign in (
        ("28 + 4 heads of 128", "bf16", 32, 64, 1),
        ("28 + 4 heads of 128, backward", "bf16", 32, 64, -1),
        ("16 + 16 heads of 80", "bf16", 32, 40, 1),
        ("16 + 16 heads of 80, backward", "bf16", 32, 40, -1),
        ("28 + 4 heads of 128", "fp32", 32, 64, 1),
        ("28 + 4 heads of 128, backward", "fp32", 32, 64, -1),
        ("16 + 16 heads of 80", "fp32", 32, 40, 1),
        ("16 + 16 heads of 80, backward", "fp32", 32, 40, -1),
    ):
        tile = mrope.launch_config(heads, half)
        yield {
            "kernel": "_turn_kernel",
            "what": f"{dtype}, {what}",
            "types": f"heads_ptr:*{dtype} cos_ptr:*fp32 sin_ptr:*fp32 out_ptr:*{dtype} stride:i32 head_stride:i32",
            "constants": {"SIGN": sign, "NUM_HEADS": heads, "HALF": half},
            "options": tile,
            "elements": 2 * tile["HEADS"] * tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{TOKENS} tokens",
                "elements": TOKENS * heads * 2 * half,
                "num_bytes": TOKENS * (2 * heads * 2 * half * (2 if dtype == "bf16" else 4) + 8 * half),
            },
            "aligned": "stride head_stride",
            "instructions": (WIDE_LOAD, WIDE_STORE),
            "spot": dtype == "bf16" and half == 64 and sign == 1,
            "rare": dtype == "fp32",
        }
