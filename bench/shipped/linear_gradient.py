"""What is compiled of kernels/linear_gradient.py: dz in bfloat16, as Hopper makes it, and in float32.

From the x that the loss kept, or from tiles made again for log-probs by themselves; by pointers, what other GPUs run.
Rare: float32, and forms that differ from another one by a product a row.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import linear_gradient, linear_tiles

ROWS, FEATURES, VOCAB = 8_192, 3_584, 152_064  # of a training step
WGMMA, SPECIALIZED = r"wgmma\.mma_async", r"setmaxnreg"
BULK_STORE = r"cp\.async\.bulk\.tensor\S*\.global\.shared"
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


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
    for dtype, tma in (("bf16", True), ("fp32", False), ("bf16", False)):
        for tau in (True, False):
            for entropy in (False, True):
                absent = ([] if tau else ["tau_ptr"]) + ([] if entropy else ["h_ptr"])
                form = {
                    "what": f"{dtype}{', pointers' * (not tma)}{', temperature' * tau}{', entropy' * entropy}",
                }
                given = f"{'tau_ptr:*fp32' * tau} {{}} stats_ptr:*fp32 g_ptr:*fp32{' h_ptr:*fp32' * entropy}"
                tile = linear_tiles.launch_config("entropy" if entropy else "dlogits", tma)
                spot = dtype == "bf16" and not tma and tau and not entropy
                yield form | {
                    "op": "linear_grpo_loss" if spot else "linear_logprob",
                    "kernel": "_dlogits_kernel",
                    "types": f"hidden_ptr:*{dtype} weight_ptr:*{dtype} targets_ptr:*i64 "
                    f"{given.format('bias_ptr:*fp32')} dz_ptr:*{dtype} num_rows:i32 vocab_size:i32 "
                    "num_features:i32 dz_width:i32",
                    "constants": {"HAS_TAU": tau, "HAS_H": entropy} | dict.fromkeys(absent),
                    "options": tile,
                    "elements": elements(tile),
                    "budget": 12 * (tma and not entropy),
                    "work": work(dtype, True),
                    "aligned": "num_features dz_width",
                    "instructions": (r"ex2\.approx\.ftz", *[WGMMA, SPECIALIZED, BULK_STORE] * tma),
                    "spot": spot,
                    "rare": not spot and (not tma or tau or entropy),
                }
                if dtype == "bf16" and not tma:
                    continue  # the same as beside bulk copies, but for the words of a tile
                words = linear_tiles.launch_config("keep", tma)["WORDS"]
                yield form | {
                    "op": "linear_grpo_loss",
                    "kernel": "_kept_kernel",
                    "types": f"x_ptr:*{'fp32' if dtype == 'fp32' else 'fp16'} kept_max_ptr:*fp32 targets_ptr:*i64 "
                    f"{given.format('')} dz_ptr:*{dtype} num_rows:i32 kept_width:i32",
                    "constants": {"HAS_TAU": tau, "HAS_H": entropy, "WORDS": words}
                    | {"TILES": linear_gradient._BLOCK // words}
                    | dict.fromkeys(absent),
                    "options": {"num_warps": 8},
                    "elements": linear_gradient._BLOCK // (32 * 8),
                    "aligned": "kept_width",
                    "instructions": (r"ex2\.approx\.ftz", WIDE_LOAD, WIDE_STORE),
                    "rare": dtype == "fp32" or tau != entropy,
                }
    for dtype in ("bf16", "fp32"):
        yield {
            "op": "linear_grpo_loss",
            "kernel": "_scale_kernel",
            "what": dtype,
            "types": f"x_ptr:*{dtype} scale_ptr:*fp32 size:i32",
            "constants": {"BLOCK": 4096},
            "options": {"num_warps": 8},
            "elements": 4096 // (32 * 8),
            "aligned": "size",
            "instructions": (WIDE_LOAD, WIDE_STORE),
            "rare": dtype == "fp32",
        }
