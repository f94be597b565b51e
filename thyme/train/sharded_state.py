"""The optimizer's state of several ranks on disk: each writes its shards, and any number of ranks reads them.

torch.distributed.checkpoint's format: `.metadata`, and files of each rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from thyme.train.optim import Optimizer, State

if TYPE_CHECKING:
    from thyme.train.distributed import Ranks

_JOIN = "|"


def save_shards(folder: Path, optimizer: Optimizer, world: Ranks) -> None:
    """Writes the state into `folder`, which all ranks see; called by all of them together.

    Raises:
        RuntimeError: it could not be written; on every rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    parts = optimizer.state_dict().items()
    flat = {f"{part}{_JOIN}{key}": value for part, values in parts for key, value in values.items()}
    try:
        save(flat, checkpoint_id=folder, process_group=world.objects)
    except CheckpointException as error:  # which is no Exception
        raise RuntimeError("; ".join(f"rank {rank}: {text}" for rank, (text, _) in error.failures.items())) from None


def load_shards(folder: Path, optimizer: Optimizer, world: Ranks | None, *, parts: Sequence[str]) -> None:
    """Gives the optimizer the state in `folder`, whatever number of ranks wrote it.

    Args:
        parts: keys of the state that was written; before the first step there is nothing of an optimizer but its name.
        world: the ranks that read it together; None: this process alone.

    Raises:
        ValueError: the state is another optimizer's, or of another layout.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    masters = sum(key.startswith(f"masters{_JOIN}") for key in stored)
    optimizer.check_layout(set(parts) - {"masters"}, masters)
    flat: dict[str, Tensor] = {}
    for key, entry in stored.items():
        assert isinstance(entry, TensorStorageMetadata)
        name = key.partition(_JOIN)[2].partition(":")[0]
        flat[key] = optimizer.room_for(name, entry.size, entry.properties.dtype)
    if world is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            load(flat, checkpoint_id=folder, no_dist=True)
    else:
        load(flat, checkpoint_id=folder, process_group=world.objects)
    state: State = {part: {} for part in parts}
    for key, value in flat.items():
        part, _, rest = key.partition(_JOIN)
        state[part][rest] = value
    optimizer.load_state_dict(state)
