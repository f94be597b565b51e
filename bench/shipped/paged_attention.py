"""What is compiled of kernels/paged_attention.py: decode and prefill with Qwen2.5-VL's groups of heads."""

from collections.abc import Iterator
from typing import Any

from thyme.kernels import paged_attention


def configurations() -> Iterator[dict[str, Any]]:
    for what, dtype, (tokens, seqs), group, dim in (
        ("decode, 7 heads a group, D 128", "bf16", (64, 64), 7, 128),
        ("decode, 8 heads a group, D 64", "fp16", (64, 64), 8, 64),
        ("prefill, 7 heads a group, D 128", "bf16", (2048, 4), 7, 128),
    ):
        yield {
            "kernel": "_attention_kernel",
            "what": what,
            "types": f"q_ptr:*{dtype} k_ptr:*{dtype} v_ptr:*{dtype} tables_ptr:*i32 context_ptr:*i32 cu_ptr:*i32 "
            f"out_ptr:*{dtype} scale_log2e:fp32 num_seqs:i32 q_stride:i64 q_head_stride:i64 block_stride:i64 "
            "slot_stride:i64 kv_head_stride:i64 table_stride:i64",
            "constants": {"BLOCK_SIZE": 16, "GROUP": group, "DIM": dim},
            "options": paged_attention._launch_config(tokens, seqs, group, dim),
            "aligned": "q_stride q_head_stride block_stride slot_stride kv_head_stride",
            "instructions": (r"mma", r"cp\.async"),
            "spot": dtype == "bf16" and tokens == seqs,
        }
