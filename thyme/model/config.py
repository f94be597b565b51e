"""What a model is made of, as frozen dataclasses; standard library only.

Field names are those of Hugging Face where it has one; thyme.model.hf reads and writes its files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Supported `model_type` and the class name written to `architectures`."""


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, got {value}")


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
        """Width of one attention head."""
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
        """The same with these ids that end a generation."""
        return replace(self, eos_token_ids=eos_token_ids)


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


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The decoder's projections under the hub's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the decoder (thyme.model.lora); with rank 0 there are none and every weight is trained."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapters."""
    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the update's size when the rank changes."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Projections that get an adapter."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(f"LoraConfig: rank {self.rank} must be at least 0, alpha {self.alpha} positive")
        unknown = [target for target in self.targets if target not in LORA_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            wrong = f"{unknown[0]!r}" if unknown else f"{list(self.targets)}"
            raise ValueError(f"LoraConfig.targets: {wrong} must be some of {', '.join(LORA_TARGETS)}, each once")

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
