"""Which implementation computes paged attention: ours, or FlashAttention's where it is installed and takes the shape.

Three generations are known, each a package of its own that reads the same block tables:

    2   `flash-attn`, module flash_attn                  blocks of a multiple of 256 tokens
    3   `flash_attn_3`, module flash_attn_interface      blocks of any size; written for Hopper
    4   `flash-attn-4`, module flash_attn.cute           blocks of any size; Hopper and Blackwell, by CuTe

All take fp16 and bf16. A generation is tried in the order of _ORDER, newest first but for Hopper, where 4 cannot split
a context over programs and 3 can: decoding few sequences needs that. All split contexts by how busy the batch keeps the
GPU, so their bits depend on the batch. Signatures as of flash-attention's commit 0251105a (2026-08).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from thyme.kernels.native import NATIVE
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref, paged_attention_triton

BACKENDS = ("auto", "triton", "flash_attn", "reference")
"""Auto is flash_attn where that can run, else `paged_attention`, which goes by device and dtype."""

PagedAttention = Callable[..., Tensor]
"""Called as `paged_attention` is, with max_query_len; `shared` only where `reads_shared_prefix`."""

_ORDER = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2,)}
"""Generations of FlashAttention that read paged caches on a GPU of this capability, the one to take first."""

_MODULES = {
    2: ("flash_attn", "flash_attn_with_kvcache", "flash-attn"),
    3: ("flash_attn_interface", "flash_attn_with_kvcache", "flash_attn_3"),
    4: ("flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4"),
}
"""Of each generation: the module, a function that it must have, the package. A module flash_attn may be there without
generation 2, since 4 lies inside of it."""

_BLOCK_OF_2 = 256


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """What computes attention over a cache."""

    name: str
    """What it is and of which version, for logs."""
    run: PagedAttention
    reads_shared_prefix: bool
    """Whether something is made of a SharedPrefix; elsewhere finding one is work for nothing."""
    is_native: bool = False
    """Whether it is the C++ that a NativeStep calls, which then does for it where the cache has no scales."""


def attention_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    *,
    batch_invariant: bool,
    fp8_cache: bool = False,
) -> AttentionBackend:
    """What computes attention over caches of this kind.

    Args:
        name: one of BACKENDS.
        device, dtype, block_size, head_dim: of the caches.
        batch_invariant: a sequence must have the same bits in any batch, which FlashAttention does not promise.
        fp8_cache: the caches are in 8 bits, with a scale for each head of a token, which FlashAttention does not read.

    Raises:
        ValueError: an unknown name, or one that cannot run here; the message says why and what to do.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return AttentionBackend("the reference, in torch", paged_attention_ref, False)
    on_gpu = device.type == "cuda"
    ours = "Triton, one order of sums for any batch" if batch_invariant else "Triton"
    if name == "triton":
        if not on_gpu and not triton.knobs.runtime.interpret:
            raise ValueError(f"attention 'triton' needs a GPU and the model is on {device}: use 'auto'")
        return AttentionBackend(ours, partial(paged_attention_triton, batch_invariant=batch_invariant), True)
    if fp8_cache:
        found, obstacle = None, "it reads no cache in fp8 with a scale a head; leave kv_dtype out"
    else:
        found, obstacle = _flash(device, dtype, block_size, head_dim, batch_invariant)
    if found is not None:
        return found
    if name == "flash_attn":
        raise ValueError(f"attention 'flash_attn' cannot run: {obstacle}, or use 'auto'")
    here = ours if on_gpu else "C++" if dtype in NATIVE else "the reference, in torch"
    run = partial(paged_attention, batch_invariant=batch_invariant)
    return AttentionBackend(here, run, on_gpu, is_native=here == "C++" and not fp8_cache)


def _flash(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, batch_invariant: bool
) -> tuple[AttentionBackend | None, str]:
    """The generation of FlashAttention to be used for such caches; or None, why there is none, and what would help."""
    if device.type != "cuda":
        return None, f"it needs a GPU and the model is on {device}; move it"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"it computes in float16 and bfloat16 and the model is in {dtype}; convert it"
    if batch_invariant:
        return None, "its bits depend on the batch and deterministic is set; unset it"
    capability = torch.cuda.get_device_capability(device)[0]
    generations = _ORDER.get(capability, (2,))
    obstacles = []
    for generation in generations:
        obstacle = _obstacle(generation, capability, block_size, head_dim)
        module, missing = _module(generation) if obstacle is None else (None, obstacle)
        if module is not None:
            version = getattr(module, "__version__", "of unknown version")
            name = f"FlashAttention {generation} ({version})"
            return AttentionBackend(name, partial(flash_paged_attention, generation=generation), False), ""
        obstacles.append(missing)
    return None, "; ".join(obstacles)


def _obstacle(generation: int, capability: int, block_size: int, head_dim: int) -> str | None:
    """Why a generation does not take such caches, and what would help; None: it does."""
    widest = 128 if generation == 4 and capability > 9 else 256
    if head_dim > widest or head_dim % 8 != 0:
        return f"{generation}: its heads are multiples of 8 up to {widest} and the model's are {head_dim}"
    if generation == 2 and block_size % _BLOCK_OF_2 != 0:
        return f"2: its blocks are multiples of {_BLOCK_OF_2} tokens and block_size is {block_size}; set {_BLOCK_OF_2}"
    return None


def _module(generation: int) -> tuple[ModuleType | None, str]:
    name, function, package = _MODULES[generation]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, f"{generation}: {package} is not installed; pip install {package}"
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return None, f"{generation}: {package} cannot be imported ({error}); reinstall it"
    if not hasattr(module, function):
        return None, f"{generation}: {package} is not installed; pip install {package}"
    return module, ""


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
    generation: int = 2,
) -> Tensor:
    """`paged_attention` by a generation of FlashAttention, which checks the arguments; without max_query_len its grid
    is as large as if one sequence had all new tokens."""
    flash: Any = importlib.import_module(_MODULES[generation][0])
    longest_query = len(q) if max_query_len is None else max_query_len
    longest = block_tables.shape[1] * k_cache.shape[1]
    common: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    out: Tensor
    if generation == 4:
        splits = 1 if torch.cuda.get_device_capability(q.device)[0] == 9 else 0  # 0: as many as keep the GPU busy
        out, _ = flash.flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=cu_seqlens_q,
            seqused_k=context_lens,
            max_seqlen_q=longest_query,
            max_seqlen_k=longest,
            page_table=block_tables,
            num_splits=splits,
            **common,
        )
    elif generation == 3:
        out = flash.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=context_lens,
            page_table=block_tables,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=longest_query,
            **common,
        )
    elif max_query_len == 1 and len(q) == len(context_lens):
        out = flash.flash_attn_with_kvcache(
            q[:, None], k_cache, v_cache, cache_seqlens=context_lens, block_table=block_tables, **common
        )[:, 0]
    else:
        out = flash.flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=longest_query,
            max_seqlen_k=longest,
            block_table=block_tables,
            **common,
        )
    return out
