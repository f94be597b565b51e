"""The model that engine and trainer share: vision tower, decoder, LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thyme.model.attention import Attention
from thyme.model.config import LoraConfig, ModelConfig
from thyme.model.decoder import Decoder
from thyme.model.layers import RMSNorm
from thyme.model.rope import Grid
from thyme.model.vision import VisionTower

if TYPE_CHECKING:
    from thyme.model.processor import Processor

_HEAD_TILE = 4096
"""Rows of a 16-bit LM head that a CPU has in float32 at once."""


class Model(nn.Module):
    """A Qwen2.5-VL, or one of the text models it generalizes.

    T packed tokens, P patches, M image features, H hidden, V vocabulary. `processor` is set by `load` and `build`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.processor: Processor | None = None
        self.stored_scales: dict[str, Tensor] = {}
        """Of weights that were loaded from 8 bits, by parameter: [ceil(N / 128), ceil(K / 128)] float32."""
        self.lora: LoraConfig | None = None
        """What `thyme.model.lora` added; None: no adapters."""
        self.lora_base = ""
        """Folder or hub name of the model without them."""
        self.visual = None if config.vision is None else VisionTower(config.vision)
        self.decoder = Decoder(config.text)
        tied = config.text.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H]; the embedding itself where the two are tied."""
        return (self.decoder.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.embed_tokens.weight.dtype

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Image features, all images in one call.

        Args:
            pixel_values: [P, C * frames * side * side] patches of the images one after another.
            grids: (frames, patch rows, patch columns) of each image.

        Returns:
            [M, H] in the model's dtype, in the images' order.

        Raises:
            ValueError: a text model, or shapes that do not fit together.
        """
        if self.visual is None:
            raise ValueError(f"encode_images: a {self.config.model_type} model has no vision tower")
        features: Tensor = self.visual(pixel_values, grids)
        return features

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        *,
        image_features: Tensor | None = None,
        image_positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: [T] i64.
            positions: [3, T] i64: time, height, width (rope.mrope_positions); text models read the first row.
            attention: how the tokens attend, per layer.
            image_features: [M, H], written over the embeddings of `image_positions`.
            image_positions: [M] i64, indices into T.

        Returns:
            [T, H] in the model's dtype.
        """
        if positions.shape != (3, len(input_ids)):
            raise ValueError(
                f"forward: {len(input_ids)} tokens need positions [3, {len(input_ids)}], got {list(positions.shape)}"
            )
        x = self.decoder.embed_tokens(input_ids)
        if image_features is not None or image_positions is not None:
            given = 0 if image_features is None else len(image_features)
            wanted = 0 if image_positions is None else len(image_positions)
            if image_features is None or image_positions is None or given != wanted:
                raise ValueError(f"forward: {given} image features for {wanted} image positions")
            x = x.index_copy(0, image_positions, image_features.to(x.dtype))
        hidden: Tensor = self.decoder(x, positions, attention)
        return hidden

    def logits(self, hidden: Tensor, *, min_rows: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """[N, H] -> [N, V]; with fewer rows than `min_rows` the product is made with zero rows added (see MIN_ROWS).

        Args:
            dtype: of the logits. float32: sums of the products in float32, not rounded to the model's dtype, as in the
                fused head of the losses; without gradients. None: the model's.
        """
        missing = min_rows - len(hidden)
        rows = hidden if missing <= 0 else F.pad(hidden, (0, 0, 0, missing))
        if dtype in (None, self.dtype, getattr(self.lm_head, "dtype", None)):
            return self._head(rows)[: len(hidden)]
        assert dtype is torch.float32
        return _float32_product(rows, self.lm_head_weight)[: len(hidden)]

    def _head(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return F.linear(hidden, self.decoder.embed_tokens.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits


@torch.no_grad()
def _float32_product(rows: Tensor, weight: Tensor) -> Tensor:
    """[N, H] times [V, H] transposed, both of 16 bits, in float32."""
    if rows.is_cuda:
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    out = rows.new_empty(len(rows), len(weight), dtype=torch.float32)
    rows = rows.float()
    for start in range(0, len(weight), _HEAD_TILE):  # a CPU has no such product: a part of the weights at a time
        part = weight[start : start + _HEAD_TILE]
        out[:, start : start + len(part)] = F.linear(rows, part.float())
    return out


@torch.no_grad()
def init_weights(model: Model, seed: int) -> None:
    """Random weights as transformers draws them: normal matrices, zero biases, unit norms; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    text, vision = model.config.text, model.config.vision
    for name, module in model.named_modules():
        std = vision.initializer_range if vision and name.startswith("visual.") else text.initializer_range
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.copy_(torch.empty(module.weight.shape).normal_(0.0, std, generator=generator))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def build(
    config: ModelConfig,
    processor: Processor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model with random weights.

    Args:
        config: its shape.
        processor: its tokenizer and pictures; becomes `model.processor`.
        seed: the same seed gives the same weights.
        device, dtype: of the weights.

    Raises:
        ValueError: the processor's vocabulary or image id does not go with the config.
    """
    model = empty(config, device, dtype)
    init_weights(model, seed)
    attach(model, processor)
    return model


def empty(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Model:
    """A model whose parameters are allocated but not written."""
    with torch.device("meta"):
        model = Model(config)
    return model.to(dtype).to_empty(device=device)


def attach(model: Model, processor: Processor | None) -> None:
    """Makes `processor` the model's, after checking that the two belong together."""
    if processor is not None:
        config, vision, image = model.config, model.config.vision, processor.image_config
        rows = config.text.vocab_size
        if processor.vocab_size > rows:
            raise ValueError(f"the tokenizer has {processor.vocab_size} ids, the model's embedding only {rows} rows")
        if vision is not None and processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"image token: the tokenizer says {processor.image_token_id}, config.json {config.image_token_id}"
            )
        if vision is not None and image is not None:
            cut = (image.patch_size, image.merge_size, image.temporal_patch_size)
            wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
            if cut != wanted:
                raise ValueError(f"(patch_size, merge_size, temporal_patch_size): processor {cut}, model {wanted}")
    model.processor = processor
