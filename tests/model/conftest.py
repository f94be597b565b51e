"""Tiny random checkpoints of the four families in transformers, and the run of one packed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thyme.model import Model, PackedAttention, mrope_positions
from thyme.model.rope import Grid

IMAGE, START, END = 10, 12, 13

TEXT = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _randomize(reference: PreTrainedModel) -> PreTrainedModel:
    # transformers starts biases at 0 and norms at 1, where a wrong or missing one would not show.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            center = 1.0 if "norm" in name or "ln_q" in name else 0.0
            p.copy_(center + 0.1 * torch.randn(p.shape, generator=generator))
    return reference.eval()


def _vision_model(vision: dict[str, Any] | None = None, tied: bool = False, **text: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    sizes = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config={**sizes, **(vision or {})},
        image_token_id=IMAGE,
        video_token_id=11,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    return _randomize(Qwen2_5_VLForConditionalGeneration(config))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _text_model(family: str) -> PreTrainedModel:
    make: dict[str, Callable[[], PreTrainedModel]] = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=24)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
        "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True)),
        "llama3": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, rope_parameters=dict(LLAMA3))),
    }
    return _randomize(make[family]())


@pytest.fixture(scope="session")
def hf_vision_model() -> Callable[..., PreTrainedModel]:
    return _vision_model


@pytest.fixture(scope="session")
def hf_text_model() -> Callable[[str], PreTrainedModel]:
    return _text_model


class Batch:
    """Sequences of text and images, as both implementations take them."""

    def __init__(self, sequences: Sequence[Sequence[Grid | int]], seed: int = 0) -> None:
        """Each sequence is a list of images (grids) and numbers of text tokens."""
        draw = np.random.default_rng(seed)
        self.ids: list[list[int]] = []
        self.grids: list[list[Grid]] = []
        for parts in sequences:
            ids: list[int] = []
            for part in parts:
                if isinstance(part, tuple):
                    ids += [START, *[IMAGE] * (part[1] * part[2] // 4), END]
                else:
                    ids += draw.integers(20, 160, part).tolist()
            self.ids.append(ids)
            self.grids.append([part for part in parts if isinstance(part, tuple)])
        self.pixels = [
            torch.tensor(draw.standard_normal((sum(h * w for _, h, w in grids), 1176)), dtype=torch.float32)
            for grids in self.grids
        ]

    def ours(self, model: Model) -> Tensor:
        """Logits [T, V], all sequences packed."""
        flat = torch.tensor([i for ids in self.ids for i in ids])
        positions = np.concatenate(
            [
                mrope_positions(ids, grids, image_token_id=IMAGE, spatial_merge_size=2)[0]
                for ids, grids in zip(self.ids, self.grids, strict=True)
            ],
            axis=1,
        )
        images: dict[str, Tensor] = {}
        if any(self.grids):
            features = model.encode_images(torch.cat(self.pixels), [grid for grids in self.grids for grid in grids])
            images = {"image_features": features, "image_positions": (flat == IMAGE).nonzero()[:, 0]}
        attention = PackedAttention([len(ids) for ids in self.ids])
        return model.logits(model(flat, torch.tensor(positions), attention, **images))

    def theirs(self, reference: PreTrainedModel) -> Tensor:
        """Logits [T, V], one sequence after another through transformers."""
        out = []
        for ids, grids, pixels in zip(self.ids, self.grids, self.pixels, strict=True):
            row = torch.tensor([ids])
            # Without mm_token_type_ids transformers silently falls back to one-dimensional positions.
            images = (
                dict(pixel_values=pixels, image_grid_thw=torch.tensor(grids), mm_token_type_ids=(row == IMAGE).int())
                if grids
                else {}
            )
            out.append(reference(input_ids=row, **images).logits[0])
        return torch.cat(out)


@pytest.fixture(scope="session")
def make_batch() -> type[Batch]:
    return Batch
