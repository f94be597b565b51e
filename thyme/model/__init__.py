"""One model definition for engine and trainer, its checkpoints and its processor. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thyme.model.attention import Attention, PackedAttention, packed_attention
    from thyme.model.config import ImageConfig, ModelConfig, RopeScaling, TextConfig, VisionConfig
    from thyme.model.image_processor import ImageInputs
    from thyme.model.model import Model, build
    from thyme.model.processor import Processor
    from thyme.model.rope import mrope_positions
    from thyme.model.weights import load, load_model, save

_HOME = {
    "Attention": "attention",
    "PackedAttention": "attention",
    "packed_attention": "attention",
    "ImageConfig": "config",
    "ModelConfig": "config",
    "RopeScaling": "config",
    "TextConfig": "config",
    "VisionConfig": "config",
    "Model": "model",
    "build": "model",
    "ImageInputs": "image_processor",
    "Processor": "processor",
    "mrope_positions": "rope",
    "load": "weights",
    "load_model": "weights",
    "save": "weights",
}

__all__ = [
    "Attention",
    "ImageConfig",
    "ImageInputs",
    "Model",
    "ModelConfig",
    "PackedAttention",
    "Processor",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "build",
    "load",
    "load_model",
    "mrope_positions",
    "packed_attention",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
