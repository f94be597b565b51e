"""Checkpoints: a Hugging Face folder anybody can load, and beside it what only resuming needs.

    checkpoints/sft_100/model/      the model's folder
    checkpoints/sft_100/trainer.pt  optimizer state, next step, random state

A checkpoint appears whole or not at all: it is written under a temporary name and renamed.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thyme.model.weights import restore
from thyme.train.optim import Optimizer
from thyme.train.sharding import TrainedModel


def write(
    folder: Path,
    save_model: Callable[[Path], object],
    optimizer: Optimizer,
    *,
    step: int,
    memory: dict[str, Any],
) -> None:
    """Writes a checkpoint, replacing what `folder` held.

    Args:
        folder: becomes the checkpoint.
        save_model: writes the model to the folder it is given, here `folder/model`.
        optimizer: its state.
        step: the next step to run.
        memory: what the stage itself must remember; plain numbers, strings, lists and dicts.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    temporary.mkdir(parents=True)
    try:
        save_model(temporary / "model")
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        state = {"optimizer": optimizer.state_dict(), "step": step, "random_state": random_state, "memory": memory}
        torch.save(state, temporary / "trainer.pt")
        if folder.exists():
            folder.rename(stale)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def read(folder: Path, trained: TrainedModel, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Puts model, optimizer and random state back to where `write` found them.

    Returns:
        The next step to run, and `memory`.

    Raises:
        ValueError: `folder` is no checkpoint.
    """
    if not (folder / "trainer.pt").is_file():
        raise ValueError(f"{folder} is no checkpoint to resume from: it has no trainer.pt")
    restore(trained.full, folder / "model")
    trained.reload()
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"]["cpu"])
    if "cuda" in state["random_state"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_state"]["cuda"])
    return state["step"], state["memory"]
