"""What is compiled of kernels/linear_tiles.py: log-probs in bfloat16, as Hopper runs them, and in float32.

And bfloat16 by pointers, what other GPUs run, and Hopper where bulk copies do not take the operands. Rare: float32, and
the forms of pointers but one. Training at temperatures of 0 and 1, which count as 1, passes none; the loss keeps x.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import linear_tiles

ROWS, FEATURES, VOCAB = 8_192, 3_584, 152_064  # of a training step
WGMMA, BULK_COPY, SPECIALIZED = r"wgmma\.mma_async", r"cp\.async\.bulk\.tensor", r"setmaxnreg"
BULK_STORE = r"cp\.async\.bulk\.tensor\S*\.global\.shared"


def elements(tile: dict[str, Any]) -> int:
    """Logits a thread: of specialized warps a producer computes none, and two groups of four halve the tile."""
    warps = 8 if tile["SPECIALIZE"] else tile["num_warps"]
    return int(tile["ROWS"] * tile["WORDS"] // (32 * warps))


def work(dtype: str, stored: bool) -> dict[str, Any]:
    """One product of all rows; `stored`: and its tiles, written once."""
    itemsize = 4 if dtype == "fp32" else 2
    return {
        "shape": f"{ROWS} x {FEATURES} x {VOCAB}",
        "elements": ROWS * VOCAB,
        "num_bytes": itemsize * ((ROWS + VOCAB) * FEATURES + stored * ROWS * VOCAB),
        "flops": 2 * ROWS * FEATURES * VOCAB if itemsize == 2 else 0,  # float32 has no tensor cores here
    }


def configurations() -> Iterator[dict[str, Any]]:
    operands = "hidden_ptr:*{0} weight_ptr:*{0}"
    shape = "num_rows:i32 vocab_size:i32 num_features:i32"
    for dtype, tma in (("bf16", True), ("fp32", False), ("bf16", False)):
        kept_dtype = "fp32" if dtype == "fp32" else "fp16"
        for keep in (False, True):
            for tau in (True, False):
                kernel = "keep float32" if dtype == "fp32" else "keep"
                tile = linear_tiles.launch_config(kernel if keep else "forward", tma)
                kept = f" kept_ptr:*{kept_dtype} kept_max_ptr:*fp32" * keep
                absent = ([] if keep else ["kept_ptr", "kept_max_ptr"]) + ([] if tau else ["tau_ptr"])
                wanted = [WGMMA, BULK_COPY, SPECIALIZED, *[BULK_STORE] * keep] if tma else []
                yield {
                    "op": "linear_grpo_loss" if keep else "linear_logprob",
                    "kernel": "_forward_kernel",
                    "what": f"{dtype}{', pointers' * (not tma)}{', temperature' * tau}{', x kept' * keep}",
                    "types": f"{operands.format(dtype)}{' tau_ptr:*fp32' * tau} bias_ptr:*fp32 "
                    f"partials_ptr:*fp32{kept} {shape} kept_width:i32",
                    "constants": {"HAS_TAU": tau, "KEEP": keep, "SPLIT": linear_tiles._SPLIT} | dict.fromkeys(absent),
                    "options": tile,
                    "elements": elements(tile),
                    "budget": (13 if keep else 12) * tma,
                    "work": work(dtype, keep),
                    "aligned": "num_features kept_width",
                    "instructions": (r"ex2\.approx\.ftz", *wanted),
                    "spot": dtype == "bf16" and not tma and not keep and tau,
                    "rare": dtype == "fp32" or (not tma and (keep or not tau)),
                }
        tile = linear_tiles.launch_config("forward", tma)
        yield {
            "op": "linear_logprob",
            "kernel": "_target_kernel",
            "what": f"{dtype}{', pointers' * (not tma)}",
            "types": f"{operands.format(dtype)} targets_ptr:*i64 bias_ptr:*fp32 z_target_ptr:*fp32 num_rows:i32 "
            "num_features:i32",
            "constants": {"ROWS": 64, "FEATURES": tile["FEATURES"]},
            "options": {"num_warps": 4, "num_stages": 3},
            "aligned": "num_features",
            "instructions": (WGMMA,) * tma,
            "rare": not tma,
        }
    for tau in (True, False):
        yield {
            "op": "linear_logprob",
            "kernel": "_merge_kernel",
            "what": "temperature" if tau else "no temperature",
            "types": f"partials_ptr:*fp32 z_target_ptr:*fp32{' tau_ptr:*fp32' * tau} stats_ptr:*fp32 num_rows:i32 "
            "num_splits:i32",
            "constants": {"HAS_TAU": tau} | ({} if tau else {"tau_ptr": None}),
            "options": {"ROWS": 128, "num_warps": 4},
            "instructions": (r"ex2\.approx\.ftz",),
            "rare": not tau,
        }
