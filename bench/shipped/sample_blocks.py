"""What is compiled of kernels/sample_blocks.py: Qwen2.5-VL's vocabulary in bfloat16, with truncation and without.

Rare: float32, and a vocabulary so small that a program takes several rows.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import row_stats, sample_blocks

VOCAB, SMALL_VOCAB = 151_665, 163  # the tokenizer's; the head has 152,064 rows, which only the stride shows
ROWS = 256  # sequences that are decoded together
SIZES = "stride:i32 num_rows:i32 vocab_size:i32 num_blocks:i32"
ROW = "logits_ptr:*{0} temperature_ptr:*fp32 banned_ptr:*u8 ban_blocks_ptr:*u8 partial_ptr:*fp32"
CUT = "limits_ptr:*fp64 candidates_ptr:*{0} num_candidates_ptr:*i32"
DRAWN = "seed_ptr:*i64 position_ptr:*i64 token_ptr:*i64"
FIGURES = "logprob_ptr:*fp32 logprob_raw_ptr:*fp32 entropy_ptr:*fp32 kept_mass_ptr:*fp32"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, vocab in (("bf16", VOCAB), ("fp32", VOCAB), ("bf16", SMALL_VOCAB)):
        tile = row_stats.row_tile(vocab)
        rare = (dtype, vocab) != ("bf16", VOCAB)
        constants = {
            "ROWS": tile.rows,
            "BLOCK": tile.block,
            "BLOCKS": row_stats.padded_blocks(tile),
            "STEP": sample_blocks.step_of(tile),
            "SHIFT": 16 if dtype == "bf16" else 0,
        }
        for truncates in (False, True):
            absent = () if truncates else ("limits_ptr", "candidates_ptr", "num_candidates_ptr")
            yield {
                "op": "sample",
                "kernel": "_draw_kernel",
                "what": f"{dtype}, {vocab} ids{', truncation' * truncates}",
                "types": f"{ROW} {DRAWN} {CUT * truncates} {FIGURES} {SIZES}".format(dtype),
                "constants": constants | {"TRUNCATES": truncates} | dict.fromkeys(absent),
                "options": {"num_warps": sample_blocks.warps_of(tile, truncates)},
                "elements": tile.rows * tile.block // (32 * sample_blocks.warps_of(tile, truncates)),
                "instructions": (r"mul\.lo\.s64",),
                "work": {} if truncates else {"shape": f"{ROWS} blocks", "elements": ROWS * tile.rows * tile.block},
                "spot": truncates and not rare,
                "rare": rare,
            }
