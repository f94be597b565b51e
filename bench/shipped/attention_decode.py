"""What is compiled of kernels/attention_decode.py: Qwen2.5-VL's heads, alone and after a shared prefix.

Rare: float32, and heads for which the tiles are smaller. Registers and shared memory leave room for three programs on
an SM (two where bits must not depend on the batch), each with a tile of keys and values, 32 KB, on its way.
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
MMA, WGMMA = (r"mma\.sync\S*\.(bf16|f16)", *RING), (r"wgmma\.mma_async\S*\.bf16", *RING)
COPIES = (r"cp\.async\.cg\.shared\.global [^;]*, 0x10",)


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, block_size, shared, invariant in (
        ("bf16", 2, 7, 128, 16, False, False),
        ("bf16", 2, 7, 128, 16, True, False),
        ("bf16", 2, 7, 128, 16, False, True),
        ("fp32", 4, 7, 128, 16, False, False),
        ("fp32", 4, 7, 128, 16, True, False),
        ("fp32", 4, 7, 128, 16, False, True),
        ("bf16", 2, 7, 128, 16, True, True),
        ("fp32", 4, 7, 128, 16, True, True),
        ("fp16", 2, 8, 64, 256, False, False),
        ("bf16", 2, 2, 256, 16, True, False),
        ("bf16", 2, 2, 256, 16, False, True),
    ):
        deep = itemsize == 2 and dim <= 128
        yield {
            "op": "paged_invariant" if invariant else OP,
            "kernel": "_decode_kernel",
            "what": f"{heads(dtype, group, dim, block_size)}{', shared prefix' * shared}"
            f"{', for any batch' * invariant}",
            "types": f"{CACHES.format(dtype)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} partial_ptr:*fp32 "
            f"stats_ptr:*fp32 scale_log2e:fp32 at_least:i32 {STRIDES}{' shared_ptr:*i32' * shared}",
            "constants": shape(group, dim, block_size)
            | {"FINEST": attention_tiles.FINEST, "SPLIT": attention_tiles.SPLIT, "HAS_SHARED": shared}
            | ({} if shared else {"shared_ptr": None}),
            **tiled("decode", group, dim, itemsize, invariant),
            "aligned": ALIGNED,
            "instructions": (WGMMA if invariant else MMA) if deep else COPIES,
            "spot": dtype == "bf16" and dim == 128 and not shared,
            "rare": dtype != "bf16" or dim == 256 or (shared and invariant),
        }


def heads(dtype: str, group: int, dim: int, block_size: int) -> str:
    return f"{dtype}, {group} heads of {dim}, blocks of {block_size}"


def shape(group: int, dim: int, block_size: int) -> dict[str, int]:
    return {"BLOCK_SIZE": block_size, "GROUP": group, "DIM": dim}


def tiled(kernel: str, group: int, dim: int, itemsize: int, invariant: bool) -> dict[str, Any]:
    """The launch, the scores a thread has of a tile (the rows of queries times the keys of one step), and the work: 64
    sequences of 4096 tokens, each with 4 kv heads, whose tiles have rows for more than the heads of a group."""
    tile = attention_tiles.launch_config(kernel, group, dim, itemsize, batch_invariant=invariant)
    tokens = 64 * 4_096
    return {
        "options": tile,
        "elements": tile["ROWS"] * tile["KEYS"] // (32 * tile["num_warps"]),
        "excused": () if itemsize == 2 and dim <= 128 else ("waits",),
        "work": {
            "shape": "64 x 4096 decoding",
            "elements": 4 * tile["ROWS"] * tokens,
            "num_bytes": 2 * 4 * tokens * dim * itemsize,
            "flops": 4 * tokens * 4 * group * dim if itemsize == 2 else 0,
        },
    }
