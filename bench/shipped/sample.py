"""What is compiled of kernels/sample.py: Qwen2.5-VL's vocabulary, and the toy's."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import sample

VOCAB = 152_064
WIDE_LOAD = r"ld\.global\S*\.v[24]"
SIZES = "stride:i64 num_rows:i32 vocab_size:i32 num_blocks:i32"
ROW = "logits_ptr:*{0} temperature_ptr:*fp32 banned_ptr:*u8 partial_ptr:*fp32 argmax_ptr:*i32"
DRAWN = "seed_ptr:*i64 position_ptr:*i64 token_ptr:*i64 logprob_ptr:*fp32 logprob_raw_ptr:*fp32"
LIMITS = "top_k_ptr:*i64 top_p_ptr:*fp32 min_p_ptr:*fp32 kept_mass_ptr:*fp32"


def configurations() -> Iterator[dict[str, Any]]:
    tile = sample._launch_config(VOCAB)
    for dtype, banned in (("bf16", True), ("fp32", False)):
        yield {
            "kernel": "_stats_kernel",
            "what": f"{dtype}{', banned ids' * banned}",
            "types": f"{ROW.format(dtype)} {SIZES}",
            "constants": {"HAS_BANNED": banned} | ({} if banned else {"banned_ptr": None}),
            "options": tile,
            "aligned": "stride vocab_size",
            "instructions": (r"ex2\.approx", WIDE_LOAD),
            "spot": banned,
        }
    yield {
        "kernel": "_draw_kernel",
        "what": "bf16, banned ids",
        "types": f"{ROW.format('bf16')} {DRAWN} entropy_ptr:*fp32 {SIZES}",
        "constants": {"HAS_BANNED": True, "BLOCKS": 64},
        "options": tile,
        "aligned": "stride vocab_size",
        "instructions": (r"mul\.lo\.s64",),
    }
    toy = sample._launch_config(163)  # many rows a program, one block: num_blocks is the constant 1
    small = f"{ROW.format('fp32')} {SIZES}".replace(" banned_ptr:*u8", "").replace(" num_blocks:i32", "")
    constants = {"HAS_BANNED": False, "banned_ptr": None, "num_blocks": 1}
    what = "fp32, 163 ids"
    yield {"kernel": "_stats_kernel", "what": what, "types": small, "constants": constants, "options": toy}
    yield {
        "kernel": "_draw_kernel",
        "what": what,
        "types": f"{small} {DRAWN} entropy_ptr:*fp32",
        "constants": constants | {"BLOCKS": 1},
        "options": toy,
    }
    yield {
        "kernel": "_truncate_kernel",
        "what": "bf16, banned ids",
        "types": f"{ROW.format('bf16').replace(' argmax_ptr:*i32', '')} {DRAWN} {LIMITS} {SIZES}",
        "constants": {"HAS_BANNED": True, "BLOCKS": 64},
        "options": tile,
        "aligned": "stride vocab_size",
        "instructions": (WIDE_LOAD,),
    }
