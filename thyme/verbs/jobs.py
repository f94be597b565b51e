"""What a training config asks of a machine's memory, as a job that `thyme.train.memory` plans; loads no weights."""

from pathlib import Path
from typing import Literal

from thyme.model.config import ModelConfig
from thyme.model.sizes import SIZES
from thyme.model.weights import read_config
from thyme.toy.model import tiny_config
from thyme.train.memory import Job
from thyme.verbs.config import EMBEDDED, TrainingConfig
from thyme.verbs.folders import model_folder


def job_of(
    config: TrainingConfig,
    stage: Literal["rl", "sft", "anneal"],
    *,
    itemsize: int = 2,
    gpus: int = 1,
    image_share: float = 0.4,
) -> Job:
    """The job of one stage of a config.

    Args:
        config: has the stage's table.
        stage: its name.
        itemsize, gpus, image_share: see `Job`.

    Raises:
        FileNotFoundError, ValueError: `model` is no folder with a config.json, no published size and not "tiny".
    """
    settings = getattr(config, stage)
    longest = config.engine.max_context if stage == "rl" else getattr(settings, "max_row_tokens", 0)
    return Job(
        model=model_config(config.model),
        stage=settings,
        lora=config.lora,
        itemsize=itemsize,
        gpus=gpus,
        image_share=image_share,
        longest=longest or 0,
        step_tokens=config.engine.max_batch_tokens,
        sequences=config.engine.max_sequences,
        fp8_weights=config.engine.weight_dtype == "fp8",
        fp8_cache=config.engine.kv_dtype == "fp8",
    )


def model_config(name: str) -> ModelConfig:
    """Of the embedded toy, a folder, of which only config.json is read, or a published size as it is called there or
    on the hub."""
    if name == EMBEDDED:
        return tiny_config()
    size = name.rpartition("/")[2].lower().removesuffix("-instruct")
    if size in SIZES and not Path(name).exists():
        return SIZES[size]
    if not Path(name).exists():
        raise FileNotFoundError(
            f"model {name}: no such folder, and no published size: before there is a folder, say --model and one of "
            f"{', '.join(SIZES)}"
        )
    return read_config(model_folder(Path(name)))
