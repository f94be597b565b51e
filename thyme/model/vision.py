"""The vision tower of Qwen2.5-VL: patches in, one feature per merged square of patches out.

P patches of all images of a call, M = P / merge^2 features. Inside the tower the merged squares of an image are
ordered window by window, windows of equal size next to each other, so that windowed attention is a few batched calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thyme.kernels.mrope import mrope
from thyme.model.attention import packed_attention
from thyme.model.config import VisionConfig
from thyme.model.layers import MIN_ROWS, GatedMLP, RMSNorm
from thyme.model.rope import Grid

_EPS = 1e-6  # of every norm in the tower; fixed in Qwen2.5-VL


@dataclass(frozen=True, slots=True)
class GridLayout:
    """What depends on an image's grid alone."""

    order: Tensor
    """[m] i64: merged square (raster order) at each place of the window order."""
    windows: tuple[int, ...]
    """Patches of each window, in window order."""
    cos: Tensor
    """[p, 1, D / 2] float32, rows in window order."""
    sin: Tensor
    """Likewise."""


@lru_cache(maxsize=256)
def grid_layout(config: VisionConfig, grid: Grid, device: torch.device) -> GridLayout:
    """Window order and rotary tables of an image with this grid, on the device; kept for the last 256 grids."""
    _, rows, columns = grid
    merge, side = config.spatial_merge_size, config.window_tokens
    unit = merge * merge
    y, x = torch.meshgrid(torch.arange(rows // merge), torch.arange(columns // merge), indexing="ij")
    across = -(-(columns // merge) // side)
    window = ((y // side) * across + x // side).flatten()
    size = window.bincount()
    order = torch.argsort(window - size[window] * len(size), stable=True)  # larger windows first, then raster order
    windows = size.sort(descending=True, stable=True).values * unit

    # Half of the frequencies follow the patch row, half the column.
    quarter = config.head_dim // 4
    inverse = 1.0 / 1e4 ** (torch.arange(0, 2 * quarter, 2, dtype=torch.float32) / (2 * quarter))
    inner = torch.arange(unit)
    row = (y.flatten()[order, None] * merge + inner // merge).flatten()
    column = (x.flatten()[order, None] * merge + inner % merge).flatten()
    angles = torch.cat((row[:, None] * inverse, column[:, None] * inverse), dim=1)
    cos, sin = angles.cos()[:, None].to(device), angles.sin()[:, None].to(device)
    return GridLayout(order.to(device), tuple(windows.tolist()), cos, sin)


class VisionAttention(nn.Module):
    """Attention without a mask among the patches of a window, or of a whole image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        """What the patches gather from each other.

        Args:
            x: [P, hidden_size], normalized.
            cos, sin: [P, 1, D / 2] float32, the patches' rotary tables.
            lengths: patches of each window or image, one after another.

        Returns:
            [P, hidden_size], to be added to the residual stream.
        """
        qkv = self.qkv(x).view(len(x), 3 * self.num_heads, self.head_dim)
        qk, v = qkv.split((2 * self.num_heads, self.num_heads), 1)
        q, k = mrope(qk, cos, sin).chunk(2, 1)
        return self.proj(packed_attention(q, k, v, lengths, causal=False).flatten(1))


class VisionBlock(nn.Module):
    """(delta, stream) to (delta, stream), as in the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, _EPS)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, _EPS)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(
        self, delta: Tensor | None, stream: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            delta: [P, hidden_size], what the block before has yet to add to the stream; None before the first.
            stream: [P, hidden_size], the residual stream.
            cos, sin: [P, 1, D / 2] float32, the patches' rotary tables.
            lengths: patches that attend to each other, one group after another.

        Returns:
            (delta, stream) of this block, [P, hidden_size] each.
        """
        x, stream = self.norm1.add(delta, stream)
        x, stream = self.norm2.add(self.attn(x, cos, sin, lengths), stream)
        return self.mlp(x), stream


class PatchMerger(nn.Module):
    """Each square of merge^2 patches becomes one feature of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm = RMSNorm(config.hidden_size, _EPS)
        self.up = nn.Linear(self.width, self.width)
        self.down = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, delta: Tensor | None, stream: Tensor) -> Tensor:
        """(delta, stream) of the last block, [P, hidden_size] -> [M, out_hidden_size]."""
        x, _ = self.norm.add(delta, stream)
        rows = x = x.view(-1, self.width)
        if x.device.type == "cpu" and len(x) < MIN_ROWS:  # a picture encoded alone has the bits it has among others
            rows = F.pad(x, (0, 0, 0, MIN_ROWS - len(x)))
        return self.down(F.gelu(self.up(rows)))[: len(x)]


class VisionTower(nn.Module):
    """Patch embedding, blocks and merger. Most blocks attend within windows, a few over whole images."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # A convolution whose stride is its kernel is a matmul over flattened patches.
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.recomputes = False
        """Of a block only its inputs are kept for the backward pass, which computes the block once more."""

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values [P, patch_dim] of the images one after another -> features [M, out_hidden_size], in order.

        Raises:
            ValueError: a grid of several frames or with sides that can't be merged, or pixel_values that do not fit
                the grids.
        """
        config = self.config
        merge = config.spatial_merge_size
        unit = merge * merge
        for frames, rows, columns in grids:
            if frames != 1:
                raise ValueError(f"encode_images: videos are not supported, got a grid of {frames} frames")
            if rows < merge or columns < merge or rows % merge or columns % merge:
                raise ValueError(f"encode_images: a {rows}x{columns} grid; both sides must be multiples of {merge}")
        sizes = [rows * columns for _, rows, columns in grids]
        if pixel_values.ndim != 2 or pixel_values.shape != (sum(sizes), config.patch_dim):
            raise ValueError(
                f"encode_images: the grids ask for pixel_values [{sum(sizes)}, {config.patch_dim}], "
                f"got {list(pixel_values.shape)}"
            )
        if pixel_values.device.type == "cpu" and 0 < len(pixel_values) < MIN_ROWS:
            blank = (1, merge, -(-MIN_ROWS // unit) * merge)
            patches = F.pad(pixel_values, (0, 0, 0, blank[1] * blank[2]))
            return self(patches, [*grids, blank])[: len(pixel_values) // unit]
        layouts = [grid_layout(config, grid, pixel_values.device) for grid in map(_as_grid, grids)]
        windows = [length for layout in layouts for length in layout.windows]
        cos, sin = (torch.cat([getattr(layout, name) for layout in layouts]) for name in ("cos", "sin"))
        # Where every image is one window, window order is raster order.
        is_raster = all(len(layout.windows) == 1 for layout in layouts)

        x = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        if not is_raster:
            order = _concatenated_order(layouts, sizes, unit)
            x = x.view(-1, unit, config.hidden_size).index_select(0, order).view(-1, config.hidden_size)
        delta, stream = None, x
        for index, block in enumerate(self.blocks):
            lengths = sizes if index in config.fullatt_block_indexes else windows
            if self.recomputes and torch.is_grad_enabled():
                delta, stream = checkpoint(block, delta, stream, cos, sin, lengths, use_reentrant=False)
            else:
                delta, stream = block(delta, stream, cos, sin, lengths)
        features: Tensor = self.merger(delta, stream)
        return features if is_raster else features.index_select(0, torch.argsort(order))


def _as_grid(grid: Sequence[int]) -> Grid:
    frames, rows, columns = grid
    return (int(frames), int(rows), int(columns))


def _concatenated_order(layouts: Sequence[GridLayout], sizes: Sequence[int], unit: int) -> Tensor:
    """Window order of all images of a call, in merged squares counted over the call."""
    first = 0
    parts: list[Tensor] = []
    for layout, size in zip(layouts, sizes, strict=True):
        parts.append(layout.order + first)
        first += size // unit
    return torch.cat(parts)
