"""What is compiled of kernels/linear_tiles.py: each kernel as Hopper runs it, and the forward without bulk copies."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import linear_tiles

VOCAB, FEATURES = 152_064, 3_584
WGMMA, BULK_COPY, SPECIALIZED = r"wgmma\.mma_async", r"cp\.async\.bulk\.tensor", r"setmaxnreg"


def configurations() -> Iterator[dict[str, Any]]:
    rows = "targets_ptr:*i64 tau_ptr:*fp32 bias_ptr:*fp32"
    shape = "num_rows:i32 vocab_size:i32 num_features:i32"
    split = {"HAS_TAU": True, "SPLIT": linear_tiles._SPLIT}
    absent = {"kept_ptr": None, "kept_max_ptr": None}

    def operands(tile: dict[str, Any]) -> str:
        return " ".join(
            f"{name}:tensordesc<bf16[{tile[size]},{tile['FEATURES']}]>"
            for name, size in (("hidden", "ROWS"), ("weight", "WORDS"))
        )

    for keep in (False, True):
        tile = linear_tiles._launch_config("keep" if keep else "forward", True)
        kept = " kept_ptr:*bf16 kept_max_ptr:*fp32" * keep
        yield {
            "kernel": "_forward_kernel",
            "what": f"bf16, temperature{', exp tiles' * keep}",
            "types": f"{operands(tile)} {rows} partials_ptr:*fp32{kept} {shape} kept_width:i32",
            "constants": split | {"KEEP": keep} | ({} if keep else absent),
            "options": tile,
            "aligned": "vocab_size num_features kept_width",
            "instructions": (r"ex2\.approx", WGMMA, BULK_COPY, *[SPECIALIZED] * tile["SPECIALIZE"]),
        }
    tile = linear_tiles._launch_config("forward", False)
    yield {
        "kernel": "_forward_kernel",
        "what": "fp32, temperature, pointers",
        "types": f"hidden:*fp32 weight:*fp32 {rows} partials_ptr:*fp32 {shape} kept_width:i32",
        "constants": split | {"KEEP": False} | absent,
        "options": tile,
        "aligned": "vocab_size num_features kept_width",
        "instructions": (r"ex2\.approx",),
        "spot": True,
    }
    for entropy in (False, True):
        tile = linear_tiles._launch_config("entropy" if entropy else "dlogits", True)
        yield {
            "kernel": "_dlogits_kernel",
            "what": f"bf16, temperature{', entropy' * entropy}",
            "types": f"{operands(tile)} {rows} stats_ptr:*fp32 g_ptr:*fp32{' h_ptr:*fp32' * entropy} dz_ptr:*bf16 "
            f"{shape} dz_width:i32",
            "constants": {"HAS_TAU": True, "HAS_H": entropy} | ({} if entropy else {"h_ptr": None}),
            "options": tile,
            "aligned": "vocab_size num_features dz_width",
            "instructions": (r"ex2\.approx", WGMMA, BULK_COPY, SPECIALIZED),
        }
    tile = linear_tiles._launch_config("keep", True)
    yield {
        "kernel": "_scale_kernel",
        "what": "bf16, temperature",
        "types": "kept_ptr:*bf16 kept_max_ptr:*fp32 targets_ptr:*i64 tau_ptr:*fp32 stats_ptr:*fp32 g_ptr:*fp32 "
        "num_rows:i32 kept_width:i32",
        "constants": {"HAS_TAU": True, "WORDS": tile["WORDS"], "BLOCK": 2048},
        "options": {"num_warps": 8},
        "aligned": "kept_width",
        "instructions": (r"ex2\.approx", r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"),
    }
