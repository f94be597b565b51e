"""What is compiled of kernels/kv_cache.py."""

from collections.abc import Iterator
from typing import Any


def configurations() -> Iterator[dict[str, Any]]:
    yield {
        "kernel": "_write_kernel",
        "what": "bf16, 4 heads of 128",
        "types": "k_ptr:*bf16 v_ptr:*bf16 k_cache_ptr:*bf16 v_cache_ptr:*bf16 slot_ptr:*i64 k_stride:i64 v_stride:i64",
        "constants": {"WIDTH": 512, "BLOCK": 512},
        "options": {"num_warps": 4},
        "aligned": "k_stride v_stride",
        "instructions": (r"ld\.global\S*\.v[24]",),
        "spot": True,
    }
