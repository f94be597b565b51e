"""What is compiled of kernels/token_logprobs.py: all that may be asked for at once, and no banned ids or entropy."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import token_logprobs

VOCAB = 151_665  # the tokenizer's; the head has 152,064 rows, which only the stride shows
ROWS = 8_192  # of a training step
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    tile = token_logprobs._launch_config(VOCAB)
    elements = tile["BLOCK"] // (32 * tile["num_warps"])
    for dtype, full in (("bf16", True), ("bf16", False), ("fp32", True)):
        pointers = f"logits_ptr:*{dtype} targets_ptr:*i64 tau_ptr:*fp32" + " banned_ptr:*u8" * full
        absent = {} if full else {"banned_ptr": None}
        flags = {"HAS_BANNED": full}
        read = ROWS * VOCAB * (2 if dtype == "bf16" else 4)
        row_pass = {"shape": f"{ROWS} x {VOCAB}", "elements": ROWS * VOCAB}
        # 16 elements a thread, and their bytes of the mask: each 16 bytes are one load.
        wide = rf"(?s)({WIDE_LOAD}.*){{{(2 if dtype == 'bf16' else 4) + full}}}"
        what = f"{dtype}{', banned ids' * full}"
        yield {
            "kernel": "_forward_kernel",
            "what": what,
            "types": f"{pointers} mask_ptr:*u8 stats_ptr:*fp32 stride:i32 num_rows:i32 vocab_size:i32",
            "constants": flags | absent,
            "options": tile,
            "elements": elements,
            "aligned": "stride",
            "instructions": (r"ex2\.approx", wide),
            "rare": dtype == "fp32",
            "budget": 14,
            "excused": ("budget", "denormal"),
            "work": row_pass | {"num_bytes": read},
            "spot": full and dtype == "bf16",
        }
        yield {
            "kernel": "_backward_kernel",
            "what": what + ", entropy" * full,
            "types": f"{pointers} stats_ptr:*fp32 g_ptr:*fp32 {'h_ptr:*fp32' * full} dlogits_ptr:*{dtype} "
            "stride:i32 dstride:i32 num_rows:i32 vocab_size:i32 num_columns:i32",
            "constants": flags | absent | {"HAS_H": full} | ({} if full else {"h_ptr": None}),
            "options": tile,
            "elements": elements,
            "aligned": "stride dstride num_columns",
            "instructions": (r"ex2\.approx", wide, WIDE_STORE),
            "rare": dtype == "fp32",
            "budget": 29 if full else 18,
            "excused": ("budget", "denormal"),
            "work": row_pass | {"num_bytes": 2 * read},
            "spot": full and dtype == "bf16",
        }
    yield from _without_entropy(tile)


def _without_entropy(tile: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The backward of a loss without an entropy bonus, and float32 where nothing is banned."""
    targets, sizes = "targets_ptr:*i64 tau_ptr:*fp32", "stride:i32 num_rows:i32 vocab_size:i32"
    elements = tile["BLOCK"] // (32 * tile["num_warps"])
    for dtype, banned in (("bf16", True), ("fp32", True), ("fp32", False)):
        loads = (2 if dtype == "bf16" else 4) + banned
        wide = rf"(?s)({WIDE_LOAD}.*){{{loads}}}"
        pointers = f"logits_ptr:*{dtype} {targets}{' banned_ptr:*u8' * banned}"
        form = {
            "what": f"{dtype}{', banned ids' * banned}",
            "options": tile,
            "elements": elements,
            "rare": dtype == "fp32",
        }
        absent = {"HAS_BANNED": banned} | ({} if banned else {"banned_ptr": None})
        work = {"shape": f"{ROWS} x {VOCAB}", "elements": ROWS * VOCAB}
        itemsize = 2 if dtype == "bf16" else 4
        yield form | {
            "kernel": "_backward_kernel",
            "types": f"{pointers} stats_ptr:*fp32 g_ptr:*fp32 dlogits_ptr:*{dtype} dstride:i32 {sizes} num_columns:i32",
            "constants": absent | {"HAS_H": False, "h_ptr": None},
            "aligned": "stride dstride num_columns",
            "instructions": (r"ex2\.approx", wide, WIDE_STORE),
            "budget": 18 + 4 * banned,
            "excused": ("budget", "denormal"),
            "work": work | {"num_bytes": 2 * itemsize * ROWS * VOCAB},
        }
        if not banned:
            yield form | {
                "kernel": "_forward_kernel",
                "types": f"{pointers} mask_ptr:*u8 stats_ptr:*fp32 {sizes}",
                "constants": absent,
                "aligned": "stride",
                "instructions": (r"ex2\.approx", wide),
                "work": work | {"num_bytes": itemsize * ROWS * VOCAB},
            }
