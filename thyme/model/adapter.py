"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, in and out."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thyme.model.config import LORA_TARGETS, LoraConfig
from thyme.model.hf import read_json
from thyme.model.hub_names import hub_name, pieces
from thyme.model.lora import add_adapters, lora_modules
from thyme.model.model import Model

ADAPTER_FOLDER = "adapter"
"""Where a checkpoint of a model with adapters has them, beside its merged weights."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<kind>[AB])\.weight$")
# What PEFT can do and these adapters cannot, where it has another value than this.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others change the weights beneath
}


def save_adapter(model: Model, folder: str | os.PathLike[str]) -> None:
    """Writes the model's adapters so that PEFT reads them over the model without them.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.lora is None:
        raise ValueError("save_adapter: the model has no adapters")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(model).items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    lora = model.lora
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.lora_base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        # The vision tower's MLPs have projections of the same names.
        "exclude_modules": r"(.*\.)?visual\..*" if model.config.vision is not None else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def load_adapter(model: Model, folder: str | os.PathLike[str]) -> None:
    """Adds the adapters of a PEFT folder to a model that has none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of adapter, adapters on what is no projection of the decoder, or of other sizes.
    """
    folder = Path(folder)
    source = read_adapter_config(folder)
    add_adapters(model, source, base=str(read_json(folder / _CONFIG).get("base_model_name_or_path") or ""))
    fill_adapters(model, folder)


def read_adapter_config(folder: Path) -> LoraConfig:
    """What adapter_config.json says, its targets being those that the weights have.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`.
    """
    content = read_json(folder / _CONFIG)
    for key, plain in _PLAIN.items():
        if content.get(key, plain[0]) not in plain:
            raise ValueError(f"{folder / _CONFIG}: {key} = {content[key]!r} is not supported, only {plain[0]!r}")
    rank = content.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{folder / _CONFIG}: r = {rank!r} must be a rank of at least 1")
    paths = [match["path"] for key in _stored(folder) if (match := _KEY.match(key))]
    found = {path.rpartition(".")[2] for path in paths}
    if unknown := sorted(found - set(LORA_TARGETS)):
        raise ValueError(f"{folder}: an adapter on {unknown[0]!r}: supported are {', '.join(LORA_TARGETS)}")
    return LoraConfig(
        rank=rank,
        alpha=float(content.get("lora_alpha", 8)),
        rslora=bool(content.get("use_rslora")),
        targets=tuple(target for target in LORA_TARGETS if target in found),
    )


@torch.no_grad()
def fill_adapters(model: Model, folder: Path) -> None:
    """Copies a folder's adapters into those the model has; they must be the same ones.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: other adapters than the model's.
    """
    asked, said = model.lora, read_adapter_config(folder)
    same = asked is not None and (said.rank, said.scale) == (asked.rank, asked.scale)
    if not same or asked is None or set(said.targets) != set(asked.targets):
        raise ValueError(f"{folder}: its adapters are {said}, the model's {asked}")
    stored, wanted = _stored(folder), _tensors(model)
    wanted = {hub_name(key.removeprefix(_PREFIX)): tensor for key, tensor in wanted.items()}
    for problem, keys in (("misses", wanted.keys() - stored.keys()), ("has unexpected", stored.keys() - wanted.keys())):
        if keys:
            first, *rest = sorted(keys)
            raise ValueError(f"{folder}: the adapter {problem} {first}" + (f" and {len(rest)} more" if rest else ""))
    for key, tensor in wanted.items():
        if stored[key].shape != tensor.shape:
            raise ValueError(f"{folder}: {key} has shape {list(stored[key].shape)}, not {list(tensor.shape)}")
    for key, tensor in wanted.items():
        tensor.copy_(stored[key])


def _stored(folder: Path) -> dict[str, Tensor]:
    """The file's tensors under the hub's names."""
    path = folder / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {_WEIGHTS}")
    try:
        return {hub_name(key.removeprefix(_PREFIX)): tensor for key, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file: {error}") from error


def _tensors(model: Model) -> dict[str, Tensor]:
    """The adapters as views, under the names that PEFT gives them over transformers' model."""
    out: dict[str, Tensor] = {}
    for name, module in lora_modules(model):
        held = pieces(model.config, f"{name}.weight", module.weight.shape)
        by_target = {path.rpartition(".")[2]: path for path in (piece.name.removesuffix(".weight") for piece in held)}
        for target, (a, b) in module.adapters().items():
            path = by_target[target]
            if model.config.vision is not None:  # where transformers has the decoder of a model with vision
                path = path.replace("model.", "model.language_model.", 1)
            out |= {f"{_PREFIX}{path}.lora_A.weight": a, f"{_PREFIX}{path}.lora_B.weight": b}
    return out
