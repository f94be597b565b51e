"""What is compiled of kernels/linear_tiles.py: log-probs and gradients in bfloat16, as Hopper runs them, and float32.

And bfloat16 by pointers, what other GPUs run, and Hopper where bulk copies do not take the operands. Rare: the forms of
float32 and of pointers that a training step of the 7B model has no use for.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import linear_tiles

ROWS, FEATURES, VOCAB = 8_192, 3_584, 152_064  # of a training step
WGMMA, BULK_COPY, SPECIALIZED = r"wgmma\.mma_async", r"cp\.async\.bulk\.tensor", r"setmaxnreg"


def configurations() -> Iterator[dict[str, Any]]:
    operands = "hidden_ptr:*{0} weight_ptr:*{0}"
    rows = "targets_ptr:*i64 tau_ptr:*fp32 bias_ptr:*fp32"
    shape = "num_rows:i32 vocab_size:i32 num_features:i32"
    split = {"HAS_TAU": True, "SPLIT": linear_tiles._SPLIT}
    absent = {"kept_ptr": None, "kept_max_ptr": None}

    def work(itemsize: int, stored: bool) -> dict[str, Any]:
        """One product of all rows; `stored`: and its tiles, written once."""
        return {
            "shape": f"{ROWS} x {FEATURES} x {VOCAB}",
            "elements": ROWS * VOCAB,
            "num_bytes": itemsize * ((ROWS + VOCAB) * FEATURES + stored * ROWS * VOCAB),
            "flops": 2 * ROWS * FEATURES * VOCAB if itemsize == 2 else 0,  # float32 has no tensor cores here
        }

    def fast(tile: dict[str, Any]) -> tuple[str, ...]:
        return (r"ex2\.approx", *[WGMMA, BULK_COPY] * tile["TMA"], *[SPECIALIZED] * tile["SPECIALIZE"])

    def elements(tile: dict[str, Any]) -> int:
        """Logits a thread: of specialized warps a producer computes none, and two groups of four halve the tile."""
        warps = 8 if tile["SPECIALIZE"] else tile["num_warps"]
        return tile["ROWS"] * tile["WORDS"] // (32 * warps)

    for dtype, tma in (("bf16", True), ("fp32", False), ("bf16", False)):
        itemsize = 2 if dtype == "bf16" else 4
        named = f"{dtype}{', pointers' * (not tma)}"
        for keep in (False, True):
            tile = linear_tiles._launch_config("keep" if keep else "forward", tma)
            kept = f" kept_ptr:*{dtype} kept_max_ptr:*fp32" * keep
            yield {
                "op": "linear_logprob",
                "kernel": "_forward_kernel",
                "what": f"{named}, temperature{', exp tiles' * keep}",
                "types": f"{operands.format(dtype)} {rows} partials_ptr:*fp32{kept} {shape} kept_width:i32",
                "constants": split | {"KEEP": keep} | ({} if keep else absent),
                "options": tile,
                "elements": elements(tile),
                "budget": 12 if tma and not keep else 0,
                "excused": ("budget", "denormal"),
                "work": work(itemsize, keep),
                "aligned": "num_features kept_width",
                "instructions": fast(tile),
                "spot": dtype == "bf16" and not tma and not keep,
                "rare": dtype == "bf16" and not tma and keep,
            }
        for entropy in (False, True):
            tile = linear_tiles._launch_config("entropy" if entropy else "dlogits", tma)
            yield {
                "op": "linear_grpo_loss",
                "kernel": "_dlogits_kernel",
                "what": f"{named}, temperature{', entropy' * entropy}",
                "types": f"{operands.format(dtype)} {rows} stats_ptr:*fp32 g_ptr:*fp32{' h_ptr:*fp32' * entropy} "
                f"dz_ptr:*{dtype} {shape} dz_width:i32",
                "constants": {"HAS_TAU": True, "HAS_H": entropy} | ({} if entropy else {"h_ptr": None}),
                "options": tile,
                "elements": elements(tile),
                "work": work(itemsize, True),
                "aligned": "num_features dz_width",
                "instructions": fast(tile),
                "spot": dtype == "bf16" and not tma and not entropy,
                "rare": not tma and entropy,
            }
    yield {
        "op": "linear_logprob",
        "kernel": "_merge_kernel",
        "what": "temperature",
        "types": "partials_ptr:*fp32 tau_ptr:*fp32 stats_ptr:*fp32 num_rows:i32 num_splits:i32",
        "constants": {"HAS_TAU": True},
        "options": {"ROWS": 128, "num_warps": 4},
        "instructions": (r"ex2\.approx",),
    }
    for dtype in ("bf16", "fp32"):
        tile = linear_tiles._launch_config("keep", dtype == "bf16")
        yield {
            "op": "linear_grpo_loss",
            "kernel": "_scale_kernel",
            "what": f"{dtype}, temperature",
            "types": f"kept_ptr:*{dtype} kept_max_ptr:*fp32 targets_ptr:*i64 tau_ptr:*fp32 stats_ptr:*fp32 "
            "g_ptr:*fp32 num_rows:i32 kept_width:i32",
            "constants": {"HAS_TAU": True, "WORDS": tile["WORDS"], "BLOCK": 2048},
            "options": {"num_warps": 8},
            "elements": 2048 // (32 * 8),
            "work": {
                "shape": f"4096 x {VOCAB}",
                "elements": 4096 * VOCAB,
                "num_bytes": 2 * 4096 * VOCAB * (2 if dtype == "bf16" else 4),
            },
            "aligned": "kept_width",
            "instructions": (r"ex2\.approx", r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"),
        }
    yield from _without_temperature()


def _without_temperature() -> Iterator[dict[str, Any]]:
    """As supervised training calls them."""
    sizes = "num_rows:i32 vocab_size:i32 num_features:i32"
    for dtype, tma in (("bf16", True), ("fp32", False)):
        operands = f"hidden_ptr:*{dtype} weight_ptr:*{dtype} targets_ptr:*i64 bias_ptr:*fp32"
        form = {"what": f"{dtype}{', pointers' * (not tma)}", "rare": not tma}
        absent = {"tau_ptr": None, "HAS_TAU": False}
        yield form | {
            "op": "linear_logprob",
            "kernel": "_forward_kernel",
            "types": f"{operands} partials_ptr:*fp32 {sizes} kept_width:i32",
            "constants": absent | {"kept_ptr": None, "kept_max_ptr": None, "KEEP": False, "SPLIT": linear_tiles._SPLIT},
            "options": linear_tiles._launch_config("forward", tma),
            "aligned": "num_features kept_width",
        }
        yield form | {
            "op": "linear_grpo_loss",
            "kernel": "_dlogits_kernel",
            "types": f"{operands} stats_ptr:*fp32 g_ptr:*fp32 dz_ptr:*{dtype} {sizes} dz_width:i32",
            "constants": absent | {"h_ptr": None, "HAS_H": False},
            "options": linear_tiles._launch_config("dlogits", tma),
            "aligned": "num_features dz_width",
        }
    yield {
        "op": "linear_logprob",
        "kernel": "_merge_kernel",
        "what": "no temperature",
        "types": "partials_ptr:*fp32 stats_ptr:*fp32 num_rows:i32 num_splits:i32",
        "constants": {"HAS_TAU": False, "tau_ptr": None},
        "options": {"ROWS": 128, "num_warps": 4},
    }
