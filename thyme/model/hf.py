"""Hugging Face's files about a checkpoint, read into our configs and written from them; standard library only.

config.json is read as the hub has it (flat) and as newer transformers write it (nested under `text_config`); the flat
form, which both read, is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thyme.model.config import ARCHITECTURES, ImageConfig, ModelConfig, RopeScaling, TextConfig, VisionConfig

# What transformers assumes where a config.json is silent.
_DEFAULT_ROPE_THETA = {"qwen2_5_vl": 1e6, "qwen2": 1e4, "qwen3": 1e4, "llama": 1e4}
_DEFAULT_RMS_NORM_EPS = {"qwen2_5_vl": 1e-5, "qwen2": 1e-6, "qwen3": 1e-6, "llama": 1e-6}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; FileNotFoundError or ValueError in one line otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no model folder: it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def read_image_config(folder: Path) -> ImageConfig:
    """What preprocessor_config.json, or the combined processor_config.json, says of pictures.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a file that cannot be read, or a setting that is not supported.
    """
    combined = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and combined.is_file():
        source = read_json(combined).get("image_processor")
        if isinstance(source, dict):
            return image_config_from_hf(source)
    return image_config_from_hf(read_json(folder / "preprocessor_config.json"))


def model_config_from_hf(source: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json's content, flat (hub) or nested (`text_config`), with either rope spelling.

    Raises:
        ValueError: another architecture, a missing key, or a feature this model does not have.
    """
    family = source.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type {family!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    text = {**source, **(source.get("text_config") or {})}
    tied = bool(source.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    vision = source.get("vision_config")
    if family != "qwen2_5_vl":
        vision = None
    elif not vision:
        raise ValueError("config.json: model_type 'qwen2_5_vl' has no 'vision_config'")
    return ModelConfig(
        model_type=family,
        text=_text_from_hf(family, text, tied),
        vision=_vision_from_hf(vision) if vision else None,
        image_token_id=source.get("image_token_id", 151655 if vision else None),
        video_token_id=source.get("video_token_id", 151656 if vision else None),
        vision_start_token_id=source.get("vision_start_token_id", 151652 if vision else None),
        vision_end_token_id=source.get("vision_end_token_id", 151653 if vision else None),
        eos_token_ids=as_ids(text.get("eos_token_id")),
        bos_token_id=text.get("bos_token_id"),
        pad_token_id=text.get("pad_token_id"),
    )


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of the hub's flat config.json; optional ids that are None are left out."""
    out: dict[str, Any] = {"architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type}
    out |= _text_to_hf(config.model_type, config.text)
    ids = {
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    out |= {key: value for key, value in ids.items() if value is not None}
    if config.eos_token_ids:
        # Qwen2.5-VL's config.json allows one id only; the full list goes to generation_config.json.
        out["eos_token_id"] = config.eos_token_ids[0]
    if config.vision is not None:
        out["vision_config"] = _vision_to_hf(config.vision)
    return out


def image_config_from_hf(source: Mapping[str, Any]) -> ImageConfig:
    """Reads a preprocessor_config.json's content: min_pixels and max_pixels, or size's two edges (areas there)."""
    size = source.get("size") or {}
    # When both are there, transformers lets the pixel keys win.
    low = _first(source.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), ImageConfig().min_pixels)
    high = _first(source.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), ImageConfig().max_pixels)
    scale = source.get("rescale_factor", 1 / 255)
    if abs(scale * 255 - 1) > 1e-9 or int(source.get("resample", 3)) != 3:
        raise ValueError(
            "preprocessor_config.json: only rescale_factor 1/255 and bicubic resampling (3) are supported, "
            f"got {scale} and {source.get('resample')}"
        )
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not source.get(key, True):
            raise ValueError(f"preprocessor_config.json: {key}=false is not supported")
    return ImageConfig(
        patch_size=source.get("patch_size", 14),
        merge_size=source.get("merge_size", 2),
        temporal_patch_size=source.get("temporal_patch_size", 2),
        min_pixels=low,
        max_pixels=high,
        mean=_three(source.get("image_mean", ImageConfig().mean), "image_mean"),
        std=_three(source.get("image_std", ImageConfig().std), "image_std"),
    )


def image_config_to_hf(config: ImageConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` entry, which may be absent, one id or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _required(source: Mapping[str, Any], key: str, where: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"{where} has no {key!r}")
    return source[key]


def _text_from_hf(family: str, text: Mapping[str, Any], tied: bool) -> TextConfig:
    where = "config.json"
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {text['hidden_act']!r} is not supported; supported: 'silu'")
    layers = _required(text, "num_hidden_layers", where)
    first_window = text.get("max_window_layers", 0)
    if text.get("use_sliding_window") and text.get("sliding_window") and first_window < layers:
        raise ValueError(f"{where}: sliding-window attention (use_sliding_window=true) is not supported")
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope", "llama3"):
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported: default, mrope, llama3")
    section = rope.get("mrope_section")
    if family == "qwen2_5_vl" and section is None:
        section = (16, 24, 24)
    if section is not None and len(section) != 3:
        raise ValueError(f"{where}: mrope_section needs 3 entries, got {section}")
    hidden, heads = _required(text, "hidden_size", where), _required(text, "num_attention_heads", where)
    bias = bool(text.get("attention_bias", False))
    head_dim = text.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
    return TextConfig(
        vocab_size=_required(text, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_required(text, "intermediate_size", where),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=hidden // heads if family in ("qwen2_5_vl", "qwen2") else head_dim,
        rms_norm_eps=text.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS[family]),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or _DEFAULT_ROPE_THETA[family]),
        mrope_section=None if section is None else (section[0], section[1], section[2]),
        rope_scaling=_llama3_scaling(rope, text) if kind == "llama3" else None,
        qkv_bias=True if family in ("qwen2_5_vl", "qwen2") else bias,
        o_bias=False if family in ("qwen2_5_vl", "qwen2") else bias,
        mlp_bias=bool(text.get("mlp_bias", False)) if family == "llama" else False,
        qk_norm=family == "qwen3",
        max_position_embeddings=text.get("max_position_embeddings", 32768),
        tie_word_embeddings=tied,
        initializer_range=text.get("initializer_range", 0.02),
    )


def _llama3_scaling(rope: Mapping[str, Any], text: Mapping[str, Any]) -> RopeScaling:
    where = "config.json: rope_scaling"
    trained_on = rope.get("original_max_position_embeddings") or text.get("max_position_embeddings")
    return RopeScaling(
        factor=_required(rope, "factor", where),
        low_freq_factor=_required(rope, "low_freq_factor", where),
        high_freq_factor=_required(rope, "high_freq_factor", where),
        original_max_position_embeddings=_required({"n": trained_on}, "n", where),
    )


def _vision_from_hf(vision: Mapping[str, Any]) -> VisionConfig:
    where = "config.json: vision_config"
    if vision.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {vision['hidden_act']!r} is not supported; supported: 'silu'")
    theta = (vision.get("rope_parameters") or {}).get("rope_theta", 1e4)
    if theta != 1e4:
        raise ValueError(f"{where}: rope_theta {theta} is not supported; supported: 10000")
    return VisionConfig(
        depth=_required(vision, "depth", where),
        hidden_size=_required(vision, "hidden_size", where),
        intermediate_size=_required(vision, "intermediate_size", where),
        num_heads=_required(vision, "num_heads", where),
        out_hidden_size=_required(vision, "out_hidden_size", where),
        fullatt_block_indexes=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        window_size=vision.get("window_size", 112),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        patch_size=vision.get("patch_size", 14),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        tokens_per_second=vision.get("tokens_per_second", 4),
        initializer_range=vision.get("initializer_range", 0.02),
    )


def _text_to_hf(family: str, text: TextConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_position_embeddings,
        "initializer_range": text.initializer_range,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False,
    }
    if family in ("qwen3", "llama"):
        out["head_dim"] = text.head_dim
        out["attention_bias"] = text.o_bias
    if family == "llama":
        out["mlp_bias"] = text.mlp_bias
    if text.mrope_section is not None:
        out["rope_scaling"] = {"type": "mrope", "mrope_section": list(text.mrope_section)}
    elif text.rope_scaling is not None:
        scaling = text.rope_scaling
        out["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return out


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "hidden_act": "silu",
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "in_channels": vision.in_channels,
        "in_chans": vision.in_channels,
        "out_hidden_size": vision.out_hidden_size,
        "patch_size": vision.patch_size,
        "spatial_patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        "tokens_per_second": vision.tokens_per_second,
        "initializer_range": vision.initializer_range,
    }


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _three(values: Any, name: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"preprocessor_config.json: {name} needs 3 values, got {values}")
    return (float(values[0]), float(values[1]), float(values[2]))
