"""What is compiled of kernels/paged_attention.py: decode, prefix, merge and prefill with Qwen2.5-VL's heads.

Rare: float32 decoding, and heads for which the tiles are smaller.
"""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import paged_attention

CACHES = "q_ptr:*{0} k_ptr:*{0} v_ptr:*{0} tables_ptr:*i32"
STRIDES = "q_stride:i32 q_head_stride:i32 block_stride:i32 slot_stride:i32 kv_head_stride:i32 table_stride:i32"
ALIGNED = "q_stride q_head_stride block_stride slot_stride kv_head_stride"
PARTIAL = "partial_ptr:*fp32 stats_ptr:*fp32"
SPLIT = {"SPLIT": paged_attention.SPLIT}
# Keys and values come through a ring of asynchronous 16-byte copies; prefill has the rows for warp-group products.
RING = (r"cp\.async\.cg\.shared\.global [^;]*, 0x10", r"cp\.async\.wait_group")
MMA, WGMMA = (r"mma\.sync\S*\.(bf16|f16)", *RING), (r"wgmma\.mma_async\S*\.bf16", *RING)


def configurations() -> Iterator[dict[str, Any]]:
    for dtype, itemsize, group, dim, block_size, shared in (
        ("bf16", 2, 7, 128, 16, False),
        ("bf16", 2, 7, 128, 16, True),
        ("fp32", 4, 7, 128, 16, False),
        ("fp32", 4, 7, 128, 16, True),
        ("fp16", 2, 8, 64, 256, False),
        ("bf16", 2, 2, 256, 16, True),
    ):
        yield {
            "kernel": "_decode_kernel",
            "what": f"{heads(dtype, group, dim, block_size)}{', shared prefix' * shared}",
            "types": f"{CACHES.format(dtype)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} {PARTIAL} scale_log2e:fp32 "
            f"{STRIDES}{' shared_ptr:*i32' * shared}",
            "constants": shape(group, dim, block_size)
            | SPLIT
            | {"HAS_SHARED": shared}
            | ({} if shared else {"shared_ptr": None}),
            **tiled("decode", group, dim, itemsize),
            "aligned": ALIGNED,
            "instructions": MMA if itemsize == 2 else RING,
            "spot": dtype == "bf16" and dim == 128 and not shared,
            "rare": dtype != "bf16" or dim == 256,
        }
    for dtype, itemsize, group, dim in (("bf16", 2, 7, 128), ("fp32", 4, 7, 128), ("bf16", 2, 2, 256)):
        yield {
            "kernel": "_prefix_kernel",
            "what": heads(dtype, group, dim, 16),
            "types": f"{CACHES.format(dtype)} cu_ptr:*i32 groups_ptr:*i32 prefix_ptr:*i32 shared_ptr:*i32 {PARTIAL} "
            f"scale_log2e:fp32 num_groups:i32 {STRIDES}",
            "constants": shape(group, dim, 16) | SPLIT,
            **tiled("prefix", group, dim, itemsize),
            "aligned": ALIGNED,
            "instructions": WGMMA if itemsize == 2 else RING,
            "rare": dim == 256 or dtype == "fp32",
        }
    for dtype in ("bf16", "fp32"):
        yield {
            "kernel": "_merge_kernel",
            "what": f"{dtype}, heads of 128",
            "types": f"context_ptr:*i32 cu_ptr:*i32 {PARTIAL} out_ptr:*{dtype} num_splits:i32",
            "constants": {"DIM": 128, **SPLIT},
            "options": {"DIM_PADDED": 128, "SPLITS": 16, "num_warps": 4},
            "instructions": (r"ld\.global\S*\.v[24]",),
            "rare": dtype == "fp32",
        }
    for dtype, itemsize, group, dim in (("bf16", 2, 7, 128), ("fp32", 4, 7, 128), ("bf16", 2, 2, 256)):
        yield {
            "kernel": "_attention_kernel",
            "what": f"prefill, {heads(dtype, group, dim, 16)}",
            "types": f"{CACHES.format(dtype)} context_ptr:*i32 cu_ptr:*i32 out_ptr:*{dtype} scale_log2e:fp32 "
            f"num_seqs:i32 {STRIDES}",
            "constants": shape(group, dim, 16),
            **tiled("prefill", group, dim, itemsize),
            "aligned": ALIGNED,
            "instructions": WGMMA if dtype == "bf16" else RING,
            "rare": dim == 256,
        }


def heads(dtype: str, group: int, dim: int, block_size: int) -> str:
    return f"{dtype}, {group} heads of {dim}, blocks of {block_size}"


def shape(group: int, dim: int, block_size: int) -> dict[str, int]:
    return {"BLOCK_SIZE": block_size, "GROUP": group, "DIM": dim}


def tiled(kernel: str, group: int, dim: int, itemsize: int) -> dict[str, Any]:
    """The launch, the scores a thread has of a tile (the rows of queries times the keys of one step), and the work, of
    64 sequences of 4096 tokens, of 8 groups of 8 after a prefix of 3584, and of a prompt of 8192, each with 4 kv heads.

    A tile's rows are filled up: decode has 16 for the heads of a group, the others whole groups of heads.
    """
    tile = paged_attention._launch_config(kernel, group, dim, itemsize)
    rows, tokens, shape = {
        "decode": (tile["ROWS"], 64 * 4_096, "64 x 4096 decoding"),
        "prefix": (tile["ROWS"], 8 * 3_584, "8 x 8 after 3584"),
        "prefill": (group * 8_192 / 2, 8_192, "a prompt of 8192"),
    }[kernel]
    pairs = {"decode": 64 * 4_096, "prefix": 64 * 3_584, "prefill": 8_192**2 / 2}[kernel]
    work = {
        "shape": shape,
        "elements": 4 * rows * tokens,
        "num_bytes": 2 * 4 * tokens * dim * itemsize,
        "flops": 4 * pairs * 4 * group * dim if itemsize == 2 else 0,
    }
    elements = tile["ROWS"] * tile["KEYS"] // (32 * tile["num_warps"])
    return {"options": tile, "elements": elements, "work": work, "excused": ("waits",)}
