"""What is compiled of kernels/fp8_linear.py: a projection of Qwen2.5-VL-7B's decoder, decoding and prefilling."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import fp8_linear

INPUTS, OUTPUTS, SPLITS = 3_584, 4_608, 4
COPY = r"cp\.async"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, tokens, splits in (("bf16", 64, SPLITS), ("bf16", 64, 1), ("bf16", 8_192, 1), ("fp32", 64, 1)):
        itemsize = 2 if dtype == "bf16" else 4
        tile = fp8_linear.launch_config(tokens, itemsize)
        whole = splits == 1
        constants = {"INPUTS": INPUTS, "OUTPUTS": OUTPUTS, "SPLIT": INPUTS // splits}
        yield {
            "kernel": "_linear_kernel",
            "what": f"{dtype}, {tokens} tokens, {splits} splits",
            "types": f"x_ptr:*{dtype} codes_ptr:*fp8e4nv scales_ptr:*fp32 {f'bias_ptr:*{dtype} ' * whole}"
            f"out_ptr:*{dtype if whole else 'fp32'} num_tokens:i32 x_stride:i32",
            "constants": constants | ({} if whole else {"bias_ptr": None}),
            "options": tile,
            "elements": tile["ROWS"] * tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{tokens} tokens x {INPUTS} x {OUTPUTS}",
                "elements": INPUTS * OUTPUTS * -(-tokens // tile["TOKENS"]),
                "num_bytes": INPUTS * OUTPUTS + itemsize * tokens * (INPUTS + OUTPUTS),
            },
            "aligned": "x_stride",
            "instructions": (COPY, r"wgmma\.mma_async") if dtype == "bf16" else (COPY,),
            "spot": splits > 1 or tokens > 64,
            "since": 89,
            "rare": dtype == "fp32",
        }
    yield {
        "kernel": "_sum_kernel",
        "what": f"bf16, {SPLITS} splits, bias",
        "types": "partial_ptr:*fp32 bias_ptr:*bf16 out_ptr:*bf16 num_tokens:i32",
        "constants": {"OUTPUTS": OUTPUTS, "SPLITS": SPLITS},
        "options": {"ROWS": 1024, "num_warps": 4},
        "elements": 8,
        "work": {
            "shape": f"64 x {OUTPUTS}",
            "elements": 64 * OUTPUTS,
            "num_bytes": 64 * OUTPUTS * (4 * SPLITS + 2),
        },
        "instructions": (r"ld\.global\S*\.v[24]",),
    }
