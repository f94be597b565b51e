"""What the trainer gave each trained token of a batch, kept beside what the engine recorded, for who looks at both."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from thyme.rollout.types import Rollout
from thyme.train.packing import TrainBatch

COLUMN = "trainer_logprobs"

TrainerLogprobs = Mapping[str, NDArray[np.float32]]
"""By name of a sample, the log-probs of its trained tokens."""


def trainer_logprobs(batches: Sequence[Sequence[TrainBatch]]) -> dict[str, NDArray[np.float32]]:
    """By name of a sample, the old log-probs of its trained tokens in order, at their temperatures.

    Nothing where they were not computed (`RlConfig.needs_old_logprobs`), and of a name that two samples share.
    """
    found: dict[str, NDArray[np.float32]] = {}
    names: Counter[str] = Counter()
    for batch in (batch for part in batches for batch in part):
        names.update(batch.names)
        if batch.old_logprobs is not None:
            parts = batch.old_logprobs.float().cpu().split(batch.cu_seqlens.diff().tolist())
            found |= {name: part.numpy() for name, part in zip(batch.names, parts, strict=True)}
    return {name: part for name, part in found.items() if names[name] == 1}


def trainer_columns(rollouts: Sequence[Rollout], found: TrainerLogprobs) -> list[dict[str, list[float | None]]]:
    """A column for each rollout's record: [T] None where the policy drew nothing; none for one that was not trained.

    Args:
        found: as `trainer_logprobs` gives them.
    """
    columns: list[dict[str, list[float | None]]] = []
    for rollout in rollouts:
        given = found.get(f"{rollout.question.id}/{rollout.index}")
        if given is None or len(given) != rollout.num_sampled:
            columns.append({})
            continue
        column: list[float | None] = [None] * len(rollout.token_ids)
        for place, value in zip(np.flatnonzero(rollout.sampled).tolist(), given.astype("U16"), strict=True):
            column[place] = float(value)  # the shortest decimal that reads back as the same float32
        columns.append({COLUMN: column})
    return columns
