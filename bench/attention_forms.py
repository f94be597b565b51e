"""What bench/shipped says alike of the attention kernels: how Qwen2.5-VL's heads call them, and their work."""

from typing import Any

from thyme.kernels import attention_tiles

OP = "paged_attention"
STRIDES = "q_stride:i32 q_head_stride:i32 block_stride:i32 slot_stride:i32 kv_head_stride:i32 table_stride:i32"
ALIGNED = "q_stride q_head_stride block_stride slot_stride kv_head_stride"
COPIES = (r"cp\.async\.cg\.shared\.global [^;]*, 0x10",)
# Keys and values come through a ring of asynchronous 16-byte copies, of which one tile at least is on its way while
# another is multiplied: a wait for all of them would undo that.
RING = (*COPIES, r"cp\.async\.wait_group\s+(0x)?[1-9]")
MMA, WGMMA = (r"mma\.sync\S*\.(bf16|f16)", *RING), (r"wgmma\.mma_async\S*\.bf16", *RING)

KV_HEADS = 4
WORK = {
    "decode": ("64 x 4096 decoding", 64 * 4_096, 64 * 4_096),
    "prefix": ("8 x 8 after 3584", 8 * 3_584, 8 * 8 * 3_584),
    "prefill": ("a prompt of 8192", 8_192, 8_192**2 / 2),
}
"""By kernel: the shape that times are printed for, keys that are read, and pairs of a token and a key that it sees."""


def heads(dtype: str, group: int, dim: int, block_size: int) -> str:
    return f"{dtype}, {group} heads of {dim}, blocks of {block_size}"


NO_SCALES = {"k_scale_ptr": None, "v_scale_ptr": None}
FP8 = ", cache in fp8"
"""Of what is compiled for caches in 8 bits."""


def caches(dtype: str, is_fp8: bool) -> str:
    """Types of queries and caches."""
    if is_fp8:
        return f"q_ptr:*{dtype} k_ptr:*fp8e4nv v_ptr:*fp8e4nv tables_ptr:*i32 k_scale_ptr:*u8 v_scale_ptr:*u8"
    return f"q_ptr:*{dtype} k_ptr:*{dtype} v_ptr:*{dtype} tables_ptr:*i32"


def shape(group: int, dim: int, block_size: int, is_fp8: bool = False) -> dict[str, int | None]:
    return {"BLOCK_SIZE": block_size, "GROUP": group, "DIM": dim} | ({} if is_fp8 else NO_SCALES)


def tiled(kernel: str, group: int, dim: int, itemsize: int, invariant: bool, is_fp8: bool = False) -> dict[str, Any]:
    """The launch, the scores a thread has of a tile (the rows of queries times the keys of one step), and the work.

    A tile of decode and prefix has rows for more than the heads that share its keys; they are computed too.
    """
    tile = attention_tiles.launch_config(kernel, group, dim, itemsize, batch_invariant=invariant, is_fp8=is_fp8)
    said, keys, pairs = WORK[kernel]
    return {
        "options": tile,
        "elements": tile["ROWS"] * tile["KEYS"] // (32 * tile["num_warps"]),
        "excused": () if itemsize == 2 and dim <= 128 else ("waits",),
        "work": {
            "shape": said,
            "elements": KV_HEADS * (group * pairs if kernel == "prefill" else tile["ROWS"] * keys),
            "num_bytes": 2 * KV_HEADS * keys * (dim + 1 if is_fp8 else dim * itemsize),
            "flops": 4 * pairs * KV_HEADS * group * dim if itemsize == 2 else 0,
        },
    }
