"""What is compiled of kernels/token_logprobs.py: the backward with an entropy bonus and without.

Rare: float32.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import token_logprobs

VOCAB = 151_665  # the tokenizer's; the head has 152,064 rows, which only the stride shows
ROWS = 8_192  # tokens of a training step
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    tile = token_logprobs._launch_config(VOCAB)
    elements = tile["BLOCK"] // (32 * tile["num_warps"])
    for dtype, entropy in (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False)):
        itemsize = 2 if dtype == "bf16" else 4
        # A thread's logits, 16 bytes a load: of the mask it is one for as many ids, so fewer bytes.
        loads = elements * itemsize // 16
        absent = {} if entropy else {"h_ptr": None}
        yield {
            "kernel": "_backward_kernel",
            "what": f"{dtype}{', entropy' * entropy}",
            "types": f"logits_ptr:*{dtype} targets_ptr:*i64 temperature_ptr:*fp32 "
            f"banned_ptr:*u8 ban_blocks_ptr:*u8 stats_ptr:*fp32 g_ptr:*fp32 {'h_ptr:*fp32' * entropy} "
            f"dlogits_ptr:*{dtype} stride:i32 dstride:i32 num_rows:i32 vocab_size:i32 num_columns:i32",
            "constants": {"HAS_H": entropy} | absent,
            "options": tile,
            "elements": elements,
            "budget": 29 if entropy else 18,
            # The longest way is that of a block that holds the target, and bans: one or two in 75.
            "excused": ("budget", "narrow"),
            "work": {
                "shape": f"{ROWS} x {VOCAB}",
                "elements": ROWS * VOCAB,
                "num_bytes": 2 * itemsize * ROWS * VOCAB,
            },
            "instructions": (r"ex2\.approx", rf"(?s)({WIDE_LOAD}.*){{{loads}}}", WIDE_STORE),
            "spot": entropy and dtype == "bf16",
            "rare": dtype == "fp32",
        }
