"""Two folders that every verb is tried on: a checkpoint such as the demo writes, and a tiny Hugging Face Qwen2.5-VL."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny import SPECIALS
from thyme.model import ImageConfig
from thyme.model.hf import image_config_to_hf
from thyme.verbs.config import RunConfig
from thyme.verbs.opening import open_model, save_model


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded toy as `thyme demo` saves it, untrained."""
    return save_model(open_model(RunConfig(threads=1)), tmp_path_factory.mktemp("demo") / "rl")


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: PreTrainedTokenizerFast) -> Path:
    """What transformers writes of a Qwen2.5-VL of two thin layers, with a byte-level tokenizer; says no dialect."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-tiny"
    fast = byte_level_tokenizer
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
