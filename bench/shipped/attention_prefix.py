"""What is compiled of kernels/attention_prefix.py: Qwen2.5-VL's heads.

Rare: float32, heads for which the tiles are smaller, and tiles as decode has them where bits must not depend on the
batch.
"""

from collections.abc import Iterator
from typing import Any

from attention_forms import ALIGNED, CACHES, OP, STRIDES, WGMMA, heads, shape, tiled

from thyme.kernels import attention_tiles


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, invariant in (
        ("bf16", 2, 7, 128, False),
        ("bf16", 2, 7, 128, True),
        ("fp32", 4, 7, 128, False),
        ("fp32", 4, 7, 128, True),
        ("bf16", 2, 2, 256, False),
    ):
        yield {
            "op": OP,
            "kernel": "_prefix_kernel",
            "what": f"{heads(dtype, group, dim, 16)}{', for any batch' * invariant}",
            "types": f"{CACHES.format(dtype)} cu_ptr:*i32 groups_ptr:*i32 prefix_ptr:*i32 shared_ptr:*i32 "
            f"partial_ptr:*fp32 stats_ptr:*fp32 scale_log2e:fp32 num_groups:i32 {STRIDES}",
            "constants": shape(group, dim, 16) | {"SPLIT": attention_tiles.SPLIT},
            **tiled("prefix", group, dim, itemsize, invariant),
            "aligned": ALIGNED,
            "instructions": WGMMA if itemsize == 2 and dim == 128 else (r"cp\.async\.cg",),
            "rare": dim == 256 or dtype == "fp32" or invariant,
        }
