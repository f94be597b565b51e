"""Merge a LoRA adapter (PEFT's format) into its base model and write a Hugging Face folder that every verb takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thyme.config import POSITIONAL
from thyme.result import Result


@dataclass(frozen=True, kw_only=True)
class Config:
    """An adapter, its base, and where the merged model goes."""

    adapter: Path = field(metadata=POSITIONAL)
    """Folder with adapter_config.json and adapter_model.safetensors."""
    out: Path = field(metadata=POSITIONAL)
    """Folder that is written; it must not exist."""
    base: str = ""
    """Folder of the base model; empty: the one that adapter_config.json names."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the merged weights; each sum is computed in float32 and rounded once."""


def run(config: Config) -> Result:
    """Writes the merged model.

    Raises:
        FileNotFoundError, ValueError: `out` exists, the base is not there, or the adapter does not fit it.
    """
    import torch

    from thyme.model import load, load_adapter, merge_adapters, save
    from thyme.model.adapter import read_adapter_config
    from thyme.rollout.dialect import read_dialect, write_dialect

    if config.out.exists():
        raise ValueError(f"{config.out} exists already: give a folder that does not")
    read_adapter_config(config.adapter)  # before the weights: it is quick to fail
    base = _base(config)
    model, processor = load(base, dtype=getattr(torch, config.dtype))
    load_adapter(model, config.adapter)
    merge_adapters(model)
    save(model, processor, config.out)
    dialect = read_dialect(base)
    if dialect is not None:
        write_dialect(config.out, dialect)
    print(f"model: {config.out}")
    return Result({"model": config.out})


def _base(config: Config) -> Path:
    from thyme.model.hf import read_json
    from thyme.verbs.folders import model_folder

    named = config.base or read_json(config.adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if not named or not Path(named).is_dir():
        says = f"names the base {named!r}, which is no folder here" if named else "names no base"
        raise ValueError(f"{config.adapter}: adapter_config.json {says}: say --base FOLDER")
    return model_folder(Path(named))
