"""What is compiled of kernels/sample_blocks.py: Qwen2.5-VL's vocabulary in bfloat16, with truncation and without.

Rare: float32, and a vocabulary so small that a program takes several rows.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import sample_blocks

VOCAB, SMALL_VOCAB = 151_665, 163  # the tokenizer's; the head has 152,064 rows, which only the stride shows
WIDE_LOAD = r"ld\.global\S*\.v4"
ROWS = 256  # sequences that are decoded together
SIZES = "num_rows:i32 vocab_size:i32 num_blocks:i32"
ROW = "logits_ptr:*{0} temperature_ptr:*fp32 banned_ptr:*u8 partial_ptr:*fp32"
LIMITS = "limits_ptr:*fp64"
CUT = "candidates_ptr:*{0} num_candidates_ptr:*i32 sure_ptr:*fp64"
DRAWN = "seed_ptr:*i64 position_ptr:*i64 argmax_ptr:*i32 token_ptr:*i64"
FIGURES = "logprob_ptr:*fp32 logprob_raw_ptr:*fp32 entropy_ptr:*fp32 kept_mass_ptr:*fp32"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, vocab in (("bf16", VOCAB), ("fp32", VOCAB), ("bf16", SMALL_VOCAB)):
        tile = sample_blocks._launch_config(vocab)
        row = ROW.format(dtype)
        blocks = {"BLOCKS": 1 if tile["ROWS"] > 1 else 64}
        bins = sample_blocks._BINS if vocab == VOCAB else 1
        rare = (dtype, vocab) != ("bf16", VOCAB)
        aligned = "stride" if vocab == VOCAB else ""
        per_thread = tile["ROWS"] * tile["BLOCK"] // (32 * tile["num_warps"])
        itemsize = 2 if dtype == "bf16" else 4
        row_pass = {"shape": f"{ROWS} x {vocab}", "elements": ROWS * vocab, "num_bytes": ROWS * vocab * itemsize}
        one_block = {"shape": f"{ROWS} blocks", "elements": ROWS * tile["BLOCK"]}
        common = {"op": "sample", "aligned": aligned, "options": tile, "elements": per_thread, "rare": rare}
        loads = per_thread * (2 if dtype == "bf16" else 4) // 16 + per_thread // 16  # of logits, of the mask
        wide = (rf"(?s)({WIDE_LOAD}.*){{{loads}}}",) if vocab == VOCAB else ()
        for truncates in (False, True):
            what = f"{dtype}, {vocab} ids, banned ids{', truncation' * truncates}"
            absent = () if truncates else ("limits_ptr", "candidates_ptr", "num_candidates_ptr", "sure_ptr")
            yield {
                "kernel": "_stats_kernel",
                "what": what,
                "types": f"{row} argmax_ptr:*i32{' histogram_ptr:*i16' * truncates} stride:i32 {SIZES}",
                "constants": {"HAS_BANNED": True, "BINS": bins * truncates}
                | ({} if truncates else {"histogram_ptr": None}),
                "instructions": (r"ex2\.approx", *wide, *[r"atom\.shared"] * (truncates and bins > 1)),
                "budget": 22 if truncates else 14,
                "excused": ("budget", "denormal", "narrow"),
                "work": row_pass,
                "spot": truncates and not rare,
                **common,
            }
            yield {
                "kernel": "_draw_kernel",
                "what": what,
                "types": f"{row} {DRAWN} {f'{LIMITS} {CUT.format(dtype)}' * truncates} {FIGURES} stride:i32 {SIZES}",
                "constants": {"HAS_BANNED": True, "BINS": bins * truncates, "SHIFT": 16 if dtype == "bf16" else 0}
                | blocks
                | dict.fromkeys(absent),
                "instructions": (r"mul\.lo\.s64",),
                "work": {} if truncates else one_block,
                **common,
            }
        yield {
            "kernel": "_truncate_kernel",
            "what": f"{dtype}, {vocab} ids, banned ids",
            "types": f"{row} {LIMITS} bounds_ptr:*i32 {CUT.format(dtype)} stride:i32 {SIZES}",
            "constants": {"HAS_BANNED": True, "BINS": bins, **blocks},
            "instructions": wide,
            "budget": 12,
            "excused": ("budget", "denormal", "narrow"),
            "work": row_pass,
            **common,
        }
        if dtype == "bf16":
            yield {
                "op": "sample",
                "kernel": "_bounds_kernel",
                "what": f"{vocab} ids",
                "types": f"temperature_ptr:*fp32 partial_ptr:*fp32 histogram_ptr:*i16 {LIMITS} bounds_ptr:*i32 {SIZES}",
                "constants": {"BINS": bins, "ROWS": tile["ROWS"], **blocks},
                "options": {"num_warps": 8},
                "aligned": aligned,
                "rare": rare,
            }
