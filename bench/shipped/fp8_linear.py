"""What is compiled of kernels/fp8_linear.py: a projection of Qwen2.5-VL-7B's decoder, decoding and prefilling.

Rare: fewer tokens, no bias where most have one, float32.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from thyme.kernels import fp8_linear

INPUTS, OUTPUTS, SPLITS = 3_584, 4_608, 4
COPY = r"cp\.async"


def configurations() -> Iterator[dict[str, Any]]:
    forms = [("bf16", *form) for form in product((64, 8_192, 16, 32), ("split", "bias", "plain"))]
    for dtype, tokens, form in (*forms, ("fp32", 64, "bias")):
        itemsize = 2 if dtype == "bf16" else 4
        tile = fp8_linear.launch_config(tokens, itemsize)
        is_split, has_bias = form == "split", form == "bias"
        usual = dtype == "bf16" and (tokens == 64 or (tokens > 64 and has_bias)) and form != "plain"
        said = {"split": f"{SPLITS} splits", "bias": "bias", "plain": "no bias"}[form]
        yield {
            "kernel": "_linear_kernel",
            "what": f"{dtype}, {tokens} tokens, {said}",
            "types": f"x_ptr:*{dtype} codes_ptr:*fp8e4nv scales_ptr:*fp32 {f'bias_ptr:*{dtype} ' * has_bias}"
            f"out_ptr:*{'fp32' if is_split else dtype} num_tokens:i32 x_stride:i32 num_inputs:i32 num_outputs:i32 "
            "split_size:i32",
            "constants": {"WHOLE_BLOCKS": True} | ({} if has_bias else {"bias_ptr": None}),
            "options": tile,
            "elements": tile["ROWS"] * tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{tokens} tokens x {INPUTS} x {OUTPUTS}",
                "elements": INPUTS * OUTPUTS * -(-tokens // tile["TOKENS"]),
                "num_bytes": INPUTS * OUTPUTS + itemsize * tokens * (INPUTS + OUTPUTS),
            },
            "aligned": "x_stride num_inputs num_outputs split_size",
            "instructions": (COPY, r"wgmma\.mma_async") if dtype == "bf16" else (COPY,),
            "spot": usual and (is_split or tokens > 64),
            "since": 89,
            "rare": not usual,
        }
    for has_bias in (True, False):
        yield {
            "kernel": "_sum_kernel",
            "what": f"bf16, {'bias' if has_bias else 'no bias'}",
            "types": f"partial_ptr:*fp32 {'bias_ptr:*bf16 ' * has_bias}out_ptr:*bf16 num_tokens:i32 num_outputs:i32 "
            "num_splits:i32",
            "constants": {} if has_bias else {"bias_ptr": None},
            "options": {"ROWS": 1024, "num_warps": 4},
            "elements": 8 * SPLITS,
            "aligned": "num_outputs",
            "work": {
                "shape": f"64 x {OUTPUTS}",
                "elements": 64 * OUTPUTS * SPLITS,
                "num_bytes": 64 * OUTPUTS * (4 * SPLITS + 2),
            },
            "instructions": (r"ld\.global\S*\.v[24]",),
            "rare": not has_bias,
        }
