"""What is compiled of kernels/token_logprobs.py: all that may be asked for at once, and no banned ids or entropy."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import token_logprobs

VOCAB = 151_665  # the tokenizer's; the head has 152,064 rows, which only the stride shows
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    tile = token_logprobs._launch_config(VOCAB)
    for dtype, full in (("bf16", True), ("bf16", False), ("fp32", True)):
        # A thread's logits, 16 bytes a load: of the mask it is one for as many ids, so fewer bytes.
        loads = tile["BLOCK"] // (32 * tile["num_warps"] * (8 if dtype == "bf16" else 4))
        banned = "banned_ptr:*u8 ban_blocks_ptr:*u8"
        yield {
            "kernel": "_backward_kernel",
            "what": f"{dtype}{', banned ids, entropy' * full}",
            "types": f"logits_ptr:*{dtype} targets_ptr:*i64 temperature_ptr:*fp32 {banned * full} stats_ptr:*fp32 "
            f"g_ptr:*fp32 {'h_ptr:*fp32' * full} dlogits_ptr:*{dtype} "
            "stride:i32 dstride:i32 num_rows:i32 vocab_size:i32 num_columns:i32",
            "constants": {"HAS_H": full, "HAS_BANNED": full}
            | ({} if full else dict.fromkeys(("banned_ptr", "ban_blocks_ptr", "h_ptr"))),
            "options": tile,
            "elements": tile["BLOCK"] // (32 * tile["num_warps"]),
            "instructions": (r"ex2\.approx", rf"(?s)({WIDE_LOAD}.*){{{loads}}}", WIDE_STORE),
            "spot": full and dtype == "bf16",
        }
