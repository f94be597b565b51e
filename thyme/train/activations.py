"""Bytes that a forward pass keeps for its backward pass, by formula: per token and layer, per patch and block.

They follow what the ops save (thyme.kernels): a norm its unit rows, or the stream they came from; a projection its
input where its weight or an adapter on it is trained; attention its rotated queries and keys, the projection's storage
that the values lie in, its output and one float32 a head; SwiGLU both its inputs, the projection after it the product.
Sequences of unequal length are copied for attention, which changes little and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from thyme.model.config import LoraConfig, TextConfig, VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one micro-batch holds, and how it is trained."""

    tokens: int
    """Packed tokens, those of pictures among them."""
    patches: int
    """Of its distinct pictures."""
    rows: int
    """Tokens that are trained."""
    itemsize: int
    """Bytes of a number of the model's dtype."""
    recomputes: bool
    """Layers and blocks keep their inputs alone."""
    fused_head: bool
    """No logits."""
    lora: LoraConfig
    """Rank 0: the decoder itself is trained."""
    trains_tower: bool
    """Patch embedding and blocks."""
    trains_merger: bool
    """The merger."""


def decoder_layer(text: TextConfig, how: Pass) -> int:
    """Bytes per token that one layer keeps where it is not recomputed."""
    hidden, heads, keys, width = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    query, key = heads * width, keys * width
    kept = 2 * hidden  # what the two norms keep
    kept += (query + 2 * key) + (query + key) + query  # the values' storage, rotated queries and keys, what comes out
    kept += 2 * text.intermediate_size
    floats = heads + 2
    if text.qk_norm:
        kept += query + key + (query + 2 * key)  # unit heads, and all heads put together again
        floats += heads + keys
    trained = _inputs_of_trained(how.lora)
    kept += hidden * ("qkv" in trained) + hidden * ("gate_up" in trained) + text.intermediate_size * ("down" in trained)
    kept += len(how.lora.targets) * how.lora.rank
    return kept * how.itemsize + 4 * floats


def vision_block(vision: VisionConfig, how: Pass) -> int:
    """Bytes per patch that one block keeps where it is not recomputed; nothing where the tower is frozen."""
    hidden = vision.hidden_size
    kept = 2 * hidden + 2 * hidden + 3 * hidden + 2 * hidden + hidden + 3 * vision.intermediate_size
    windowed = 1 - len(vision.fullatt_block_indexes) / vision.depth
    kept += round(windowed * hidden)  # windows of several sizes are put together
    return kept * how.itemsize + 4 * (vision.num_heads + 2) if how.trains_tower else 0


def decoder_bytes(text: TextConfig, how: Pass) -> int:
    """All layers and the final norm."""
    width = text.hidden_size * how.itemsize
    inputs = (2 * text.num_hidden_layers - 1) * width
    layers = inputs if how.recomputes else text.num_hidden_layers * decoder_layer(text, how)
    if how.lora.rank:
        layers -= width  # the embeddings need no gradient, so the first norm keeps nothing
    tables = 4 * text.head_dim
    return how.tokens * (layers + width + 4 + tables)


def vision_bytes(vision: VisionConfig | None, how: Pass) -> int:
    """Patches, blocks and merger."""
    if vision is None or not how.patches:
        return 0
    width, kept = vision.hidden_size * how.itemsize, 0
    if how.trains_tower:
        blocks = (2 * vision.depth - 1) * width if how.recomputes else vision.depth * vision_block(vision, how)
        kept += blocks + vision.patch_dim * how.itemsize + 4 * vision.head_dim
    if how.trains_merger:
        kept += 4 * width + 4  # unit rows, both inputs of its projections, and what is between them
    elif how.trains_tower:
        kept += 2 * width + 4
    return how.patches * kept


def head_bytes(text: TextConfig, how: Pass) -> int:
    """The trained rows, and their logits where the head is not fused."""
    row = text.hidden_size * how.itemsize
    return how.rows * (row + 20 if how.fused_head else row + text.vocab_size * how.itemsize + 20)


def saved_bytes(text: TextConfig, vision: VisionConfig | None, how: Pass) -> int:
    """All that one forward pass keeps."""
    return decoder_bytes(text, how) + vision_bytes(vision, how) + head_bytes(text, how)


def backward_bytes(text: TextConfig, vision: VisionConfig | None, how: Pass) -> int:
    """What a backward pass needs beside, at its most: gradients inside one layer, and the layer itself where it is
    recomputed; or a block of the tower; or the gradient of the logits."""
    layer = (3 * text.intermediate_size + 4 * text.hidden_size) * how.itemsize
    layer += decoder_layer(text, how) if how.recomputes else 0
    needs = [how.tokens * layer]
    if vision is not None and how.trains_tower:
        block = (3 * vision.intermediate_size + 4 * vision.hidden_size) * how.itemsize
        needs.append(how.patches * (block + (vision_block(vision, how) if how.recomputes else 0)))
    if not how.fused_head:
        needs.append(how.rows * text.vocab_size * how.itemsize)
    return max(needs)


def forward_bytes(text: TextConfig, vision: VisionConfig | None, *, tokens: int, patches: int, itemsize: int) -> int:
    """What a pass without gradients needs at its most: the stream, and the inside of one MLP."""
    needs = [tokens * (3 * text.hidden_size + 3 * text.intermediate_size)]
    if vision is not None:
        needs.append(patches * (3 * vision.hidden_size + 3 * vision.intermediate_size))
    return max(needs) * itemsize


def _inputs_of_trained(lora: LoraConfig) -> set[str]:
    """Projections whose input the backward pass needs: those that are trained, or have an adapter that is."""
    if lora.rank == 0:
        return {"qkv", "gate_up", "down"}
    owner = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    return {owner.get(target, target.removesuffix("_proj")) for target in lora.targets}
