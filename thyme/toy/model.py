"""The toy: a Qwen2.5-VL of 1.7 million parameters that two CPU cores can train in minutes, and its processor.

Every picture, whatever its size, is seen at 84 x 84 pixels: 6 x 6 patches, 3 x 3 image tokens. What is small in the
original is therefore lost to the model unless its code enlarges it, as in the large model and its token budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thyme.model.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from thyme.toy.config import VIEW
from thyme.toy.tokenizer import toy_tokenizer

if TYPE_CHECKING:
    from thyme.model.processor import Processor

_VOCAB_MULTIPLE = 16
"""Rows of the embedding are padded as large checkpoints pad theirs; the padding is never sampled."""


def tiny_config() -> ModelConfig:
    """Hidden 128, 4 layers, 4 heads; vision 128 wide, 2 blocks, 4 heads, a window that spans the whole view."""
    tokenizer = toy_tokenizer()
    ids = tokenizer.get_vocab()
    text = TextConfig(
        vocab_size=-(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_theta=1e4,
        mrope_section=(4, 6, 6),
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=128,
        window_size=VIEW,
        fullatt_block_indexes=(1,),
        initializer_range=0.05,
    )
    return ModelConfig(
        text=text,
        vision=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        pad_token_id=ids["<|endoftext|>"],
    )


def tiny_processor() -> Processor:
    """The toy tokenizer and a picture size that is always 84 x 84 (for square pictures; crops here are square)."""
    from thyme.model.processor import Processor

    image_config = ImageConfig(min_pixels=VIEW * VIEW, max_pixels=VIEW * VIEW)
    return Processor(toy_tokenizer(), image_config, tiny_config().eos_token_ids)
