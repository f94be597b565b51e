"""What is compiled of kernels/rmsnorm.py: the rows of Qwen2.5-VL-7B, the heads of Qwen3, the widest row."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import rmsnorm

WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    for what, width, heads, absent in (
        ("add, bf16, 3584, for training", 3584, 1, ()),
        ("bf16, 3584, for rollout", 3584, 1, ("residual_ptr:*bf16", "total_ptr:*bf16", "rstd_ptr:*fp32")),
        ("bf16, 28 heads of 128", 128, 28, ("residual_ptr:*bf16", "total_ptr:*bf16", "rstd_ptr:*fp32")),
    ):
        types = "x_ptr:*bf16 residual_ptr:*bf16 weight_ptr:*bf16 out_ptr:*bf16 total_ptr:*bf16 rstd_ptr:*fp32 "
        types += "stride:i64 head_stride:i64 num_rows:i32 eps:fp32"
        yield {
            "kernel": "_forward_kernel",
            "what": what,
            "types": " ".join(pair for pair in types.split() if pair not in absent),
            "constants": {"HEADS": heads, "WIDTH": width} | {pair.split(":")[0]: None for pair in absent},
            "options": rmsnorm._launch_config(width),
            "aligned": "stride head_stride",
            "instructions": (r"rsqrt\.approx", WIDE_LOAD, WIDE_STORE),
            "spot": not absent,
        }
    for dtype, width in (("bf16", 3584), ("fp32", rmsnorm._MAX_WIDTH)):
        yield {
            "kernel": "_backward_kernel",
            "what": f"add, {dtype}, {width}",
            "types": f"x_ptr:*{dtype} rstd_ptr:*fp32 weight_ptr:*{dtype} grad_ptr:*{dtype} grad_total_ptr:*{dtype} "
            f"grad_x_ptr:*{dtype} partial_ptr:*fp32 stride:i64 head_stride:i64 num_rows:i32 rows_a_program:i32",
            "constants": {"HEADS": 1, "WIDTH": width},
            "options": rmsnorm._launch_config(width),
            "aligned": "stride head_stride",
            "instructions": (WIDE_LOAD, WIDE_STORE),
        }
