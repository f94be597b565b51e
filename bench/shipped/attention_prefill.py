"""What is compiled of kernels/attention_prefill.py: Qwen2.5-VL's heads, with one sum and with one a split.

Rare: float32, and heads for which the tiles are smaller.
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
        ("bf16", 2, 2, 256, True),
    ):
        yield {
            "op": "paged_invariant" if invariant else OP,
            "kernel": "_prefill_kernel",
            "what": f"{heads(dtype, group, dim, 16)}{', for any batch' * invariant}",
            "types": f"{CACHES.format(dtype)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} scale_log2e:fp32 "
            f"num_seqs:i32 {STRIDES}",
            "constants": shape(group, dim, 16) | {"SPLIT": attention_tiles.SPLIT if invariant else 0},
            **tiled("prefill", group, dim, itemsize, invariant),
            "aligned": ALIGNED,
            "instructions": WGMMA if dtype == "bf16" and dim == 128 else (r"cp\.async\.cg",),
            "rare": dim == 256 or dtype == "fp32",
        }
