"""A model as the engine runs it with its decoder's projections in 8 bits: half the bytes of each to read.

What is quantized is what released fp8 checkpoints have in 8 bits: the projections of the decoder's layers. Embedding,
LM head, norms, biases, adapters and the vision tower are the model's own. The codes are a copy that the engine owns:
the weights that training holds are read, never written, and the copy follows them as packed weights do (packed.py).

A model that was loaded from an fp8 checkpoint knows its scales (`Model.stored_scales`): until they are trained, its
blocks have the checkpoint's very codes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from thyme.kernels.fp8 import num_blocks, quantize_weight
from thyme.kernels.fp8_linear import fp8_linear
from thyme.model.model import Model
from thyme.model.packed import PackedLinear, PackedView


class Fp8Linear(PackedLinear):
    """x W^T + b, with a copy of W [out, in] in 8 bits.

    Args:
        source: a projection.
        stored: scales that its weight came with; None: none.
    """

    def __init__(self, source: nn.Linear, stored: Tensor | None = None) -> None:
        super().__init__(source)
        self._stored = stored

    def _pack(self, weight: Tensor) -> None:
        fresh = quantize_weight(weight, None if self._stored is None else self._stored.to(weight.device))
        if self._packed is None or self._packed[0].device != weight.device:
            self._packed = fresh
        else:  # where it lay: a captured graph knows the address
            for old, new in zip(self._packed, fresh, strict=True):
                old.copy_(new)

    def outdate(self) -> None:
        """Its memory is kept, since the next copy has the same size."""
        self._made_from = None

    @property
    def nbytes(self) -> int:
        """Of codes and scales, where there are some."""
        return 0 if self._packed is None else sum(part.nbytes for part in self._packed)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        codes, scales = self._packed
        return fp8_linear(x, codes, scales, self._source.get("bias"))


class Fp8View(PackedView):
    """A model and the fp8 copies of its decoder's projections.

    Args:
        model: on a CPU or a GPU that has e4m3.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)

    def _build(self) -> None:
        self._lora = self._source.lora
        self._linears = []
        self._names = {module: f"decoder.{name}.weight" for name, module in self._source.decoder.named_modules()}
        view = copy.copy(self._source)
        view._modules = self._source._modules | {"decoder": self._view(self._source.decoder)}
        self.model = view

    def _packed(self, source: nn.Linear | nn.Embedding) -> PackedLinear:
        assert isinstance(source, nn.Linear)
        linear = Fp8Linear(source, self._source.stored_scales.get(self._names[source]))
        self._linears.append(linear)
        return linear


def fp8_nbytes(model: Model) -> int:
    """What an Fp8View of this model will hold."""
    shapes = [module.weight.shape for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    return sum(
        rows * columns + num_blocks(rows) * num_blocks(columns) * torch.float32.itemsize for rows, columns in shapes
    )
