"""What a checkpoint's config.json says, as frozen dataclasses; standard library only.

Field names are those of Hugging Face where it has one. `ModelConfig.from_hf` reads the flat files of the hub and the
nested ones that newer transformers write; `to_hf` writes the flat form, which both read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Supported `model_type` and the class name written to `architectures`."""

# What transformers assumes where a config.json is silent.
_DEFAULT_ROPE_THETA = {"qwen2_5_vl": 1e6, "qwen2": 1e4, "qwen3": 1e4, "llama": 1e4}
_DEFAULT_RMS_NORM_EPS = {"qwen2_5_vl": 1e-5, "qwen2": 1e-6, "qwen3": 1e-6, "llama": 1e-6}


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def _required(source: Mapping[str, Any], key: str, where: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"{where} has no {key!r}")
    return source[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched, short ones kept, a smooth ramp between them."""

    factor: float
    """Long wavelengths are multiplied by this."""
    low_freq_factor: float
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / high_freq_factor are kept."""
    original_max_position_embeddings: int
    """Tokens of context the base model was trained on."""

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"RopeScaling.high_freq_factor ({self.high_freq_factor}) must exceed "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The decoder. The switches (biases, qk_norm, mrope_section) are what tells the four families apart."""

    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's size."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; divides num_attention_heads."""
    head_dim: int
    """Width of one head; num_attention_heads * head_dim need not be hidden_size."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside every norm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies that follow time, height and width; sums to head_dim / 2. None: one axis (text models)."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's frequency scaling, if the checkpoint asks for it."""
    qkv_bias: bool = True
    """Bias of the query, key and value projections (Qwen2, Qwen2.5)."""
    o_bias: bool = False
    """Bias of the output projection (Llama's and Qwen3's `attention_bias`)."""
    mlp_bias: bool = False
    """Bias of the MLP's projections (Llama's `mlp_bias`)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before rotation (Qwen3)."""
    max_position_embeddings: int = 32768
    """Tokens of context the checkpoint is meant for."""
    tie_word_embeddings: bool = False
    """The LM head is the embedding matrix."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"TextConfig.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"TextConfig.head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.mrope_section is not None and sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(
                f"TextConfig.mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower of Qwen2.5-VL (Qwen2.5-VL technical report, arXiv 2502.13923, section 2.1)."""

    depth: int
    """Blocks."""
    hidden_size: int
    """Width of a patch."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_heads: int
    """Attention heads; divides hidden_size."""
    out_hidden_size: int
    """Width of an image feature: the decoder's hidden_size."""
    fullatt_block_indexes: tuple[int, ...]
    """Blocks in which a patch attends to its whole image; the others attend within a window."""
    window_size: int = 112
    """Side of an attention window, in pixels."""
    in_channels: int = 3
    """Color channels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    spatial_merge_size: int = 2
    """This many patches squared become one image feature."""
    temporal_patch_size: int = 2
    """Frames in a patch; a still image is repeated."""
    tokens_per_second: int = 4
    """Temporal positions per second of video; kept for the file, images do not use it."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "depth",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "out_hidden_size",
            "window_size",
            "in_channels",
            "patch_size",
            "spatial_merge_size",
            "temporal_patch_size",
        )
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"VisionConfig.hidden_size ({self.hidden_size}) must be a multiple of 4 * num_heads "
                f"({4 * self.num_heads}): each head is rotated along two axes"
            )
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(
                f"VisionConfig.window_size ({self.window_size} px) must hold one merged patch of "
                f"{self.patch_size * self.spatial_merge_size} px"
            )
        if any(not 0 <= index < self.depth for index in self.fullatt_block_indexes):
            raise ValueError(
                f"VisionConfig.fullatt_block_indexes {self.fullatt_block_indexes} must lie in [0, depth={self.depth})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels * frames * side * side."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window, in merged patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One checkpoint."""

    model_type: str = "qwen2_5_vl"
    """Hugging Face's name of the family; one of ARCHITECTURES."""
    text: TextConfig
    """The decoder."""
    vision: VisionConfig | None = None
    """The vision tower; None for text models."""
    image_token_id: int | None = None
    """Placeholder of one image feature (<|image_pad|>)."""
    video_token_id: int | None = None
    """Placeholder of one video feature (<|video_pad|>)."""
    vision_start_token_id: int | None = None
    """<|vision_start|>."""
    vision_end_token_id: int | None = None
    """<|vision_end|>."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a generation."""
    bos_token_id: int | None = None
    """Kept for the file; never inserted."""
    pad_token_id: int | None = None
    """Kept for the file; nothing here pads with ids."""

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        if (self.model_type == "qwen2_5_vl") != (self.vision is not None):
            raise ValueError(f"model_type {self.model_type!r} does not go with vision={self.vision}")
        if self.vision is None:
            return
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision.out_hidden_size ({self.vision.out_hidden_size}) must equal "
                f"text.hidden_size ({self.text.hidden_size})"
            )
        if self.image_token_id is None:
            raise ValueError("a model with vision needs image_token_id")

    def with_eos(self, eos_token_ids: tuple[int, ...]) -> ModelConfig:
        return replace(self, eos_token_ids=eos_token_ids)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> ModelConfig:
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
        return cls(
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

    def to_hf(self) -> dict[str, Any]:
        """The flat config.json of the hub; optional ids that are None are left out."""
        text = self.text
        out: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
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
        if self.model_type in ("qwen3", "llama"):
            out["head_dim"] = text.head_dim
            out["attention_bias"] = text.o_bias
        if self.model_type == "llama":
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
        ids = {
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        out |= {key: value for key, value in ids.items() if value is not None}
        if self.eos_token_ids:
            # Qwen2.5-VL's config.json allows one id only; the full list goes to generation_config.json.
            out["eos_token_id"] = self.eos_token_ids[0]
        if self.vision is not None:
            vision = self.vision
            out["vision_config"] = {
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
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How a picture becomes patches: a checkpoint's preprocessor_config.json."""

    patch_size: int = 14
    """Side of a patch, in pixels."""
    merge_size: int = 2
    """Patches per side of one image feature."""
    temporal_patch_size: int = 2
    """Frames in a patch; a still image is repeated."""
    min_pixels: int = 56 * 56
    """Smaller pictures are enlarged to at least this area, in pixels."""
    max_pixels: int = 28 * 28 * 1280
    """Larger pictures are reduced to at most this area, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted per channel after scaling to [0, 1] (CLIP's)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divided by per channel (CLIP's)."""

    def __post_init__(self) -> None:
        _positive(self, "patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"ImageConfig.min_pixels ({self.min_pixels}) exceeds max_pixels ({self.max_pixels})")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> ImageConfig:
        """Reads a preprocessor_config.json's content: min_pixels and max_pixels, or size's two edges (areas there)."""
        size = source.get("size") or {}
        # When both are there, transformers lets the pixel keys win.
        low = _first(source.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), cls().min_pixels)
        high = _first(source.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), cls().max_pixels)
        scale = source.get("rescale_factor", 1 / 255)
        if abs(scale * 255 - 1) > 1e-9 or int(source.get("resample", 3)) != 3:
            raise ValueError(
                "preprocessor_config.json: only rescale_factor 1/255 and bicubic resampling (3) are supported, "
                f"got {scale} and {source.get('resample')}"
            )
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not source.get(key, True):
                raise ValueError(f"preprocessor_config.json: {key}=false is not supported")
        return cls(
            patch_size=source.get("patch_size", 14),
            merge_size=source.get("merge_size", 2),
            temporal_patch_size=source.get("temporal_patch_size", 2),
            min_pixels=low,
            max_pixels=high,
            mean=_three(source.get("image_mean", cls().mean), "image_mean"),
            std=_three(source.get("image_std", cls().std), "image_std"),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` entry, which may be absent, one id or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _three(values: Any, name: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"preprocessor_config.json: {name} needs 3 values, got {values}")
    return (float(values[0]), float(values[1]), float(values[2]))


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
