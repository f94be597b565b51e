"""What is compiled of kernels/attention_merge.py: heads of 128."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import attention_merge, attention_tiles


def configurations() -> Iterator[dict[str, Any]]:
    for dtype in ("bf16", "fp32"):
        yield {
            "op": "paged_attention",
            "kernel": "_merge_kernel",
            "what": f"{dtype}, heads of 128",
            "types": f"context_ptr:*i32 cu_ptr:*i32 partial_ptr:*fp32 stats_ptr:*fp32 out_ptr:*{dtype} at_least:i32 "
            "num_splits:i32",
            "constants": {"DIM": 128, "FINEST": attention_tiles.FINEST, "SPLIT": attention_tiles.SPLIT},
            "options": {"DIM_PADDED": 128, "AT_ONCE": attention_merge.AT_ONCE, "num_warps": 1},
            "instructions": (r"ld\.global\S*\.v4",),
            "rare": dtype == "fp32",
        }
