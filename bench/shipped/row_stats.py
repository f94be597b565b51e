"""What is compiled of kernels/row_stats.py: Qwen2.5-VL's vocabulary.

Rare: a vocabulary so small that a program takes several rows.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import row_stats

VOCAB, SMALL_VOCAB = 151_665, 163  # the tokenizer's; the head has 152,064 rows, which only the stride shows
ROWS = 8_192  # tokens of a training step; what is drawn from has fewer
WIDE_LOAD = r"ld\.global\S*\.v4"
SIZES = "stride:i32 num_rows:i32 vocab_size:i32 num_blocks:i32"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, vocab in (("bf16", VOCAB), ("fp32", VOCAB), ("bf16", SMALL_VOCAB)):
        tile = row_stats.row_tile(vocab)
        vector = 8 if dtype == "bf16" else 4
        loads = tile.block // (vector * 32)
        rare = vocab == SMALL_VOCAB
        common = {"op": "row_stats", "rare": rare, "spot": dtype == "bf16" and not rare}
        yield {
            "kernel": "_partial_kernel",
            "what": f"{dtype}, {vocab} ids",
            "types": f"logits_ptr:*{dtype} temperature_ptr:*fp32 banned_ptr:*u8 ban_blocks_ptr:*u8 "
            f"partial_ptr:*fp32 lanes_ptr:*fp32 num_lanes:i32 {SIZES}",
            "constants": {"ROWS": tile.rows, "BLOCK": tile.block, "LANES": min(32, tile.block // vector)},
            "options": {"num_warps": 1},
            "elements": tile.rows * tile.block // 32,
            # The longest way is that of a block that holds bans, one in 75: others take 14 (10.5 at temperature 1).
            "budget": 0 if rare else 18,
            "excused": ("narrow",),
            "work": {
                "shape": f"{ROWS} x {vocab}",
                "elements": ROWS * vocab,
                "num_bytes": ROWS * vocab * (2 if dtype == "bf16" else 4),
            },
            "instructions": (r"ex2\.approx", *([] if rare else [rf"(?s)({WIDE_LOAD}.*){{{loads}}}"])),
            **common,
        }
        blocks = row_stats.padded_blocks(tile)
        yield {
            "kernel": "_totals_kernel",
            "what": f"{dtype}, {vocab} ids",
            "types": f"logits_ptr:*{dtype} ids_ptr:*i64 temperature_ptr:*fp32 partial_ptr:*fp32 stats_ptr:*fp32 "
            f"{SIZES}",
            "constants": {"ROWS": max(1, 512 // blocks), "BLOCKS": blocks},
            "options": {"num_warps": 4},
            **common,
        }
        if dtype == "bf16":
            yield {
                "kernel": "_ban_blocks_kernel",
                "what": f"{vocab} ids",
                "types": "banned_ptr:*u8 ban_blocks_ptr:*u8 vocab_size:i32",
                "constants": {"BLOCK": tile.block},
                "options": {},
                **common,
            }
