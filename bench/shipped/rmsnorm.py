"""What is compiled of kernels/rmsnorm.py: the rows of Qwen2.5-VL-7B and of its vision tower.

Rare: the heads of Qwen3, the widest row, float32.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from thyme.kernels import rmsnorm

ROWS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


SHAPES = (
    *((dtype, width, 1) for dtype in ("bf16", "fp32") for width in (3_584, 1_280)),
    ("bf16", 128, 28),
    ("fp32", rmsnorm._MAX_WIDTH, 1),
)


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, width, heads in SHAPES:
        tile = rmsnorm._launch_config(width)
        elements = tile["ROWS"] * tile["BLOCK"] // (32 * tile["num_warps"])
        common = {"options": tile, "elements": elements, "aligned": "stride head_stride"}
        constants = {"HEADS": heads, "WIDTH": width}
        numbers = ROWS * heads * width
        row_pass = {"shape": f"{ROWS * heads} x {width}", "elements": ROWS * heads * tile["BLOCK"]}
        itemsize = 2 if dtype == "bf16" else 4
        what = f"{dtype}, {f'{heads} heads of ' * (heads > 1)}{width}"
        for adds, keeps in product((False, True), (False, True)):
            types = (
                f"x_ptr:*{dtype} weight_ptr:*{dtype} out_ptr:*{dtype} stride:i32 head_stride:i32 num_rows:i32 eps:fp32"
            )
            types += f" residual_ptr:*{dtype} total_ptr:*{dtype}" * adds + " rstd_ptr:*fp32" * keeps
            absent = ("residual_ptr", "total_ptr") * (not adds) + ("rstd_ptr",) * (not keeps)
            yield {
                "op": "add_rmsnorm" if adds else "rmsnorm",
                "kernel": "_forward_kernel",
                "what": f"{what}, for {'training' if keeps else 'rollout'}",
                "types": types,
                "constants": constants | dict.fromkeys(absent),
                "instructions": (r"rsqrt\.approx", WIDE_LOAD, WIDE_STORE),
                "work": row_pass | {"num_bytes": (2 + 2 * adds) * numbers * itemsize},
                "spot": keeps and (dtype, width) == ("bf16", 3584),
                "rare": dtype == "fp32" or heads > 1,
                **common,
            }
        for adds in (False, True):
            yield {
                "op": "add_rmsnorm" if adds else "rmsnorm",
                "kernel": "_backward_kernel",
                "what": what,
                "types": f"x_ptr:*{dtype} rstd_ptr:*fp32 weight_ptr:*{dtype} grad_ptr:*{dtype} grad_x_ptr:*{dtype} "
                f"partial_ptr:*fp32 stride:i32 head_stride:i32 num_rows:i32" + f" grad_total_ptr:*{dtype}" * adds,
                "constants": constants | ({} if adds else {"grad_total_ptr": None}),
                "instructions": (WIDE_LOAD, WIDE_STORE),
                "work": row_pass | {"num_bytes": (3 + adds) * numbers * itemsize},
                "rare": dtype == "fp32" or heads > 1,
                **common,
            }
