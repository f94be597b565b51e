"""Which backend is chosen, and what each FlashAttention is asked: a stand-in checks that and answers by the reference.

The stand-ins have the parameters of the real functions that are used, by name, as of flash-attention 0251105a.
"""

import sys
from functools import partial
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import triton
from torch import Tensor

from thyme.engine.config import AttentionName
from thyme.kernels.attention_backend import (
    BACKENDS,
    PagedAttention,
    attention_backend,
    flash_paged_attention,
)
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref, paged_attention_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FITS = dict(device=GPU, dtype=torch.bfloat16, block_size=256, head_dim=128, batch_invariant=False)
Calls = list[str]


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> None:
    assert q.dtype == k_cache.dtype == v_cache.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == table.stride(-1) == 1
    assert k_cache.shape == v_cache.shape
    assert q.shape[-1] == k_cache.shape[3]
    assert table.dtype == torch.int32


class Flash2(ModuleType):
    __version__ = "2.8.3"

    def __init__(self, calls: Calls) -> None:
        super().__init__("flash_attn")
        self.calls = calls

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
        self.calls.append("2 kvcache")
        _check(q, k_cache, v_cache, block_table)
        assert k_cache.shape[1] % 256 == 0
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
        self.calls.append("2 varlen")
        _check(q, k, v, block_table)
        assert k.shape[1] % 256 == 0
        assert q.dim() == 3
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
        assert cu_seqlens_k[0] == 0
        lengths = cu_seqlens_k.diff()
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= lengths.max()
        return paged_attention_ref(q, k, v, block_table, lengths, cu_seqlens_q, scale=softmax_scale)


class Flash3(ModuleType):
    __version__ = "3.0.0"

    def __init__(self, calls: Calls) -> None:
        super().__init__("flash_attn_interface")
        self.calls = calls

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: None = None,
        v: None = None,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        """Packed queries: [total, heads, dim] with cu_seqlens_q."""
        self.calls.append("3 kvcache")
        _check(q, k_cache, v_cache, page_table)
        assert causal
        assert q.dim() == 3
        assert cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        return paged_attention_ref(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, scale=softmax_scale)


class Flash4(ModuleType):
    __version__ = "4.0.0"

    def __init__(self, calls: Calls) -> None:
        super().__init__("flash_attn.cute")
        self.calls = calls

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: None = None,
        *,
        cu_seqlens_q: Tensor,
        seqused_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        page_table: Tensor,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> tuple[Tensor, None]:
        """Pages exclude cu_seqlens_k; on Hopper a context cannot be split."""
        self.calls.append("4 varlen")
        _check(q, k, v, page_table)
        assert causal
        assert cu_seqlens_q.dtype == seqused_k.dtype == torch.int32
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= seqused_k.max()
        assert num_splits == (1 if torch.cuda.get_device_capability()[0] == 9 else 0)
        return paged_attention_ref(q, k, v, page_table, seqused_k, cu_seqlens_q, scale=softmax_scale), None


MODULES = {2: ("flash_attn", Flash2), 3: ("flash_attn_interface", Flash3), 4: ("flash_attn.cute", Flash4)}


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the card's capability and which generations are installed; without a call: Hopper, and none."""

    def install(capability: int = 9, *generations: int) -> Calls:
        calls: Calls = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if 4 in generations else None)
        for generation, (name, stand_in) in MODULES.items():
            if generation in generations or name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, stand_in(calls) if generation in generations else None)
        return calls

    install()
    return install


def problem(queries: list[int], contexts: list[int], block_size: int = 256) -> dict[str, Tensor]:
    k, v = torch.randn(2, 5, block_size, 2, 16).half()
    return {
        "q": torch.randn(sum(queries), 4, 16).half(),
        "k_cache": k,
        "v_cache": v,
        "block_tables": torch.tensor([[3, 1], [0, 4], [2, 2]], dtype=torch.int32)[: len(contexts)],
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    }


def _of(run: PagedAttention) -> Any:
    """(function, generation or whether batch-invariant) of what was chosen."""
    return (run.func, *run.keywords.values()) if isinstance(run, partial) else run


# queries, contexts, what the host knows, which function of generation 2
CALLS = [
    ([1, 1, 1], [1, 256, 300], 1, "2 kvcache"),
    ([1, 1, 1], [1, 256, 300], None, "2 varlen"),  # the host does not know that it is decode
    ([7, 1, 20], [7, 257, 300], 20, "2 varlen"),
    ([1, 0, 1], [9, 257, 300], 1, "2 varlen"),  # not one token each, though none has two
    ([5], [40], None, "2 varlen"),
]


@pytest.mark.parametrize(("queries", "contexts", "hint", "entry"), CALLS)
@pytest.mark.parametrize("generation", MODULES)
def test_each_generation_is_asked_for_the_same(
    card: Any, generation: int, queries: list[int], contexts: list[int], hint: int | None, entry: str
) -> None:
    calls = card(9 if generation < 4 else 10, generation)
    args = problem(queries, contexts)
    out = flash_paged_attention(**args, scale=0.3, max_query_len=hint, generation=generation)
    assert calls == [{2: entry, 3: "3 kvcache", 4: "4 varlen"}[generation]]
    torch.testing.assert_close(out, paged_attention_ref(**args, scale=0.3), atol=0, rtol=0)


def test_generation_4_does_not_split_on_hopper(card: Any) -> None:
    assert card(9, 4) == []
    flash_paged_attention(**problem([1], [300]), scale=0.3, max_query_len=1, generation=4)


# capability, generations installed, which is chosen
CHOICES = [
    (9, (2, 3, 4), 3),
    (9, (2, 4), 4),
    (9, (2,), 2),
    (10, (2, 3, 4), 4),
    (10, (2, 3), 2),
    (8, (2, 3, 4), 2),
    (12, (2, 4), 2),
    (11, (4,), 4),
]


@pytest.mark.parametrize(("capability", "installed", "chosen"), CHOICES)
def test_the_best_generation_that_reads_pages_on_the_card_is_chosen(
    card: Any, capability: int, installed: tuple[int, ...], chosen: int
) -> None:
    card(capability, *installed)
    for name in ("auto", "flash_attn"):
        backend = attention_backend(name, **FITS)
        assert _of(backend.run) == (flash_paged_attention, chosen)
        assert backend.name == f"FlashAttention {chosen} ({MODULES[chosen][1].__version__})"
        assert not backend.reads_shared_prefix
    assert _of(attention_backend("triton", **FITS).run) == (paged_attention_triton, False)
    assert attention_backend("reference", **FITS).run is paged_attention_ref


def test_blocks_of_16_are_read_by_the_newer_ones(card: Any) -> None:
    card(9, 2, 3)
    backend = attention_backend("auto", **FITS | {"block_size": 16})
    assert _of(backend.run) == (flash_paged_attention, 3)
    args = problem([1, 4], [9, 20], block_size=16)
    torch.testing.assert_close(backend.run(**args, scale=0.3), paged_attention_ref(**args, scale=0.3))


REFUSED = [
    ({"block_size": 16}, "2: its blocks are multiples of 256 tokens and block_size is 16; set 256"),
    ({"dtype": torch.float32}, "it computes in float16 and bfloat16 and the model is in torch.float32"),
    ({"head_dim": 264}, "2: its heads are multiples of 8 up to 256 and the model's are 264"),
    ({"head_dim": 84}, "2: its heads are multiples of 8 up to 256 and the model's are 84"),
    ({"device": CPU}, "it needs a GPU and the model is on cpu"),
    ({"batch_invariant": True}, "its bits depend on the batch and deterministic is set"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_flash_attn_does_not_take(card: Any, change: dict, why: str) -> None:
    card(12, 2)
    invariant = change.get("batch_invariant", False)
    assert _of(attention_backend("auto", **FITS | change).run) == (paged_attention, invariant)
    with pytest.raises(ValueError, match=f"attention 'flash_attn' cannot run: {why}.* or use 'auto'"):
        attention_backend("flash_attn", **FITS | change)


def test_wide_heads_are_beyond_generation_4_on_blackwell(card: Any) -> None:
    card(10, 4)
    with pytest.raises(ValueError, match="4: its heads are multiples of 8 up to 128 and the model's are 192"):
        attention_backend("flash_attn", **FITS | {"head_dim": 192})
    card(9, 4)
    assert _of(attention_backend("flash_attn", **FITS | {"head_dim": 192}).run) == (flash_paged_attention, 4)


def test_the_choice_without_flash_attn() -> None:
    assert _of(attention_backend("auto", **FITS).run) == (paged_attention, False)
    with pytest.raises(ValueError, match="3: flash_attn_3 is not installed; pip install flash_attn_3; 4: flash-attn-4"):
        attention_backend("flash_attn", **FITS)


def test_generation_4_alone_is_not_generation_2(card: Any) -> None:
    """It makes a package flash_attn that has nothing of its own."""
    card(8, 4)
    with pytest.raises(ValueError, match="2: flash-attn is not installed"):
        attention_backend("flash_attn", **FITS)


def test_one_that_was_built_for_another_torch_is_named(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "flash_attn":
                raise ImportError("undefined symbol: _ZN3c10")

    card(8)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"2: flash-attn cannot be imported \(undefined symbol: _ZN3c10\)"):
        attention_backend("flash_attn", **FITS)
    assert _of(attention_backend("auto", **FITS).run) == (paged_attention, False)


def test_triton_without_a_gpu_is_the_interpreter_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = FITS | {"device": CPU, "batch_invariant": True}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert _of(attention_backend("triton", **on_cpu).run) == (paged_attention_triton, True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="attention 'triton' needs a GPU and the model is on cpu: use 'auto'"):
        attention_backend("triton", **on_cpu)


def test_a_shared_prefix_is_found_for_those_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    on_cpu = FITS | {"device": CPU}
    assert attention_backend("auto", **FITS).reads_shared_prefix
    assert attention_backend("triton", **FITS).reads_shared_prefix
    assert attention_backend("triton", **on_cpu).reads_shared_prefix
    assert not attention_backend("auto", **on_cpu).reads_shared_prefix
    assert not attention_backend("reference", **FITS).reads_shared_prefix


def test_each_says_what_it_is() -> None:
    names = {name: attention_backend(name, **FITS).name for name in ("auto", "triton", "reference")}
    assert names == {"auto": "Triton", "triton": "Triton", "reference": "the reference, in torch"}
    assert attention_backend("auto", **FITS | {"device": CPU, "dtype": torch.float32}).name == "C++"
    assert attention_backend("auto", **FITS | {"batch_invariant": True}).name.startswith("Triton, one order")


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of auto, triton, flash_attn, reference, got 'xformers'"):
        attention_backend("xformers", **FITS)


def test_the_engine_knows_the_same_names() -> None:
    assert get_args(AttentionName) == BACKENDS
