"""A model as the engine runs it on a CPU: the same modules, with each projection's weight also held as its products
read it, and a short way through the decoder (packed_decoder.py).

`F.linear` rearranges the weight in every call. Rearranged once for each version of the weights, for our own product
(kernels/packed_product.py) or, on processors that it is not written for, for oneDNN's, a product takes a half to a
quarter of the time (bench/bench_engine.py). It is summed in another order than `F.linear`'s: equal up to rounding, not
to the bit.

A packed weight is a copy that follows its source. The view owns it, nobody else sees it, and `PackedView.refresh` makes
it anew once the source was written or replaced. All else in the view (norms, embedding, adapters, biases) is the
model's own.

Such products are so fast that the memory of their results counts: so the first view of a process has the heap keep what
is freed (`thyme.heap`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thyme.heap import keep_freed_memory
from thyme.kernels.native import NATIVE
from thyme.kernels.packed_product import PackedProjection, has_products
from thyme.kernels.packed_product import packed_nbytes as nbytes_of
from thyme.model.decoder import Decoder
from thyme.model.lora import LoraLinear
from thyme.model.model import Model
from thyme.model.packed_decoder import CopiedNorm, PackedDecoder


class _OneDnnProjection:
    """A PackedProjection for processors that ours is not written for."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.nbytes = weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        return out


class PackedLinear(nn.Module):
    """x W^T + b, with packed copies of W [out, in] and b [out].

    Args:
        source: a projection; or an embedding, for the LM head that is tied to it.
        dtype: of the product; None: the weight's.
    """

    def __init__(self, source: nn.Linear | nn.Embedding, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype or source.weight.dtype
        self._source = source._parameters  # the dict, not the tensors: what training puts there is seen
        self._packed: Any = None
        self._made_from: Any = None

    @property
    def weight(self) -> Tensor:
        """The source's, [out, in]."""
        weight = self._source["weight"]
        assert weight is not None
        return weight

    def refresh(self) -> None:
        """Packs weight and bias where there is no copy, or where one was written or replaced since."""
        state = [_state(part) for part in (self._source["weight"], self._source.get("bias"))]
        if state != self._made_from:
            self._pack(self.weight.detach())
            self._made_from = state

    @torch.inference_mode()
    def _pack(self, weight: Tensor) -> None:
        self._packed = None  # first, so that there are never two
        bias, kind = self._source.get("bias"), PackedProjection if _is_ours(weight, self.dtype) else _OneDnnProjection
        self._packed = kind(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def outdate(self) -> None:
        """Whatever the weight says of itself, it has changed: the next `refresh` makes the copy anew."""
        self.free()

    def free(self) -> None:
        """Gives the memory of the copy back, until `refresh`."""
        self._packed = self._made_from = None

    @property
    def nbytes(self) -> int:
        """Of the weight's copy, where there is one."""
        return 0 if self._packed is None else self._packed.nbytes

    @property
    def arrays(self) -> Any:
        """What C++ runs a layer with (see NativeStep); None: the product is another's."""
        return self._packed.arrays if isinstance(self._packed, PackedProjection) else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if self._packed is None:
            return F.linear(x, self.weight.to(self.dtype), self._source.get("bias"))
        out: Tensor = self._packed(x)
        return out


def _state(parameter: Tensor | None) -> tuple[int, int] | None:
    """Another one once it was written or replaced."""
    return None if parameter is None else (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)


class _PackedLora(nn.Module):
    """A projection with adapters: the product packed, the adapters the source's own."""

    def __init__(self, base: PackedLinear, source: LoraLinear) -> None:
        super().__init__()
        self.base = base
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return self.source.adapt(x, self.base(x))


class PackedView:
    """A model and the packed copies of its weights.

    Args:
        model: in float32 or bfloat16, on a CPU.
        head_dtype: of the LM head's product; None: the model's.
    """

    def __init__(self, model: Model, head_dtype: torch.dtype | None = None) -> None:
        self._source = model
        self._head_dtype = head_dtype
        self._linears: list[PackedLinear] = []
        self._norms: list[CopiedNorm] = []
        keep_freed_memory()
        self._build()

    def _build(self) -> None:
        self._lora = self._source.lora
        self._linears = []
        view = self._view(self._source)
        assert isinstance(view, Model)
        head = PackedLinear(self._source.lm_head or self._source.decoder.embed_tokens, self._head_dtype)
        view.lm_head = head  # type: ignore[assignment]
        self._linears = [one for one in self._linears if one.weight is not head.weight] + [head]
        self.model = view

    def refresh(self) -> bool:
        """Brings `model` up to date with what training did to the weights; cheap where that is nothing. Whether its
        copies lie elsewhere than before, since adapters came or went."""
        is_new = self._source.lora is not self._lora
        if is_new:
            self._build()
        copies: list[PackedLinear | CopiedNorm] = [*self._linears, *self._norms]
        for one in copies:
            one.refresh()
        return is_new

    def outdate(self) -> None:
        """The weights have changed: the next `refresh` makes all copies anew."""
        copies: list[PackedLinear | CopiedNorm] = [*self._linears, *self._norms]
        for one in copies:
            one.outdate()

    def free(self) -> None:
        """Gives the memory of the copies back, until `refresh`."""
        for linear in self._linears:
            linear.free()

    @property
    def nbytes(self) -> int:
        """Of the copies there are."""
        return sum(linear.nbytes for linear in self._linears)

    def _view(self, module: nn.Module) -> nn.Module:
        if isinstance(module, LoraLinear):
            return _PackedLora(self._packed(module), module)
        if isinstance(module, nn.Linear):
            return self._packed(module)
        view = copy.copy(module)
        view._modules = {name: child and self._view(child) for name, child in module._modules.items()}
        if isinstance(view, Decoder) and has_short_way(self._source):
            view = PackedDecoder(view)
            self._norms = view.norms
        return view

    def _packed(self, source: nn.Linear | nn.Embedding) -> PackedLinear:
        linear = PackedLinear(source)
        self._linears.append(linear)
        return linear


class ShortView(PackedView):
    """A model whose products are its own, with the short way through its decoder: to the bit what the model computes.

    Args:
        model: one that has a short way.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)

    def _build(self) -> None:
        self._lora, self._linears = self._source.lora, []
        view = copy.copy(self._source)
        view._modules = self._source._modules | {"decoder": self._view(self._source.decoder)}
        self.model = view

    def _view(self, module: nn.Module) -> nn.Module:
        return module if isinstance(module, nn.Linear | LoraLinear) else super()._view(module)


def has_short_way(model: Model) -> bool:
    """Whether a PackedDecoder serves a model: in float32 or bfloat16 on a CPU, without norms of queries and keys."""
    return model.device.type == "cpu" and model.dtype in NATIVE and not model.config.text.qk_norm


def can_pack(model: Model) -> bool:
    """Whether this model's products are faster with packed weights: in float32 or bfloat16 on a CPU that has them."""
    return model.device.type == "cpu" and packs(model.dtype)


def packs(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are ours on this processor, or oneDNN's."""
    if has_products(dtype) or not torch.backends.mkldnn.is_available():
        return has_products(dtype)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_ours(weight: Tensor, dtype: torch.dtype) -> bool:
    return has_products(dtype) and weight.shape[1] * dtype.itemsize % 4 == 0


def packed_nbytes(model: Model, head_dtype: torch.dtype | None = None) -> int:
    """What a PackedView of this model will hold."""
    head = model.lm_head_weight
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rest = sum(_nbytes(weight, weight.dtype) for weight in matrices if weight is not head)
    return rest + _nbytes(head, head_dtype or head.dtype)


def _nbytes(weight: Tensor, dtype: torch.dtype) -> int:
    return nbytes_of(weight, dtype) if _is_ours(weight, dtype) else weight.numel() * dtype.itemsize
