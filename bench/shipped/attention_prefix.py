"""What is compiled of kernels/attention_prefix.py: Qwen2.5-VL's heads.

Rare: float32, heads for which the tiles are smaller, and tiles as decode has them where bits must not depend on the
batch.
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
    ):
        yield {
            "op": OP,
            "kernel": "_prefix_kernel",
            "what": f"{heads(dtype, group, dim, 16)}{FP8 * is_fp8}{', for any batch' * invariant}",
            "types": f"{caches(dtype, is_fp8)} cu_ptr:*i32 groups_ptr:*i32 prefix_ptr:*i32 shared_ptr:*i32 "
            f"partial_ptr:*fp32 stats_ptr:*fp32 scale_log2e:fp32 num_groups:i32 {STRIDES}",
            "constants": shape(group, dim, 16, is_fp8) | {"SPLIT": attention_tiles.SPLIT},
            **tiled("prefix", group, dim, itemsize, invariant, is_fp8),
            "aligned": ALIGNED,
            "instructions": WGMMA if itemsize == 2 and dim == 128 else (r"cp\.async\.cg",),
            "rare": dim == 256 or dtype == "fp32" or invariant,
        }
