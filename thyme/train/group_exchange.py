"""Rollouts over ranks: each rank samples, scores and trains the groups of its own questions, and knows of all others'.

A group is never split. What the ranks exchange has no pictures in it: tokens, turns and rewards are enough for
advantages, denominators, metrics, and whatever a stage decides by them, so every rank decides the same. The pictures
stay where they were made, and so the samples that need them are trained there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thyme.model.image_processor import ImageInputs
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout, Turn
from thyme.train.balance import question_length, shares
from thyme.train.distributed import World
from thyme.train.group_scores import ScoredGroup


def own_questions(loop: RolloutLoop, questions: Sequence[Question], world: World) -> list[int]:
    """Indices of the questions that this rank samples, ascending: all of them in a world of one.

    Dealt by what a rollout is expected to come to: prompt, pictures, and a quarter of the token limit for each
    response, since nothing tells them apart beforehand. A question that occurs twice stays on one rank: its second
    draw counts on from its first.
    """
    if world.size == 1:
        return list(range(len(questions)))
    places: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        places.setdefault(question.id, []).append(index)
    bundles = list(places.values())
    response = loop.config.max_tokens / 4
    lengths = [len(b) * question_length(loop.processor, questions[b[0]], response) for b in bundles]
    return sorted(index for bundle in shares(lengths, world.size)[world.rank] for index in bundles[bundle])


def exchanged(groups: Sequence[ScoredGroup], own: Sequence[int], world: World) -> list[ScoredGroup]:
    """The groups of all questions, in their order, on every rank; another rank's without pictures.

    Args:
        groups: this rank's, one for each of `own`.
        own: what `own_questions` gave.
    """
    if world.size == 1:
        return list(groups)
    mine = {
        index: replace(group, rank=world.rank, rollouts=[replace(r, group=index) for r in group.rollouts])
        for index, group in zip(own, groups, strict=True)
    }
    light = {
        index: replace(group, rollouts=[_without_pictures(r) for r in group.rollouts]) for index, group in mine.items()
    }
    everywhere = {index: group for part in world.gather(light) for index, group in part.items()}
    return [mine.get(index, everywhere[index]) for index in sorted(everywhere)]


def _without_pictures(rollout: Rollout) -> Rollout:
    """The grids of its pictures stay: positions need them."""
    return replace(
        rollout,
        question=replace(rollout.question, image=None, more_images=()),
        images=[_grid_alone(image) for image in rollout.images],
        turns=[_turn_without_pictures(turn) for turn in rollout.turns],
    )


def _grid_alone(image: ImageInputs) -> ImageInputs:
    return replace(image, pixel_values=np.empty((0, image.pixel_values.shape[1]), dtype=np.float32))


def _turn_without_pictures(turn: Turn) -> Turn:
    return turn if turn.result is None else replace(turn, result=replace(turn.result, images=()))
