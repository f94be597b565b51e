"""Which backend is chosen, and what flash-attn is asked: a stand-in checks that and answers by the reference."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import get_args

import pytest
import torch
import triton
from torch import Tensor

from thyme.engine.config import AttentionName
from thyme.kernels.attention_backend import (
    BACKENDS,
    attention_backend,
    flash_paged_attention,
    reads_shared_prefix,
)
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref, paged_attention_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FITS = dict(device=GPU, dtype=torch.bfloat16, block_size=256, head_dim=128, batch_invariant=False)


class FakeFlash(ModuleType):
    """The two functions of flash-attn 2 that are used, by its documented contract."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.__spec__ = ModuleSpec("flash_attn", None)
        self.called: list[str] = []

    def _check(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
        assert q.dtype == k_cache.dtype == v_cache.dtype
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == block_table.stride(-1) == 1
        assert k_cache.shape == v_cache.shape
        assert k_cache.shape[1] % 256 == 0
        assert q.shape[-1] == k_cache.shape[3]
        assert block_table.dtype == torch.int32

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        self.called.append("kvcache")
        self._check(q, k_cache, v_cache, block_table)
        num_seqs, length, heads, dim = q.shape
        assert causal
        assert cache_seqlens.dtype == torch.int32
        assert len(cache_seqlens) == len(block_table) == num_seqs
        cu = torch.arange(num_seqs + 1, dtype=torch.int32) * length
        out = paged_attention_ref(
            q.reshape(-1, heads, dim), k_cache, v_cache, block_table, cache_seqlens, cu, scale=softmax_scale
        )
        return out.view(q.shape)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        block_table: Tensor,
    ) -> Tensor:
        self.called.append("varlen")
        self._check(q, k, v, block_table)
        assert q.dim() == 3
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
        assert cu_seqlens_k[0] == 0
        lengths = cu_seqlens_k.diff()
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= lengths.max()
        return paged_attention_ref(q, k, v, block_table, lengths, cu_seqlens_q, scale=softmax_scale)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    fake = FakeFlash()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    return fake


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is installed, it is not found."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def problem(queries: list[int], contexts: list[int]) -> dict[str, Tensor]:
    k, v = torch.randn(2, 5, 256, 2, 16).half()
    return {
        "q": torch.randn(sum(queries), 4, 16).half(),
        "k_cache": k,
        "v_cache": v,
        "block_tables": torch.tensor([[3, 1], [0, 4], [2, 2]], dtype=torch.int32)[: len(contexts)],
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("queries", "contexts", "hint", "entry"),
    [
        ([1, 1, 1], [1, 256, 300], 1, "kvcache"),
        ([1, 1, 1], [1, 256, 300], None, "varlen"),  # the host does not know that it is decode
        ([7, 1, 20], [7, 257, 300], 20, "varlen"),
        ([1, 0, 1], [9, 257, 300], 1, "varlen"),  # not one token each, though none has two
        ([5], [40], None, "varlen"),
    ],
)
def test_flash_attn_is_asked_for_the_same(
    flash: FakeFlash, queries: list[int], contexts: list[int], hint: int | None, entry: str
) -> None:
    args = problem(queries, contexts)
    out = flash_paged_attention(**args, scale=0.3, max_query_len=hint)
    assert flash.called == [entry]
    torch.testing.assert_close(out, paged_attention_ref(**args, scale=0.3), atol=0, rtol=0)


def test_the_choice_with_flash_attn(flash: FakeFlash) -> None:
    assert attention_backend("auto", **FITS) is flash_paged_attention
    assert attention_backend("flash_attn", **FITS) is flash_paged_attention
    assert attention_backend("triton", **FITS) is paged_attention_triton
    assert attention_backend("reference", **FITS) is paged_attention_ref


REFUSED = [
    ({"block_size": 16}, "its blocks are multiples of 256 tokens and block_size is 16; set 256"),
    ({"dtype": torch.float32}, "it computes in float16 and bfloat16 and the model is in torch.float32"),
    ({"head_dim": 264}, "its heads are multiples of 8 up to 256 and the model's are 264"),
    ({"head_dim": 84}, "its heads are multiples of 8 up to 256 and the model's are 84"),
    ({"device": CPU}, "it needs a GPU and the model is on cpu"),
    ({"batch_invariant": True}, "its bits depend on the batch and deterministic is set"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_flash_attn_does_not_take(flash: FakeFlash, change: dict, why: str) -> None:
    assert attention_backend("auto", **FITS | change) is paged_attention
    with pytest.raises(ValueError, match=f"attention 'flash_attn' cannot run: {why}.* or use 'auto'"):
        attention_backend("flash_attn", **FITS | change)


@pytest.mark.usefixtures("no_flash")
def test_the_choice_without_flash_attn() -> None:
    assert attention_backend("auto", **FITS) is paged_attention
    with pytest.raises(ValueError, match="flash-attn is not installed; pip install flash-attn, or use 'auto'"):
        attention_backend("flash_attn", **FITS)


def test_triton_without_a_gpu_is_the_interpreter_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = FITS | {"device": CPU}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert attention_backend("triton", **on_cpu) is paged_attention_triton
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="attention 'triton' needs a GPU and the model is on cpu: use 'auto'"):
        attention_backend("triton", **on_cpu)


def test_a_shared_prefix_is_found_for_those_that_read_it() -> None:
    assert reads_shared_prefix(paged_attention, GPU)
    assert reads_shared_prefix(paged_attention_triton, GPU) and reads_shared_prefix(paged_attention_triton, CPU)
    assert not reads_shared_prefix(paged_attention, CPU)
    assert not reads_shared_prefix(paged_attention_ref, GPU)
    assert not reads_shared_prefix(flash_paged_attention, GPU)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of auto, triton, flash_attn, reference, got 'xformers'"):
        attention_backend("xformers", **FITS)


def test_the_engine_knows_the_same_names() -> None:
    assert get_args(AttentionName) == BACKENDS
