"""What is compiled of kernels/attention_decode.py: Qwen2.5-VL's heads, alone and after a shared prefix.

Rare: float32, and heads for which the tiles are smaller. Registers and shared memory leave room for three programs on
an SM (two where bits must not depend on the batch), each with a tile of keys and values, 32 KB, on its way.
"""

from collections.abc import Iterator
from typing import Any

from attention_forms import ALIGNED, COPIES, FP8, MMA, OP, STRIDES, WGMMA, caches, heads, shape, tiled

from thyme.kernels import attention_tiles


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, block_size, shared, invariant, is_fp8 in (
        ("bf16", 2, 7, 128, 16, False, False, False),
        ("bf16", 2, 7, 128, 16, True, False, False),
        ("bf16", 2, 7, 128, 16, False, True, False),
        ("bf16", 2, 7, 128, 16, False, False, True),
        ("bf16", 2, 7, 128, 16, True, False, True),
        ("bf16", 2, 7, 128, 16, False, True, True),
        ("fp32", 4, 7, 128, 16, False, False, False),
        ("fp32", 4, 7, 128, 16, True, False, False),
        ("fp32", 4, 7, 128, 16, False, True, False),
        ("bf16", 2, 7, 128, 16, True, True, False),
        ("fp32", 4, 7, 128, 16, True, True, False),
        ("fp16", 2, 8, 64, 256, False, False, False),
        ("bf16", 2, 2, 256, 16, True, False, False),
        ("bf16", 2, 2, 256, 16, False, True, False),
    ):
        deep = itemsize == 2 and dim <= 128
        yield {
            "op": "paged_invariant" if invariant else OP,
            "kernel": "_decode_kernel",
            "what": f"{heads(dtype, group, dim, block_size)}{', shared prefix' * shared}"
            f"{FP8 * is_fp8}{', for any batch' * invariant}",
            "types": f"{caches(dtype, is_fp8)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} partial_ptr:*fp32 "
            f"stats_ptr:*fp32 scale_log2e:fp32 at_least:i32 {STRIDES}{' shared_ptr:*i32' * shared}",
            "constants": shape(group, dim, block_size, is_fp8)
            | {"FINEST": attention_tiles.FINEST, "SPLIT": attention_tiles.SPLIT, "HAS_SHARED": shared}
            | ({} if shared else {"shared_ptr": None}),
            **tiled("decode", group, dim, itemsize, invariant, is_fp8),
            "aligned": ALIGNED,
            "instructions": (WGMMA if invariant else MMA) if deep else COPIES,
            "spot": dtype == "bf16" and dim == 128 and not shared and not is_fp8,
            "rare": dtype != "bf16" or dim == 256 or (shared and invariant),
        }
