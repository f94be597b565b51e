"""config.json in its spellings, against transformers' own reading, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, Qwen2_5_VLConfig

from thyme.model import ImageConfig
from thyme.model.hf import image_config_from_hf, image_config_to_hf, model_config_from_hf, model_config_to_hf

# As on the hub: flat, rope_theta beside rope_scaling.
HUB = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "vision_config": {
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "in_chans": 3,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def test_the_hub_spelling() -> None:
    config = model_config_from_hf(HUB)
    assert config.text.head_dim == 128 and config.text.mrope_section == (16, 24, 24)
    assert config.text.rope_theta == 1e6 and config.text.tie_word_embeddings and config.text.qkv_bias
    assert config.vision is not None and config.vision.fullatt_block_indexes == (1, 3)
    assert config.vision.patch_dim == 1176 and config.vision.window_tokens == 4
    assert config.eos_token_ids == (151645,) and config.image_token_id == 151655


def test_nested_spelling_of_newer_transformers_reads_the_same() -> None:
    nested = Qwen2_5_VLConfig(**HUB).to_dict()
    assert "rope_parameters" in nested["text_config"] and "hidden_size" not in nested
    assert model_config_from_hf(nested) == model_config_from_hf(HUB)


def test_tying_may_be_said_in_the_nested_part_only() -> None:
    nested = Qwen2_5_VLConfig(**HUB).to_dict()
    nested["tie_word_embeddings"] = False
    assert not model_config_from_hf(nested).text.tie_word_embeddings
    nested["text_config"]["tie_word_embeddings"] = True
    assert model_config_from_hf(nested).text.tie_word_embeddings


def test_what_we_write_reads_back_and_means_the_same_to_transformers(hf_text_model: Callable[[str], Any]) -> None:
    sources = [HUB] + [hf_text_model(f).config.to_dict() for f in ("qwen2", "qwen3", "llama-biased", "llama3")]
    for source in sources:
        config = model_config_from_hf(source)
        written = model_config_to_hf(config)
        assert model_config_from_hf(written) == config
        theirs = AutoConfig.for_model(**written).to_dict()
        assert model_config_from_hf(theirs) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported: llama, qwen2, qwen2_5_vl, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"vision_config": None}, "has no 'vision_config'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "sliding-window attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "mrope_section needs 3 entries"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}, "must sum to head_dim / 2 = 64"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(2\) must be a multiple of num_key_value_heads \(3\)"),
        ({"vocab_size": 0}, "TextConfig.vocab_size must be positive, got 0"),
        ({"vision_config": {**HUB["vision_config"], "out_hidden_size": 128}}, "out_hidden_size"),
        ({"vision_config": {**HUB["vision_config"], "num_heads": 5}}, "must be a multiple of 4"),
        ({"vision_config": {**HUB["vision_config"], "window_size": 20}}, "window_size"),
        ({"vision_config": {**HUB["vision_config"], "fullatt_block_indexes": [7]}}, "fullatt_block_indexes"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config_from_hf({**HUB, **change})


def test_a_vision_tower_belongs_to_qwen2_5_vl_only() -> None:
    config = model_config_from_hf(HUB)
    with pytest.raises(ValueError, match="does not go with"):
        replace(config, vision=None)
    with pytest.raises(ValueError, match="image_token_id"):
        replace(config, image_token_id=None)


def test_image_config_spellings() -> None:
    sizes = {"shortest_edge": 3136, "longest_edge": 100352}
    by_edges = image_config_from_hf({"size": sizes})
    assert by_edges == image_config_from_hf({"min_pixels": 3136, "max_pixels": 100352})
    # As Qwen2.5-VL's own file: both, the pixel keys being meant.
    both = {"min_pixels": 3136, "max_pixels": 100352, "size": {"shortest_edge": 1, "longest_edge": 2}}
    assert image_config_from_hf(both) == by_edges
    assert image_config_from_hf(image_config_to_hf(by_edges)) == by_edges
    assert image_config_from_hf({}) == ImageConfig()


@pytest.mark.parametrize(
    "source, message",
    [
        ({"min_pixels": 10, "max_pixels": 5}, r"min_pixels \(10\) exceeds max_pixels \(5\)"),
        ({"image_mean": [0.5]}, "image_mean needs 3 values"),
        ({"rescale_factor": 1.0}, "rescale_factor 1/255"),
        ({"resample": 2}, "bicubic"),
        ({"do_normalize": False}, "do_normalize=false"),
    ],
)
def test_image_config_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_config_from_hf(source)


def test_the_package_and_its_config_import_no_torch() -> None:
    code = "import sys, thyme.model, thyme.model.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
