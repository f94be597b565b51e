"""The decoder's layers on a CPU as one loop over products and C++, for a model that is run and not trained.

The same calls on the same numbers as the modules make (decoder.py): equal to the bit. What is left out is what lies
between them: a step of 64 tokens of a small model spends as long in Python's calls of modules, checks and views as in
attention. Where all projections are packed and attention is a NativeStep, C++ has the loop; else arrays are made once a
step, and a layer is four products and five calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thyme.kernels import library
from thyme.kernels.native import array_of, native
from thyme.kernels.native_step import NativeStep
from thyme.model.attention import Attention
from thyme.model.decoder import Decoder, DecoderLayer
from thyme.model.layers import RMSNorm


class CopiedNorm:
    """The weight of a norm as C++ reads it: a copy, since an array of a tensor's own memory would fix its size for
    good, and FSDP frees and fills its weights."""

    def __init__(self, source: RMSNorm) -> None:
        self.eps = source.eps
        self.weight: Any = None
        self._source = source._parameters  # the dict, not the tensor: what training puts there is seen
        self._made_from: tuple[int, int] | None = None

    def refresh(self) -> None:
        """Copies the weight where there is no copy, or where it was written or replaced since."""
        weight = self._source["weight"]
        assert weight is not None
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if state != self._made_from:
            self.weight, self._made_from = array_of(weight.detach().clone()), state

    @property
    def arrays(self) -> tuple[Any, float]:
        """As C++ takes it."""
        return self.weight, self.eps

    def outdate(self) -> None:
        """Whatever the weight says of itself, it has changed: the next `refresh` makes the copy anew."""
        self.weight = self._made_from = None


class _Layer(NamedTuple):
    input_norm: CopiedNorm
    qkv: nn.Module
    out: nn.Module
    mlp_norm: CopiedNorm
    gate_up: nn.Module
    down: nn.Module


class PackedDecoder(Decoder):
    """A view of a decoder: its modules, and another way through them.

    Args:
        decoder: on a CPU, in float32 or bfloat16, without norms of queries and keys; its projections may have been
            replaced by what packs them. Where a module has hooks all are called one by one, and so are its hooks.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.__dict__.update(vars(decoder))
        self.norms: list[CopiedNorm] = []
        """To be refreshed before each step."""
        self._flat: list[_Layer] = []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            attention, mlp = layer.self_attn, layer.mlp
            first, second = CopiedNorm(layer.input_layernorm), CopiedNorm(layer.post_attention_layernorm)
            self._flat.append(_Layer(first, attention.qkv, attention.o_proj, second, mlp.gate_up, mlp.down))
            self.norms += [first, second]
        self.norms.append(CopiedNorm(decoder.norm))
        self._hooks = [hooks for one in decoder.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]

    def forward(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """As Decoder's."""
        if torch.is_grad_enabled() or library.watch is not None or any(self._hooks):  # what is watched goes op by op
            return super().forward(x, positions, attention)
        cos, sin = self.rotary_tables(positions)
        if isinstance(attention, NativeStep) and (layers := self._arrays()):
            shape = self.config.num_attention_heads, self.config.intermediate_size
            return attention.run_layers(x, cos, sin, layers, self.norms[-1].arrays, *shape)
        threads, heads = torch.get_num_threads(), self.config.num_attention_heads
        keys, dim = self.config.num_key_value_heads, self.config.head_dim
        rmsnorm, swiglu = native("rmsnorm", x.dtype), native("swiglu", x.dtype)
        width = self.config.intermediate_size
        normed, active = torch.empty_like(x), x.new_empty(len(x), width)
        to_normed, to_active = array_of(normed), array_of(active)
        stream, other = array_of(x.contiguous()), array_of(torch.empty_like(x))
        spare, delta = array_of(torch.empty_like(x)), None  # x stays as it is

        def normalize(norm: CopiedNorm) -> None:
            nonlocal stream, other, spare
            if delta is None:
                rmsnorm(stream, None, norm.weight, norm.eps, to_normed, None, None, threads)
                return
            rmsnorm(array_of(delta), stream, norm.weight, norm.eps, to_normed, other, None, threads)
            stream, other, spare = other, spare, other

        for number, layer in enumerate(self._flat):
            normalize(layer.input_norm)
            qkv = layer.qkv.forward(normed).view(len(x), heads + 2 * keys, dim)
            delta = layer.out.forward(attention(number, qkv, keys, cos, sin).flatten(1))
            normalize(layer.mlp_norm)
            both = array_of(layer.gate_up.forward(normed))
            swiglu(both[:, :width], both[:, width:], to_active, threads)
            delta = layer.down.forward(active)
        normalize(self.norms[-1])
        return normed

    def _arrays(self) -> list[list[Any]]:
        """Of each layer, as NativeStep takes them; none where a projection is not packed for C++."""
        layers = [[getattr(part, "arrays", None) for part in layer] for layer in self._flat]
        return layers if all(None not in layer for layer in layers) else []
