"""Checkpoints: a Hugging Face folder anybody can load, with what only resuming needs in a folder inside.

    checkpoints/sft_100/                 config.json, model.safetensors, tokenizer, thyme.json
    checkpoints/sft_100/trainer/         optimizer state, next step, random state
    checkpoints/sft_100/manifest.json    stage, step, where the run started, size and digest of every file

A checkpoint appears whole or not at all and is on disk when it does (`thyme.train.durable`). Which ones there are,
which are kept and which is the best is `thyme.train.retention`'s.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from thyme.model.weights import restore
from thyme.train.distributed import Ranks, World
from thyme.train.durable import fresh_name, put_folder
from thyme.train.manifest import Damaged, Manifest, Origin, list_files, read_manifest, verify, write_manifest
from thyme.train.optim import Optimizer
from thyme.train.sharded_state import load_shards, save_shards
from thyme.train.sharding import TrainedModel

TRAINER = "trainer"
SHARDS = "shards"
"""In it: the optimizer's state, where several ranks wrote it. Either form is read by any number of ranks."""


class SaveError(ValueError):
    """A checkpoint could not be written; what was there before is as it was."""


def write(
    folder: Path,
    save_model: Callable[[Path], object],
    optimizer: Optimizer,
    *,
    world: World | None = None,
    stage: str,
    step: int,
    memory: dict[str, Any],
    origin: Origin | None = None,
    score: float | None = None,
) -> None:
    """Writes a checkpoint, replacing what `folder` held once the new one is complete.

    Args:
        folder: becomes the checkpoint.
        save_model: writes the model to the folder it is given, which is empty.
        optimizer: its state.
        world: the ranks that write together, on a file system that all of them see.
        stage: the stage's name.
        step: the next step to run.
        memory: what the stage itself must remember; plain numbers, strings, lists and dicts.
        origin: what the run was started from.
        score: see `Manifest.score`.

    Raises:
        SaveError: no room, no permission; says why, on every rank.
    """
    world = world or World()
    fresh = world.from_main(fresh_name(folder))

    def begin() -> None:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_model(fresh)
        (fresh / TRAINER).mkdir()

    def finish() -> None:
        files = list_files(fresh)
        manifest = Manifest(stage=stage, step=step, origin=origin or Origin(), score=score, files=files)
        write_manifest(fresh, manifest)
        put_folder(fresh, folder)

    try:
        world.on_main(begin)
        save_state(fresh / TRAINER, optimizer, world, step=step, memory=memory)
        world.on_main(finish)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveError(f"{folder} could not be written: {_reason(error, folder)}") from error
    finally:
        if world.is_main:
            shutil.rmtree(fresh, ignore_errors=True)


def read(folder: Path, trained: TrainedModel, optimizer: Optimizer, *, stage: str) -> tuple[int, dict[str, Any]]:
    """Puts model, optimizer and random state back to where `write` found them, after every file was verified.

    Returns:
        The next step to run, and `memory`.

    Raises:
        ValueError: `folder` is no checkpoint of this stage, a file is damaged, or model or optimizer are others.
    """
    manifest = read_manifest(folder)
    if manifest.stage != stage:
        raise ValueError(f"{folder} is a checkpoint of stage {manifest.stage!r}, not of {stage!r}")
    if not any(name.startswith(f"{TRAINER}/") for name in manifest.files):
        raise Damaged(f"{folder} cannot be resumed from: it was written without {TRAINER}/")
    verify(folder, manifest, digests=True)
    restore(trained.full, folder)
    trained.reload()
    return load_state(folder / TRAINER, optimizer, trained.world)


def save_state(folder: Path, optimizer: Optimizer, world: World, *, step: int, memory: dict[str, Any]) -> None:
    """Writes optimizer state, step, random state and memory into a folder."""
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    state: dict[str, Any] = {"step": step, "random_state": random_state, "memory": memory}
    if isinstance(world, Ranks):
        save_shards(folder / SHARDS, optimizer, world)
        state["parts"] = sorted(optimizer.state_dict())
    else:
        state["optimizer"] = optimizer.state_dict()
    world.on_main(lambda: torch.save(state, folder / "state.pt"))


def load_state(folder: Path, optimizer: Optimizer, world: World) -> tuple[int, dict[str, Any]]:
    """What `save_state` wrote; the optimizer and torch's generators take theirs.

    Returns:
        The next step to run, and `memory`.
    """
    # Of a whole state each rank needs a part only.
    mmap = isinstance(world, Ranks)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=mmap)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    else:
        ranks = world if isinstance(world, Ranks) else None
        load_shards(folder / SHARDS, optimizer, ranks, parts=state["parts"])
    torch.set_rng_state(state["random_state"]["cpu"])
    if "cuda" in state["random_state"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_state"]["cuda"])
    return state["step"], state["memory"]


def _reason(error: Exception, folder: Path) -> str:
    """In a few words; what torch says of a full disk spans lines and names none."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    near = next((p for p in folder.parents if p.exists()), None)
    free = f" ({shutil.disk_usage(near).free / 2**20:.0f} MiB are free there)" if near is not None else ""
    return words + free
