"""LoRA (arXiv 2106.09685): low-rank adapters on the decoder's projections.

An adapted projection computes  y = x W^T + s (x A^T) B^T,  W frozen, A [R, in] and B [out, R] trained, s = alpha / R,
or alpha / sqrt(R) (rank-stabilized, arXiv 2312.03732). B begins at 0, so the model begins as it was.

Engine and trainer run the same unmerged module. So W needs no second copy and is never rounded anew, the policy that
samples is the one that is trained, and with the adapters off the model is its own KL reference.
Where the hub has several projections and we one (q/k/v, gate/up), each that is adapted has its own A and B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thyme.model.config import LoraConfig, TextConfig
from thyme.model.model import Model

_PROJECTIONS = {
    "self_attn.qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up": ("gate_proj", "up_proj"),
    "mlp.down": ("down_proj",),
}
"""Of a decoder layer: our projection, and the hub's that it holds, in the order of its rows."""


class LoraLinear(nn.Linear):
    """A frozen projection with adapters on some of its row ranges; weight and bias keep their names in the model.

    Args:
        base: its parameters become this module's, and are frozen.
        parts: (target, rows) of each projection that `base` holds, in order; target None has no adapter.
        config: rank and scale.
    """

    def __init__(self, base: nn.Linear, parts: Sequence[tuple[str | None, int]], config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.parts = tuple(parts)
        self.scale = config.scale
        self.is_on = True
        """Whether the adapters count; off, the module computes what it did without them."""
        rows = [rows for target, rows in self.parts if target is not None]
        self.lora_a = nn.Parameter(base.weight.new_zeros(len(rows) * config.rank, base.in_features))
        """[P R, in]: A of the P adapted parts, one below the other."""
        self.lora_b = nn.Parameter(base.weight.new_zeros(sum(rows), config.rank))
        """[their rows, R]: likewise B."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.adapt(x, F.linear(x, self.weight, self.bias))

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """[T, out]: what the projection made of x [T, in], with the adapters' part."""
        if not self.is_on:
            return out
        low = iter(F.linear(x, self.lora_a).split(self.lora_b.shape[1], -1))
        b = iter(self._b())
        deltas = [
            x.new_zeros(len(x), rows) if target is None else F.linear(next(low), next(b)) for target, rows in self.parts
        ]
        return torch.add(out, deltas[0] if len(deltas) == 1 else torch.cat(deltas, -1), alpha=self.scale)

    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target -> (A [R, in], B [its rows, R]), as views."""
        rank = self.lora_b.shape[1]
        targets = [target for target, _ in self.parts if target is not None]
        return dict(zip(targets, zip(self.lora_a.split(rank), self._b(), strict=True), strict=True))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A, [out, in]: computed in float32 and rounded once to W's dtype."""
        adapters = self.adapters()
        blocks = self.weight.split([rows for _, rows in self.parts])
        return torch.cat(
            [
                block if target is None else self._sum(block, *adapters[target])
                for (target, _), block in zip(self.parts, blocks, strict=True)
            ]
        )

    def _sum(self, block: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(block.float(), b.float(), a.float(), alpha=self.scale).to(block.dtype)

    def _b(self) -> tuple[Tensor, ...]:
        return self.lora_b.split([rows for target, rows in self.parts if target is not None])


def add_adapters(model: Model, config: LoraConfig, *, seed: int = 0, base: str = "") -> None:
    """Puts adapters on the decoder's projections, in place: from here on they alone are trained.

    Args:
        model: has none yet. Its other parameters are frozen.
        config: rank above 0, scale, targets.
        seed: of A, which is drawn as PEFT draws it: uniform within 1 / sqrt(in).
        base: folder or hub name of the model, for the adapter's file.

    Raises:
        ValueError: rank 0, or the model has adapters.
    """
    if config.rank == 0:
        raise ValueError("add_adapters: a rank of 0 means no adapters")
    if model.lora is not None:
        raise ValueError("add_adapters: the model has adapters already: merge them first")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.decoder.layers:
        for path, targets in _PROJECTIONS.items():
            rows = _rows(model.config.text, targets)
            parts = [(t if t in config.targets else None, n) for t, n in zip(targets, rows, strict=True)]
            if all(target is None for target, _ in parts):
                continue
            owner, name = path.split(".")
            adapted = LoraLinear(getattr(getattr(layer, owner), name), parts, config)
            bound = 1 / math.sqrt(adapted.in_features)
            with torch.no_grad():
                adapted.lora_a.copy_(torch.empty(adapted.lora_a.shape).uniform_(-bound, bound, generator=generator))
            setattr(getattr(layer, owner), name, adapted)
    model.lora, model.lora_base = config, base


def merge_adapters(model: Model) -> None:
    """Makes the adapters part of the weights they sit on, in place; then there are none, and every weight is trained.

    In 16 bits each sum is rounded once.
    """
    for layer in model.decoder.layers:
        for path in _PROJECTIONS:
            owner, name = path.split(".")
            adapted = getattr(getattr(layer, owner), name)
            if not isinstance(adapted, LoraLinear):
                continue
            plain = nn.Linear(adapted.in_features, adapted.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(adapted.merged()), adapted.bias
            setattr(getattr(layer, owner), name, plain)
    model.requires_grad_(True)
    model.lora = None


@contextmanager
def adapters_off(model: Model) -> Iterator[None]:
    """Inside the block the model computes what it did before it had adapters; nothing happens where it has none."""
    adapted = [module for _, module in lora_modules(model)]
    for module in adapted:
        module.is_on = False
    try:
        yield
    finally:
        for module in adapted:
            module.is_on = True


def lora_modules(model: Model) -> list[tuple[str, LoraLinear]]:
    """The adapted projections under their names in the model."""
    if model.lora is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def merged_parameters(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The model's weights without gradients, as if its adapters were merged; one adapted weight at a time is a copy."""
    adapted = {f"{name}.weight": module for name, module in lora_modules(model)}
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield name, adapted[name].merged() if name in adapted else parameter.detach()


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's parameter."""
    return name.endswith((".lora_a", ".lora_b"))


def _rows(text: TextConfig, targets: Sequence[str]) -> list[int]:
    heads, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    rows = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "gate_proj": text.intermediate_size}
    rows |= {"up_proj": text.intermediate_size, "o_proj": text.hidden_size, "down_proj": text.hidden_size}
    return [rows[target] for target in targets]
