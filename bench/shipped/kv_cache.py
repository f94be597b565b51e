"""What is compiled of kernels/kv_cache.py: the heads of Qwen2.5-VL-7B."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import kv_cache

TOKENS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, bias in (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False)):
        pointers = "qkv bias q k_cache v_cache" if bias else "qkv q k_cache v_cache"
        tile = kv_cache.launch_config(36, 64)
        yield {
            "kernel": "_mrope_kernel",
            "what": f"{dtype}, 28/4 heads of 128{', bias' * bias}",
            "types": " ".join(f"{name}_ptr:*{dtype}" for name in pointers.split())
            + " cos_ptr:*fp32 sin_ptr:*fp32 slot_ptr:*i64 stride:i32 head_stride:i32",
            "constants": {"QUERIES": 28, "KEYS": 4, "HALF": 64} | ({} if bias else {"bias_ptr": None}),
            "options": tile,
            "elements": 2 * tile["HEADS"] * tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{TOKENS} tokens",
                "elements": TOKENS * 36 * 128,
                "num_bytes": TOKENS * (2 * 36 * 128 * (2 if dtype == "bf16" else 4) + 8 * 64),
            },
            "aligned": "stride head_stride",
            "instructions": (WIDE_LOAD, WIDE_STORE),
            "spot": dtype == "bf16" and not bias,
            "rare": dtype == "fp32",
        }
