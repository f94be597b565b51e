"""One model definition for engine and trainer, its checkpoints and its processor. Names are imported on first use."""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.model.adapter import load_adapter as load_adapter
    from thyme.model.adapter import save_adapter as save_adapter
    from thyme.model.attention import Attention as Attention
    from thyme.model.attention import PackedAttention as PackedAttention
    from thyme.model.attention import packed_attention as packed_attention
    from thyme.model.config import ImageConfig as ImageConfig
    from thyme.model.config import LoraConfig as LoraConfig
    from thyme.model.config import ModelConfig as ModelConfig
    from thyme.model.config import RopeScaling as RopeScaling
    from thyme.model.config import TextConfig as TextConfig
    from thyme.model.config import VisionConfig as VisionConfig
    from thyme.model.image_processor import ImageInputs as ImageInputs
    from thyme.model.lora import add_adapters as add_adapters
    from thyme.model.lora import merge_adapters as merge_adapters
    from thyme.model.model import Model as Model
    from thyme.model.model import build as build
    from thyme.model.processor import Processor as Processor
    from thyme.model.rope import mrope_positions as mrope_positions
    from thyme.model.weights import load as load
    from thyme.model.weights import load_model as load_model
    from thyme.model.weights import save as save
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "adapter": ["load_adapter", "save_adapter"],
            "attention": ["Attention", "PackedAttention", "packed_attention"],
            "config": ["ImageConfig", "LoraConfig", "ModelConfig", "RopeScaling", "TextConfig", "VisionConfig"],
            "image_processor": ["ImageInputs"],
            "lora": ["add_adapters", "merge_adapters"],
            "model": ["Model", "build"],
            "processor": ["Processor"],
            "rope": ["mrope_positions"],
            "weights": ["load", "load_model", "save"],
        },
    )
