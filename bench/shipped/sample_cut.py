"""What is compiled of kernels/sample_cut.py: Qwen2.5-VL's vocabulary in bfloat16.

Rare: float32, and a vocabulary so small that a program takes several rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton

from thyme.kernels import row_stats, sample_cut

VOCAB, SMALL_VOCAB = 151_665, 163  # the tokenizer's; the head has 152,064 rows, which only the stride shows
ROWS = 256  # sequences that are decoded together
SIZES = "num_rows:i32 vocab_size:i32 num_blocks:i32"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, vocab in (("bf16", VOCAB), ("fp32", VOCAB), ("bf16", SMALL_VOCAB)):
        tile = row_stats.row_tile(vocab)
        vector = 8 if dtype == "bf16" else 4
        threads = min(32, tile.block // vector)
        blocks = row_stats.padded_blocks(tile)
        rare = (dtype, vocab) != ("bf16", VOCAB)
        warps = sample_cut.warps_for(torch.float32 if dtype == "fp32" else torch.bfloat16)
        common = {"op": "sample", "rare": rare}
        yield {
            "kernel": "_candidates_kernel",
            "what": f"{dtype}, {vocab} ids",
            "types": f"logits_ptr:*{dtype} banned_ptr:*u8 ban_blocks_ptr:*u8 partial_ptr:*fp32 threshold_ptr:*fp32 "
            f"candidates_ptr:*{dtype} num_candidates_ptr:*i32 stride:i32 {SIZES}",
            "constants": {"ROWS": tile.rows, "BLOCK": tile.block} | {"LANES": 32 * warps},
            "options": {"num_warps": warps},
            "elements": tile.rows * tile.block // (32 * warps),
            "budget": 12 if vocab == VOCAB else 0,
            "excused": ("narrow",),  # what is scattered has a layout of its own: see the kernel
            "work": {
                "shape": f"{ROWS} x {vocab}",
                "elements": ROWS * vocab,
                "num_bytes": ROWS * vocab * (2 if dtype == "bf16" else 4),
            },
            "spot": not rare,
            **common,
        }
        if not rare:
            yield {
                "kernel": "_bounds_kernel",
                "what": f"{vocab} ids",
                "types": "temperature_ptr:*fp32 partial_ptr:*fp32 lanes_ptr:*fp32 limits_ptr:*fp64 threshold_ptr:*fp32 "
                f"num_lanes:i32 {SIZES}",
                "constants": {"BLOCKS": blocks, "LANES": triton.next_power_of_2(tile.num_blocks * threads)},
                "options": {"num_warps": 8},
                **common,
            }
