"""The tiny family: configs and a tokenizer small enough for every test; tests/conftest.py makes fixtures of them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from thyme.model import ImageConfig, TextConfig, VisionConfig
from thyme.model.hf import image_config_to_hf

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|box_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def text_config(**changes: Any) -> TextConfig:
    """Two layers of 48, four query and two key heads of 12, weights large enough that every token matters."""
    sizes = dict(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return TextConfig(**{**sizes, **changes})


def vision_config(**changes: Any) -> VisionConfig:
    """Two blocks of 32, the first in windows of two merged patches, for a decoder of 48."""
    sizes = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        window_size=56,
        fullatt_block_indexes=(1,),
        initializer_range=0.2,
    )
    return VisionConfig(**{**sizes, **changes})


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen's, trained on a few lines, with Qwen's special tokens and one plain added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["the sign is small: crop the image and read it", "print(image.width // 6) # größer, 图像, naïve"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def write_hub_folder(folder: Path, fast: PreTrainedTokenizerFast) -> Path:
    """What transformers writes of a Qwen2.5-VL of two thin layers, with a byte-level tokenizer; says no dialect."""
    ids = {token: fast.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(fast) // 16) * 16,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    pictures = ImageConfig(min_pixels=56 * 56, max_pixels=84 * 84)
    (folder / "preprocessor_config.json").write_text(json.dumps(image_config_to_hf(pictures)))
    return folder
