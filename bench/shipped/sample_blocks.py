"""What is compiled of kernels/sample_blocks.py: Qwen2.5-VL's vocabulary, with truncation and without."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import sample_blocks

VOCAB = 152_064
WIDE_LOAD = r"ld\.global\S*\.v[24]"
SIZES = "num_rows:i32 vocab_size:i32 num_blocks:i32"
ROW = "logits_ptr:*{0} temperature_ptr:*fp32 banned_ptr:*u8 partial_ptr:*fp32"
LIMITS = "limits_ptr:*fp64"
CUT = "candidates_ptr:*{0} num_candidates_ptr:*i32 sure_ptr:*fp64"
DRAWN = "seed_ptr:*i64 position_ptr:*i64 argmax_ptr:*i32 token_ptr:*i64"
FIGURES = "logprob_ptr:*fp32 logprob_raw_ptr:*fp32 entropy_ptr:*fp32 kept_mass_ptr:*fp32"


def configurations() -> Iterator[dict[str, Any]]:
    tile = sample_blocks._launch_config(VOCAB)
    blocks = {"BLOCKS": 64}
    common = {"aligned": "stride vocab_size", "options": tile}
    yield {
        "kernel": "_stats_kernel",
        "what": "bf16, banned ids, truncation",
        "types": f"{ROW.format('bf16')} argmax_ptr:*i32 histogram_ptr:*i16 stride:i64 {SIZES}",
        "constants": {"HAS_BANNED": True, "BINS": sample_blocks._BINS},
        "instructions": (r"ex2\.approx", WIDE_LOAD, r"atom\.shared"),
        "spot": True,
        **common,
    }
    yield {
        "kernel": "_stats_kernel",
        "what": "fp32",
        "types": f"{ROW.format('fp32')} argmax_ptr:*i32 stride:i64 {SIZES}".replace(" banned_ptr:*u8", ""),
        "constants": {"HAS_BANNED": False, "BINS": 0, "banned_ptr": None, "histogram_ptr": None},
        "instructions": (r"ex2\.approx", WIDE_LOAD),
        **common,
    }
    yield {
        "kernel": "_draw_kernel",
        "what": "bf16, banned ids",
        "types": f"{ROW.format('bf16')} {DRAWN} {FIGURES} stride:i64 {SIZES}",
        "constants": {"HAS_BANNED": True, "BINS": 0, "SHIFT": 16, **blocks}
        | dict.fromkeys(("limits_ptr", "candidates_ptr", "num_candidates_ptr", "sure_ptr")),
        "instructions": (r"mul\.lo\.s64",),
        **common,
    }
    yield {
        "kernel": "_bounds_kernel",
        "what": "any logits",
        "types": f"temperature_ptr:*fp32 partial_ptr:*fp32 histogram_ptr:*i16 {LIMITS} bounds_ptr:*i32 {SIZES}",
        "constants": {"BINS": sample_blocks._BINS, "ROWS": 1, **blocks},
        "options": {"num_warps": tile["num_warps"]},
    }
    yield {
        "kernel": "_truncate_kernel",
        "what": "bf16, banned ids",
        "types": f"{ROW.format('bf16')} {LIMITS} bounds_ptr:*i32 {CUT.format('bf16')} stride:i64 {SIZES}",
        "constants": {"HAS_BANNED": True, "BINS": sample_blocks._BINS, **blocks},
        "instructions": (WIDE_LOAD,),
        **common,
    }
    yield {
        "kernel": "_draw_kernel",
        "what": "fp32, banned ids, truncation",
        "types": f"{ROW.format('fp32')} {DRAWN} {LIMITS} {CUT.format('fp32')} {FIGURES} stride:i64 {SIZES}",
        "constants": {"HAS_BANNED": True, "BINS": sample_blocks._BINS, "SHIFT": 0, **blocks},
        **common,
    }
