"""The short way through a packed decoder: the modules' numbers to the bit, whatever the model has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from thyme.kernels import library
from thyme.kernels.native_step import NativeStep
from thyme.kernels.packed_product import has_products
from thyme.model import LoraConfig, Model, ModelConfig, PackedAttention, add_adapters, build
from thyme.model.decoder import Decoder
from thyme.model.fp8 import Fp8View
from thyme.model.packed import PackedView, ShortView, has_short_way, packs
from thyme.model.packed_decoder import PackedDecoder

KINDS = {
    "Qwen2": ("qwen2", dict(qkv_bias=True)),
    "Llama with biases": ("llama", dict(qkv_bias=False, o_bias=True, mlp_bias=True)),
    "Qwen3": ("qwen3", dict(qkv_bias=False, qk_norm=True)),
}


def made(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Model:
    """Every weight is something, biases and norms too."""
    name, options = KINDS[kind]
    model = build(
        ModelConfig(model_type=name, text=tiny.text_config(**options, **more), eos_token_ids=(2,)), seed=3, dtype=dtype
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@torch.inference_mode()
def both_ways(view: PackedView, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Hidden states by the short way, and module by module."""
    view.refresh()
    tokens = sum(lengths)
    ids = torch.arange(tokens) * 7 % 50
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    short = view.model(ids, positions, PackedAttention(lengths))
    with monkeypatch.context() as context:
        context.setattr(library, "watch", lambda name, run, args, kwargs: run(*args, **kwargs))
        return short, view.model(ids, positions, PackedAttention(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(1,), (3, 40, 1), (17,)])
def test_it_is_the_modules(
    kind: str, dtype: torch.dtype, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind_of_view in (PackedView, ShortView):
        if kind_of_view is PackedView and not packs(dtype):
            continue
        short, long = both_ways(kind_of_view(made(kind, dtype)), lengths, monkeypatch)
        assert torch.equal(short, long) and short.float().std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all are oneDNN's", "one in bfloat16 has odd inputs"])
def test_projections_that_are_not_ours(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor, or a shape, is one that our products are not written for."""
    if which.startswith("all"):
        monkeypatch.setattr("thyme.model.packed.has_products", lambda dtype: False)
    if not packs(dtype):
        pytest.skip("this processor multiplies no bfloat16")
    short, long = both_ways(PackedView(made("Qwen2", dtype, intermediate_size=81)), (3, 17), monkeypatch)
    assert torch.equal(short, long) and short.float().std() > 0.1


def test_it_goes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing above would prove anything. Norms of queries and keys, and what C++ does not compute, have none."""
    called = calls_of_layers(monkeypatch)
    for kind, kind_of_view in product(KINDS, (PackedView, ShortView)):
        view = kind_of_view(made(kind))
        assert isinstance(view.model.decoder, PackedDecoder) == has_short_way(made(kind)) == (kind != "Qwen3")
        called.clear()
        both_ways(view, (5,), monkeypatch)
        assert len(called) == 2 * (2 if kind == "Qwen3" else 1)
    wide, narrow = (made("Qwen2", dtype) for dtype in (torch.float64, torch.float16))
    for model in (wide, narrow, made("Qwen2").to("meta")):
        assert not has_short_way(model)
    assert type(Fp8View(narrow).model.decoder) is Decoder


def calls_of_layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    called: list[Any] = []
    forward: Callable[..., Any] = torch.nn.Module.__call__

    def watched(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__ == "DecoderLayer":
            called.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr("thyme.model.decoder.DecoderLayer.__call__", watched)
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Qwen2", "Llama with biases"])
@pytest.mark.parametrize("width", [56, 64], ids=["no whole panels", "gated in the product"])
def test_all_layers_in_one_call_are_the_modules(
    kind: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, then a token of each, with and without what watches: hidden states and caches to the bit."""
    if not has_products(dtype):
        pytest.skip("this processor has no such products")
    view = PackedView(made(kind, dtype, intermediate_size=width))
    view.refresh()
    text, lengths = view.model.config.text, torch.tensor([3, 40, 1])
    shape = (text.num_hidden_layers, 2, 12, 4, text.num_key_value_heads, text.head_dim)
    ours, theirs = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    tables = torch.tensor([[10] + [0] * 9, [*range(10)], [11] + [0] * 9], dtype=torch.int32)
    calls: list[int] = []
    run = NativeStep.run_layers
    monkeypatch.setattr(NativeStep, "run_layers", lambda *args, **named: calls.append(1) or run(*args, **named))
    for first, last in ((torch.zeros(3, dtype=torch.int64), lengths - 1), (lengths - 1, lengths)):
        counts = last - first
        positions = torch.cat([torch.arange(int(a), int(b)) for a, b in zip(first, last, strict=True)])
        rows = torch.repeat_interleave(torch.arange(3), counts)
        slots = tables[rows, positions // 4].long() * 4 + positions % 4
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
        ids, found = positions * 7 % 50, []
        for caches in (ours, theirs):
            step = NativeStep([*caches], slots, tables, last.int(), starts, scale=0.3)
            with torch.inference_mode(), monkeypatch.context() as context:
                if caches is theirs:
                    context.setattr(library, "watch", lambda name, run, args, kwargs: run(*args, **kwargs))
                found.append(view.model(ids, positions.expand(3, -1), step))
        assert torch.equal(*found) and torch.equal(ours, theirs) and found[0].float().std() > 0.1
    assert len(calls) == 2


def test_a_step_that_does_not_fit_writes_nothing() -> None:
    if not has_products(torch.float32):
        pytest.skip("this processor has no such products")
    view = PackedView(made("Qwen2"))
    view.refresh()
    text = view.model.config.text
    caches = torch.zeros(text.num_hidden_layers, 2, 3, 4, text.num_key_value_heads, text.head_dim)
    ids = torch.arange(2)
    good = (
        torch.tensor([0, 1]),
        torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([2]).int(),
        torch.tensor([0, 2]).int(),
    )

    def run(*placement: Tensor, caches: Any = caches) -> None:
        with torch.inference_mode():
            view.model(ids, ids.expand(3, -1), NativeStep([*caches], *placement, scale=0.3))

    for place, wrong, words in (
        (0, torch.tensor([0, 12]), r"slots\[1\] is 12, there are 12"),
        (1, torch.tensor([[3]]).int(), r"block_tables\[0\]\[0\] is 3, the cache has 3 blocks"),
        (2, torch.tensor([5]).int(), r"context_lens\[0\] is 5"),
        (3, torch.tensor([0, 1]).int(), "cu_seqlens_q must run from 0 to the 2 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*[wrong if i == place else part for i, part in enumerate(good)])
    with pytest.raises(ValueError, match="a cache must have the shape"):
        run(*good, caches=[caches[0], *(caches[1:, :, :2])])
    with pytest.raises(ValueError, match=r"shorter|argument"):
        run(*good, caches=caches[:1])
    assert not caches.any()
    run(*good)
    assert caches.any()


@pytest.mark.parametrize("kind_of_view", [PackedView, ShortView])
def test_adapters_and_new_weights_are_followed(kind_of_view: type[PackedView], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen2")
    view = kind_of_view(model)
    before, _ = both_ways(view, (9,), monkeypatch)
    norms = [
        model.decoder.norm,
        model.decoder.layers[0].input_layernorm,
        model.decoder.layers[1].post_attention_layernorm,
    ]
    for norm in norms:  # written, and replaced
        with torch.no_grad():
            norm.weight.mul_(1.5)
        after, long = both_ways(view, (9,), monkeypatch)
        assert torch.equal(after, long) and not torch.equal(after, before)
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 0.5)
        before, long = both_ways(view, (9,), monkeypatch)
        assert torch.equal(before, long) and not torch.equal(after, before)
    add_adapters(model, LoraConfig(rank=2))
    with torch.no_grad():
        for layer in model.decoder.layers:
            for linear in (layer.self_attn.qkv, layer.self_attn.o_proj, layer.mlp.gate_up, layer.mlp.down):
                linear.lora_b.normal_()
    after, long = both_ways(view, (9,), monkeypatch)
    assert torch.equal(after, long) and not torch.equal(after, before)


def test_what_nobody_says_has_changed_is_seen_once_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was written without its version: FSDP's, or a copy under inference mode."""
    model = made("Qwen2")
    view = PackedView(model)
    before, _ = both_ways(view, (9,), monkeypatch)
    model.decoder.norm.weight.data.mul_(2.0)
    view.outdate()
    after, long = both_ways(view, (9,), monkeypatch)
    assert torch.equal(after, long) and torch.allclose(after, 2 * before, rtol=1e-6)


def test_the_inputs_are_left_alone() -> None:
    """Embeddings and rotary tables are what they were, and a result is nobody else's."""
    view = PackedView(made("Qwen2"))
    view.refresh()
    x, positions = torch.randn(6, view.model.config.text.hidden_size), torch.arange(6).expand(3, -1)
    kept = x.clone()
    with torch.inference_mode():
        first = view.model.decoder(x, positions, PackedAttention((6,)))
        copy = first.clone()
        view.model.decoder(x.flip(0), positions, PackedAttention((6,)))
    assert torch.equal(x, kept) and torch.equal(first, copy)


def test_hooks_are_called() -> None:
    """Of the model's own modules, put there before or after the view was made, and no longer once they are gone."""
    model = made("Qwen2")
    seen: list[str] = []
    before = model.decoder.layers[0].register_forward_pre_hook(lambda module, given: seen.append("before"))
    view = ShortView(model)
    after = model.decoder.layers[1].mlp.register_forward_hook(lambda module, given, out: seen.append("after"))
    view.refresh()
    run = partial(view.model, torch.arange(5), torch.arange(5).expand(3, -1), PackedAttention((5,)))
    with torch.inference_mode():
        hooked = run()
        assert seen == ["before", "after"]
        before.remove()
        after.remove()
        assert torch.equal(run(), hooked) and len(seen) == 2
