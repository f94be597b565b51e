"""What is compiled of kernels/attention_prefill.py: Qwen2.5-VL's heads, with one sum and with one a split.

Rare: float32, and heads for which the tiles are smaller.
"""

from collections.abc import Iterator
from typing import Any

from attention_forms import ALIGNED, FP8, OP, STRIDES, WGMMA, caches, heads, shape, tiled

from thyme.kernels import attention_tiles


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, invariant, is_fp8 in (
        ("bf16", 2, 7, 128, False, False),
        ("bf16", 2, 7, 128, True, False),
        ("bf16", 2, 7, 128, False, True),
        ("bf16", 2, 7, 128, True, True),
        ("fp32", 4, 7, 128, False, False),
        ("fp32", 4, 7, 128, True, False),
        ("bf16", 2, 2, 256, False, False),
        ("bf16", 2, 2, 256, True, False),
    ):
        yield {
            "op": "paged_invariant" if invariant else OP,
            "kernel": "_prefill_kernel",
            "what": f"{heads(dtype, group, dim, 16)}{FP8 * is_fp8}{', for any batch' * invariant}",
            "types": f"{caches(dtype, is_fp8)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} scale_log2e:fp32 "
            f"num_seqs:i32 {STRIDES}",
            "constants": shape(group, dim, 16, is_fp8) | {"SPLIT": attention_tiles.SPLIT if invariant else 0},
            **tiled("prefill", group, dim, itemsize, invariant, is_fp8),
            "aligned": ALIGNED,
            "instructions": WGMMA if dtype == "bf16" and dim == 128 else (r"cp\.async\.cg",),
            "rare": dim == 256 or dtype == "fp32",
        }
