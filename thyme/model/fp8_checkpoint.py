"""Weights in 8 bits, as released fp8 checkpoints have them: read, widened, their scales kept for the engine.

Beside `x.weight` in e4m3 lies `x.weight_scale_inv` [ceil(N / 128), ceil(K / 128)], what a code is multiplied by; and
config.json says how they were made:

    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thyme.kernels.fp8 import BLOCK, dequantize_weight, num_blocks
from thyme.model.hub_names import Piece

SCALE = "_scale_inv"
"""What the scales' name has after the weight's."""
CODES = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16")


def check_quantization(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where config.json names weights of few bits that are not e4m3 in blocks of 128 x 128."""
    said = config.get("quantization_config")
    if said is None:
        return
    method, fmt, block = said.get("quant_method"), said.get("fmt", "e4m3"), said.get("weight_block_size")
    if method != "fp8" or fmt != "e4m3" or block != [BLOCK, BLOCK]:
        raise ValueError(
            f"{folder}: config.json's quantization_config has quant_method {method!r}, fmt {fmt!r}, weight_block_size "
            f"{block}; supported: fp8, e4m3, [{BLOCK}, {BLOCK}]. Take the checkpoint in bfloat16"
        )


def check_scales(stored: Mapping[str, tuple[Any, str]], piece: Piece, folder: Path) -> None:
    """Raises ValueError unless the scales of a weight in 8 bits are there, one for each of its blocks."""
    name = piece.name + SCALE
    if name not in stored:
        raise ValueError(f"{folder}: {piece.name} is in {CODES}, but the checkpoint misses its scales, {name}")
    file, key = stored[name]
    view = file.get_slice(key)
    wanted, found = [num_blocks(size) for size in piece.shape], list(view.get_shape())
    if found != wanted:
        raise ValueError(
            f"{folder}: {name} has shape {found}, {piece.name} of {list(piece.shape)} has {wanted} blocks of {BLOCK} x "
            f"{BLOCK}"
        )
    if view.get_dtype() not in _SCALE_DTYPES:
        raise ValueError(f"{folder}: {name} is stored as {view.get_dtype()}; supported: {', '.join(_SCALE_DTYPES)}")


def widened(stored: Mapping[str, tuple[Any, str]], piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the weight in `dtype`, its scales in float32), of a piece that was checked."""
    (file, key), (scale_file, scale_key) = stored[piece.name], stored[piece.name + SCALE]
    scales = scale_file.get_tensor(scale_key).float()
    return dequantize_weight(file.get_tensor(key), scales, dtype), scales


def joined(pieces: Sequence[Piece], scales: Sequence[Tensor]) -> Tensor | None:
    """The scales of one of our parameters, of those of its pieces in the order of rows; None where pieces begin inside
    of blocks, so that the engine must quantize the whole anew."""
    if any(piece.rows.start % BLOCK for piece in pieces):
        return None
    return torch.cat(list(scales))
