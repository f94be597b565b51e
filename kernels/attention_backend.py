"""Which implementation computes paged attention: ours, or flash-attn's where it is installed and takes the shape.

flash-attn 2 (Dao 2023; the package `flash-attn`) reads the same block tables: `flash_attn_with_kvcache` for decode,
`flash_attn_varlen_func` for chunked prefill. It takes fp16 and bf16, heads of up to 256, and blocks whose size is a
multiple of 256. It splits contexts by how busy the batch keeps the GPU, so its bits depend on the batch.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from thyme.kernels.paged_attention import paged_attention, paged_attention_ref, paged_attention_triton

BACKENDS = ("auto", "triton", "flash_attn", "reference")
"""Auto is flash_attn where that can run, else `paged_attention`, which goes by device and dtype."""

_FLASH_BLOCK = 256
_FLASH_MAX_DIM = 256

PagedAttention = Callable[..., Tensor]
"""Called as `paged_attention` is; `shared` only where `reads_shared_prefix`."""


def attention_backend(
    name: str, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, *, batch_invariant: bool
) -> PagedAttention:
    """The function that computes attention over caches of this kind.

    Args:
        name: one of BACKENDS.
        device, dtype, block_size, head_dim: of the caches.
        batch_invariant: a sequence must have the same bits in any batch, which flash-attn does not promise.

    Raises:
        ValueError: an unknown name, or one that cannot run here; the message says why and what to do.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return paged_attention_ref
    if name == "triton":
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(f"attention 'triton' needs a GPU and the model is on {device}: use 'auto'")
        return paged_attention_triton
    obstacle = _flash_obstacle(device, dtype, block_size, head_dim, batch_invariant)
    if obstacle is None:
        return flash_paged_attention
    if name == "flash_attn":
        raise ValueError(f"attention 'flash_attn' cannot run: {obstacle}, or use 'auto'")
    return paged_attention


def reads_shared_prefix(attend: PagedAttention, device: torch.device) -> bool:
    """Whether a backend makes something of a SharedPrefix there; elsewhere finding one is work for nothing."""
    return attend is paged_attention_triton or (attend is paged_attention and device.type == "cuda")


def _flash_obstacle(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, batch_invariant: bool
) -> str | None:
    """Why flash-attn cannot be used for such caches, and what would help; None: it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed; pip install flash-attn"
    if device.type != "cuda":
        return f"it needs a GPU and the model is on {device}; move it"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 and the model is in {dtype}; convert it"
    if block_size % _FLASH_BLOCK != 0:
        return f"its blocks are multiples of {_FLASH_BLOCK} tokens and block_size is {block_size}; set {_FLASH_BLOCK}"
    if head_dim > _FLASH_MAX_DIM or head_dim % 8 != 0:
        return f"its heads are multiples of 8 up to {_FLASH_MAX_DIM} and the model's are {head_dim}"
    if batch_invariant:
        return "its bits depend on the batch and deterministic is set; unset it"
    return None


def flash_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
) -> Tensor:
    """`paged_attention` by flash-attn, which checks the arguments; without max_query_len its grid is as large as if one
    sequence had all new tokens."""
    flash = importlib.import_module("flash_attn")
    num_tokens, num_seqs = len(q), len(context_lens)
    if max_query_len == 1 and num_tokens == num_seqs:
        decoded: Tensor = flash.flash_attn_with_kvcache(
            q[:, None],
            k_cache,
            v_cache,
            cache_seqlens=context_lens,
            block_table=block_tables,
            softmax_scale=scale,
            causal=True,
        )
        return decoded[:, 0]
    cu_seqlens_k = torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    out: Tensor = flash.flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=num_tokens if max_query_len is None else max_query_len,
        max_seqlen_k=block_tables.shape[1] * k_cache.shape[1],
        softmax_scale=scale,
        causal=True,
        block_table=block_tables,
    )
    return out
