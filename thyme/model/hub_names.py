"""Our parameters' names and the hub's.

Ours differ where the hub splits what we compute in one matmul (q/k/v, gate/up) and where it keeps a convolution for a
matmul (patch_embed).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from thyme.model.config import ModelConfig

_SPLIT = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
_RENAMED = (
    (r"^decoder\.", "model."),
    (r"\.mlp\.down\.", ".mlp.down_proj."),
    (r"^visual\.patch_embed\.", "visual.patch_embed.proj."),
    (r"^visual\.merger\.norm\.", "visual.merger.ln_q."),
    (r"^visual\.merger\.up\.", "visual.merger.mlp.0."),
    (r"^visual\.merger\.down\.", "visual.merger.mlp.2."),
)
# Spellings of other writers, brought to the hub's.
_ALIASES = (
    (re.compile(r"^model\.language_model\.|^language_model\.model\."), "model."),
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor on disk: `rows` of one of our parameters, stored in `shape`."""

    name: str
    rows: slice
    shape: tuple[int, ...]


def hub_name(key: str) -> str:
    """A key of a file in the hub's spelling, whoever wrote it."""
    for pattern, replacement in _ALIASES:
        key = pattern.sub(replacement, key)
    return key


def pieces(config: ModelConfig, name: str, shape: Sequence[int]) -> list[Piece]:
    """What the hub has of the parameter `name`, whose shape is `shape`, in the order of its rows."""
    hub = name
    for pattern, replacement in _RENAMED:
        hub = re.sub(pattern, replacement, hub)
    owner, layer, kind = hub.rsplit(".", 2) if hub.count(".") > 1 else ("", "", "")
    shape = tuple(shape)
    if layer not in _SPLIT or owner.endswith(".attn"):  # the vision tower's qkv is one matrix on the hub too
        vision, stored = config.vision, shape
        if vision is not None and name == "visual.patch_embed.weight":
            side = vision.patch_size
            stored = (vision.hidden_size, vision.in_channels, vision.temporal_patch_size, side, side)
        return [Piece(hub, slice(0, shape[0]), stored)]
    text = config.text
    if layer == "qkv":
        key_rows = text.num_key_value_heads * text.head_dim
        rows = [text.num_attention_heads * text.head_dim, key_rows, key_rows]
    else:
        rows = [shape[0] // 2] * 2
    found: list[Piece] = []
    start = 0
    for part, count in zip(_SPLIT[layer], rows, strict=True):
        found.append(Piece(f"{owner}.{part}.{kind}", slice(start, start + count), (count, *shape[1:])))
        start += count
    return found
