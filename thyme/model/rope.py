"""Positions and frequencies of the rotary embedding, which is thyme.kernels.mrope.

M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): a token has a time, a height and a width position; each rotary
frequency follows one of the three. Text has the three equal, so it is plain RoPE there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thyme.model.config import TextConfig

Grid = tuple[int, int, int]
"""Frames, patch rows, patch columns of one image."""


def mrope_positions(
    input_ids: Sequence[int] | np.ndarray,
    grids: Sequence[Grid],
    *,
    image_token_id: int | None,
    spatial_merge_size: int,
    start: int = 0,
) -> tuple[np.ndarray, int]:
    """Positions of the tokens of one sequence, or of a part that continues it.

    An image's tokens get (frame, row, column) counted from the position where the image begins; the text after it goes
    on at the largest of these plus one.

    Args:
        input_ids: T ids, images already expanded to one image id per feature.
        grids: the images' patch grids, in order of appearance.
        image_token_id: id of an image feature; None for text models.
        spatial_merge_size: patches per side of one feature.
        start: position of the first token, i.e. the `next_position` of what came before.

    Returns:
        positions [3, T] i64 and the position of the token that would come next.

    Raises:
        ValueError: the image tokens do not match the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    image_at = np.flatnonzero(ids == image_token_id) if image_token_id is not None else ids[:0]
    sizes = [t * (h // spatial_merge_size) * (w // spatial_merge_size) for t, h, w in grids]
    if sum(sizes) != len(image_at):
        raise ValueError(
            f"mrope_positions: {len(image_at)} image tokens in the ids, but the {len(grids)} grids ask for {sum(sizes)}"
        )
    # Text advances by one per token; each image shifts all that follows by what it saves.
    shift = np.zeros(len(ids) + 1, dtype=np.int64)
    spans: list[tuple[int, int]] = []
    seen = 0
    for (_, height, width), size in zip(grids, sizes, strict=True):
        first = int(image_at[seen])
        if image_at[seen + size - 1] != first + size - 1:
            raise ValueError(f"mrope_positions: the {size} tokens of the image at token {first} are interrupted")
        shift[first + size] += max(height, width) // spatial_merge_size - size
        spans.append((first, size))
        seen += size
    plain = np.arange(start, start + len(ids) + 1, dtype=np.int64) + shift.cumsum()
    positions = np.repeat(plain[None, :-1], 3, axis=0)
    for (first, size), (frames, height, width) in zip(spans, grids, strict=True):
        shape = (frames, height // spatial_merge_size, width // spatial_merge_size)
        positions[:, first : first + size] = plain[first] + np.indices(shape).reshape(3, size)
    return positions, int(plain[-1])


def inverse_frequencies(config: TextConfig) -> Tensor:
    """[D / 2] float32: radians per position of each rotated pair, with Llama 3's scaling where asked for."""
    dim = config.head_dim
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    # 0 where a wavelength is long (stretch), 1 where it is short (keep), linear in the turns between.
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return inverse * (keep + (1 - keep) / scaling.factor)
