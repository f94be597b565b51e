"""What is compiled of kernels/attention_prefill.py: Qwen2.5-VL's heads, with one sum and with one a split.

Rare: float32, and heads for which the tiles are smaller.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import attention_tiles

OP = "paged_attention"
CACHES = "q_ptr:*{0} k_ptr:*{0} v_ptr:*{0} tables_ptr:*i32"
STRIDES = "q_stride:i32 q_head_stride:i32 block_stride:i32 slot_stride:i32 kv_head_stride:i32 table_stride:i32"
ALIGNED = "q_stride q_head_stride block_stride slot_stride kv_head_stride"
# Keys and values come through a ring of asynchronous 16-byte copies, of which one tile at least is on its way while
# another is multiplied: a wait for all of them would undo that.
RING = (r"cp\.async\.cg\.shared\.global [^;]*, 0x10", r"cp\.async\.wait_group\s+(0x)?[1-9]")
WGMMA = (r"wgmma\.mma_async\S*\.bf16", *RING)


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, invariant in (
        ("bf16", 2, 7, 128, False),
        ("bf16", 2, 7, 128, True),
        ("fp32", 4, 7, 128, False),
        ("fp32", 4, 7, 128, True),
        ("bf16", 2, 2, 256, False),
        ("bf16", 2, 2, 256, True),
    ):
        yield {
            "op": "paged_invariant" if invariant else OP,
            "kernel": "_prefill_kernel",
            "what": f"{heads(dtype, group, dim, 16)}{', for any batch' * invariant}",
            "types": f"{CACHES.format(dtype)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} scale_log2e:fp32 "
            f"num_seqs:i32 {STRIDES}",
            "constants": shape(group, dim, 16) | {"SPLIT": attention_tiles.SPLIT if invariant else 0},
            **tiled("prefill", group, dim, itemsize, invariant),
            "aligned": ALIGNED,
            "instructions": WGMMA if dtype == "bf16" and dim == 128 else (r"cp\.async\.cg",),
            "rare": dim == 256 or dtype == "fp32",
        }


def heads(dtype: str, group: int, dim: int, block_size: int) -> str:
    return f"{dtype}, {group} heads of {dim}, blocks of {block_size}"


def shape(group: int, dim: int, block_size: int) -> dict[str, int]:
    return {"BLOCK_SIZE": block_size, "GROUP": group, "DIM": dim}


def tiled(kernel: str, group: int, dim: int, itemsize: int, invariant: bool) -> dict[str, Any]:
    """The launch, the scores a thread has of a tile (the rows of queries times the keys of one step), and the work: a
    prompt of 8192 with 4 kv heads."""
    tile = attention_tiles.launch_config(kernel, group, dim, itemsize, batch_invariant=invariant)
    tokens = 8_192
    return {
        "options": tile,
        "elements": tile["ROWS"] * tile["KEYS"] // (32 * tile["num_warps"]),
        "excused": () if itemsize == 2 and dim <= 128 else ("waits",),
        "work": {
            "shape": "a prompt of 8192",
            "elements": 4 * (group * tokens / 2) * tokens,
            "num_bytes": 2 * 4 * tokens * dim * itemsize,
            "flops": 4 * tokens**2 / 2 * 4 * group * dim if itemsize == 2 else 0,
        },
    }
