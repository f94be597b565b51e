"""What is compiled of kernels/kv_cache.py: the heads of Qwen2.5-VL-7B."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import kv_cache

TOKENS = 8_192
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v[24]", r"st\.global\S*\.v[24]"


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, bias, is_fp8 in (
        ("bf16", True, False),
        ("bf16", False, False),
        ("bf16", False, True),
        ("fp32", True, False),
        ("fp32", False, False),
    ):
        pointers = "qkv bias q" if bias else "qkv q"
        stored = "fp8e4nv" if is_fp8 else dtype
        absent = ({} if bias else {"bias_ptr": None}) | ({} if is_fp8 else {"k_scale_ptr": None, "v_scale_ptr": None})
        tile = kv_cache.launch_config(36, 64)
        yield {
            "kernel": "_mrope_kernel",
            "what": f"{dtype}, 28/4 heads of 128{', bias' * bias}{', cache in fp8' * is_fp8}",
            "types": " ".join(f"{name}_ptr:*{dtype}" for name in pointers.split())
            + f" k_cache_ptr:*{stored} v_cache_ptr:*{stored}{' k_scale_ptr:*u8 v_scale_ptr:*u8' * is_fp8}"
            + " cos_ptr:*fp32 sin_ptr:*fp32 slot_ptr:*i64 stride:i32 head_stride:i32",
            "constants": {"QUERIES": 28, "KEYS": 4, "HALF": 64} | absent,
            "options": tile,
            "elements": 2 * tile["HEADS"] * tile["BLOCK"] // (32 * tile["num_warps"]),
            "work": {
                "shape": f"{TOKENS} tokens",
                "elements": TOKENS * 36 * 128,
                "num_bytes": TOKENS * (2 * 36 * 128 * (2 if dtype == "bf16" else 4) + 8 * 64),
            },
            "aligned": "stride head_stride",
            "instructions": (WIDE_LOAD, WIDE_STORE),
            "spot": dtype == "bf16" and not bias and not is_fp8,
            "rare": dtype == "fp32",
        }
