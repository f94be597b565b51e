"""The one door: every verb and the demo open model and rollout loop here, and save models here.

What a checkpoint says of its dialect (`thyme.json`) wins over a recipe, what the command line says wins over both, and
where they contradict each other a line on stderr says which one is followed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thyme.engine import Engine
from thyme.heap import keep_freed_memory
from thyme.model import add_adapters, build, load, save
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.dialect import Dialect, is_released, read_dialect, write_dialect
from thyme.rollout.rollout import RolloutLoop
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config, tiny_processor
from thyme.verbs.config import EMBEDDED, LoopConfig, RunConfig, TrainingConfig
from thyme.verbs.folders import model_folder
from thyme.verbs.notes import note

EMBEDDED_DIALECT = Dialect(prompt_style="short")
"""It is too small to read the full prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model, ready to be trained or run."""

    model: Model
    processor: Processor
    """Of the run: pictures are no larger than its max_pixels."""
    own_processor: Processor
    """The checkpoint's own, which `save_model` writes."""
    dialect: Dialect
    """What it is run and trained under from here on, and what `save_model` writes beside it."""


def open_model(config: RunConfig, device: torch.device | str | None = None) -> Opened:
    """The model of the run: a folder, or the embedded toy with random weights drawn from the seed.

    Args:
        config: names it.
        device: where it goes, in bfloat16 unless that is a CPU or the model the embedded one; None: to the GPU, if
            there is one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is no model this project can load, or has no tokenizer.
    """
    torch.set_num_threads(config.threads)
    said: Dialect | None
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    if config.model == EMBEDDED:
        processor, said = tiny_processor(), EMBEDDED_DIALECT
        model = build(tiny_config(), processor, seed=config.seed, device=device)
    else:
        folder = model_folder(Path(config.model))
        said = read_dialect(folder) or _released(folder)
        model, loaded = load(folder, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
        if loaded is None:
            raise ValueError(f"model {folder}: no tokenizer: tokenizer.json belongs beside the weights")
        processor = loaded
    shown = processor if config.max_pixels is None else processor.with_max_pixels(config.max_pixels)
    return Opened(model=model, processor=shown, own_processor=processor, dialect=_dialect(config, said))


def adapted(opened: Opened, config: TrainingConfig) -> Opened:
    """The same with the adapters that `[lora]` asks for on its model; where it asks for none, as it is."""
    if config.lora.rank:
        add_adapters(opened.model, config.lora, seed=config.seed, base=config.model)
    return opened


def save_model(opened: Opened, folder: Path) -> Path:
    """Writes a Hugging Face folder that also says how the model is to be run."""
    save(opened.model, opened.own_processor, folder)
    write_dialect(folder, opened.dialect)
    return folder


@contextmanager
def open_loop(config: LoopConfig, opened: Opened) -> Iterator[RolloutLoop]:
    """Engine and sandbox around the model, in its dialect; the sandbox is closed at the end.

    Raises:
        ValueError: sandbox.compat contradicts the dialect; a limit that the engine, loop or sandbox refuses.
        SandboxUnavailable: the machine lacks what the sandbox stands on.
    """
    compat = opened.dialect.compat
    if config.sandbox.compat not in ("none", compat):
        raise ValueError(
            f"sandbox.compat: {config.sandbox.compat!r}, but the model's dialect is {compat!r}: say rollout.compat, "
            "which decides wording and rewriting together"
        )
    rollout = replace(config.rollout, prompt_style=opened.dialect.prompt_style, compat=compat)
    with Sandbox(replace(config.sandbox, compat=compat)) as sandbox:
        engine = Engine(opened.model, config.engine, processor=opened.processor, phases=rollout.known_phases)
        yield RolloutLoop(engine, sandbox, opened.processor, rollout)


def _released(folder: Path) -> Dialect | None:
    """The dialect of a released checkpoint, said aloud since only its name or card tells that it is one."""
    if not is_released(folder):
        return None
    note(
        f"model {folder}: a released Thyme checkpoint: its code is rewritten and its errors are worded as the "
        'released sandbox does (a thyme.json beside it with {"compat": "none"} turns that off)'
    )
    return Dialect(compat="released")


def _dialect(config: RunConfig, said: Dialect | None) -> Dialect:
    """The checkpoint's dialect, where the command line does not say otherwise; the config's where it is silent."""
    wanted = config.rollout if isinstance(config, LoopConfig) else RolloutConfig()
    if said is None:
        return Dialect(prompt_style=wanted.prompt_style, compat=wanted.compat)
    chosen = said
    for name in ("prompt_style", "compat"):
        asked, theirs = getattr(wanted, name), getattr(said, name)
        origin = config.origins.get(f"rollout.{name}")
        if origin is None or asked == theirs:
            continue
        follow = asked if origin == "the command line" else theirs
        chosen = replace(chosen, **{name: follow})
        note(
            f"{origin} says rollout.{name} = {asked!r}, model {config.model} was trained under {theirs!r}: "
            f"following {follow!r}"
        )
    return chosen
