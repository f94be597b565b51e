"""A global batch over the ranks: which rank takes what, and how all of them come to the same number of passes.

What is dealt is dealt by length, samples by their tokens and questions by what their rollouts may come to. Only the
balance hangs on it, never the result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from PIL import Image

from thyme.model.config import VisionConfig
from thyme.model.processor import Processor
from thyme.rollout.types import Question
from thyme.train.distributed import World
from thyme.train.packing import TrainBatch
from thyme.train.sharding import TrainedModel

T = TypeVar("T")

CHARACTERS_PER_TOKEN = 4
"""Of text, about."""


def shares(lengths: Sequence[float], size: int) -> list[list[int]]:
    """Deals items to `size` ranks: the longest first, each to the rank that has least so far (the lowest of several).

    Args:
        lengths: of the items. Equal ones are dealt in their order, so the same lengths are dealt alike everywhere.
        size: ranks.

    Returns:
        The items' indices by rank, ascending. A rank may get none.
    """
    loads = [(0.0, rank) for rank in range(size)]
    taken: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        taken[rank].append(index)
        heapq.heappush(loads, (load + lengths[index], rank))
    return [sorted(indices) for indices in taken]


def share_of(items: Sequence[T], lengths: Sequence[float], world: World) -> list[T]:
    """This rank's part of a global batch, in order: all of it where the world is one process."""
    return [items[index] for index in shares(lengths, world.size)[world.rank]]


def question_length(processor: Processor, question: Question, expected_tokens: float) -> float:
    """About the tokens of a rollout of this question.

    Args:
        expected_tokens: of the response; the same for all questions, since nothing tells them apart beforehand.
    """
    text = len(question.question) / CHARACTERS_PER_TOKEN
    return text + expected_tokens + sum(_image_tokens(processor, image) for _, image in question.pictures)


def _image_tokens(processor: Processor, image: Image.Image) -> int:
    config = processor.image_config
    if config is None:
        return 0
    height, width = processor.size_of(image)
    return height * width // (config.patch_size * config.merge_size) ** 2


def aligned(batches: Sequence[TrainBatch], trained: TrainedModel) -> list[TrainBatch]:
    """This rank's micro-batches such that the n-th pass runs the same blocks on every rank.

    A rank with fewer micro-batches than another gets empty ones, which train nothing. Where a micro-batch has no
    picture and another rank's has one, the vision tower runs over one blank feature that goes nowhere.

    Returns:
        As many micro-batches on every rank; `batches` as they are in a world of one.
    """
    if trained.world.size == 1:
        return list(batches)
    have = trained.world.gather([batch.pixel_values is not None for batch in batches])
    out: list[TrainBatch] = []
    for index in range(max(map(len, have))):
        batch = batches[index] if index < len(batches) else _empty()
        sees = any(index < len(flags) and flags[index] for flags in have)
        vision = trained.module.config.vision
        if sees and batch.pixel_values is None and vision is not None:
            batch = _with_blank(batch, vision)
        out.append(batch)
    return out


def _empty() -> TrainBatch:
    """A sequence of two tokens in which nothing is trained: every op of a pass runs, over no rows."""
    floats = torch.zeros(0)
    return TrainBatch(
        input_ids=torch.zeros(2, dtype=torch.int64),
        positions=torch.arange(2).repeat(3, 1),
        lengths=(2,),
        pixel_values=None,
        grids=(),
        image_positions=None,
        feature_rows=None,
        rows=torch.zeros(0, dtype=torch.int64),
        targets=torch.zeros(0, dtype=torch.int64),
        weights=floats,
        cu_seqlens=torch.zeros(2, dtype=torch.int32),
        advantages=floats,
        temperatures=floats,
        old_logprobs=floats,
        rollout_logprobs=floats,
        segments=torch.zeros(0, dtype=torch.uint8),
    )


def _with_blank(batch: TrainBatch, vision: VisionConfig) -> TrainBatch:
    merge = vision.spatial_merge_size
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        batch,
        pixel_values=torch.zeros(merge * merge, vision.patch_dim),
        grids=((1, merge, merge),),
        image_positions=none,
        feature_rows=none,
    )
