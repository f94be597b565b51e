"""Checkpoints: Hugging Face folders in, Hugging Face folders out.

Names and shapes are brought to the hub's by thyme.model.hub_names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thyme.model.adapter import ADAPTER_FOLDER, fill_adapters, save_adapter
from thyme.model.config import ModelConfig
from thyme.model.fp8_checkpoint import CODES, SCALE, check_quantization, check_scales, joined, widened
from thyme.model.hf import as_ids, model_config_from_hf, model_config_to_hf, read_json
from thyme.model.hub_names import hub_name, pieces
from thyme.model.lora import merged_parameters
from thyme.model.model import Model, attach, build, empty
from thyme.model.processor import Processor

# Buffers that old Llama checkpoints carry are computed here.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    path_or_config: str | os.PathLike[str] | ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Model, Processor | None]:
    """A model and its processor, from a Hugging Face folder or, with random weights (seed 0), from a config.

    Args:
        path_or_config: folder with config.json, *.safetensors and a tokenizer; or a ModelConfig, for which the
            processor is None.
        device: where the weights go.
        dtype: what the weights become, whatever they are on disk.

    Raises:
        FileNotFoundError: the folder or a file it needs is missing.
        ValueError: another architecture, or weights that do not fit the config to the last tensor.
    """
    if isinstance(path_or_config, ModelConfig):
        return build(path_or_config, device=device, dtype=dtype), None
    folder = Path(path_or_config)
    config = read_config(folder)
    processor = Processor.load(folder)  # before the weights: it is quick to fail
    model = load_model(folder, device, dtype, config=config)
    attach(model, processor)
    return model, processor


def read_config(folder: Path) -> ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where that names some."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}: give a folder with config.json and *.safetensors")
    said = read_json(folder / "config.json")
    check_quantization(said, folder)
    config = model_config_from_hf(said)
    generation = folder / "generation_config.json"
    eos = as_ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
    return config.with_eos(eos) if eos else config


def load_model(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    config: ModelConfig | None = None,
) -> Model:
    """The model alone, without a tokenizer.

    Args:
        folder: with *.safetensors and, unless `config` is given, config.json.
        device, dtype: as in `load`.
        config: used in place of config.json.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    folder = Path(folder)
    model = empty(config or read_config(folder), device, dtype)
    _read(model, folder)
    return model


def save(model: Model, processor: Processor | None, folder: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face folder, whole or not at all: into a temporary neighbor first, then renamed.

    An earlier checkpoint at `folder` is replaced. Of a model with adapters the weights are written merged, for any
    reader, and the adapters beside them in `adapter/`, in PEFT's format and to the bit.

    Raises:
        ValueError: `folder` exists and is no checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and not (folder.is_dir() and _is_empty(folder)):
        raise ValueError(f"{folder} exists and is no checkpoint: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        _write(model, processor, fresh)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    finally:
        if stale.exists() and not folder.exists():
            stale.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def restore(model: Model, folder: str | os.PathLike[str]) -> None:
    """Puts back, in place, what `save` wrote of this model or of one like it: its adapters where it has some.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    if model.lora is not None:
        fill_adapters(model, Path(folder) / ADAPTER_FOLDER)
    else:
        _read(model, Path(folder))


def hub_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under the hub's names and in its shapes, as views where that is possible; merged with its
    adapters where it has some."""
    for name, value in merged_parameters(model):
        for piece in pieces(model.config, name, value.shape):
            yield piece.name, value[piece.rows].view(piece.shape)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: weight_map must name files of the same folder")
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; weights are read from safetensors only")
    return [folder / name for name in names]


def _read(model: Model, folder: Path) -> None:
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
            _fill(model, {hub_name(key): (file, key) for file in files for key in file.keys()}, folder)  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged safetensors file: {error}") from error


@torch.no_grad()
def _fill(model: Model, stored: dict[str, tuple[Any, str]], folder: Path) -> None:
    """Copies every stored tensor into the parameter it belongs to, after all names and shapes were checked."""
    wanted = [(p, piece) for name, p in model.named_parameters() for piece in pieces(model.config, name, p.shape)]
    names = {piece.name for _, piece in wanted}
    in_8_bits = {name for name in names & stored.keys() if _dtype_of(stored, name) == CODES}
    scales = {name + SCALE for name in in_8_bits}
    spare = {key for key in stored.keys() - names - scales if not _COMPUTED.search(key)}
    tied_head = model.lm_head is None and _LM_HEAD in spare and _EMBEDDING in stored
    if tied_head:
        spare.remove(_LM_HEAD)
    for problem, keys in (("misses", names - stored.keys()), ("has unexpected", spare)):
        if keys:
            first, *rest = sorted(keys)
            raise ValueError(f"{folder}: the checkpoint {problem} {first}" + (f" and {len(rest)} more" if rest else ""))
    for _, piece in wanted:
        file, key = stored[piece.name]
        view = file.get_slice(key)
        if tuple(view.get_shape()) != piece.shape:
            raise ValueError(
                f"{folder}: {piece.name} has shape {list(view.get_shape())}, config.json asks for {list(piece.shape)}"
            )
        if piece.name in in_8_bits:
            check_scales(stored, piece, folder)
        elif view.get_dtype() not in _DTYPES:
            raise ValueError(f"{folder}: {piece.name} is stored as {view.get_dtype()}; supported: {', '.join(_DTYPES)}")
    for parameter, piece in wanted:
        if piece.name not in in_8_bits:
            file, key = stored[piece.name]
            parameter[piece.rows].copy_(file.get_tensor(key).view(parameter[piece.rows].shape))
    model.stored_scales = {}
    for name, parameter in model.named_parameters() if in_8_bits else ():
        _widen(model, name, parameter, stored, in_8_bits)
    if tied_head:
        head, embedding = (file.get_tensor(key) for file, key in (stored[_LM_HEAD], stored[_EMBEDDING]))
        if not torch.equal(head, embedding):
            raise ValueError(f"{folder}: config.json ties the embeddings, but {_LM_HEAD} differs from {_EMBEDDING}")


def _dtype_of(stored: dict[str, tuple[Any, str]], name: str) -> str:
    file, key = stored[name]
    return str(file.get_slice(key).get_dtype())


def _widen(model: Model, name: str, parameter: Tensor, stored: dict[str, tuple[Any, str]], in_8_bits: set[str]) -> None:
    """Fills in what the checkpoint has of a parameter in 8 bits, and keeps the scales where all of it is."""
    own = pieces(model.config, name, parameter.shape)
    scales = []
    for piece in own:
        if piece.name in in_8_bits:
            weight, scale = widened(stored, piece, parameter.dtype)
            parameter[piece.rows].copy_(weight)
            scales.append(scale)
    whole = joined(own, scales) if len(scales) == len(own) else None
    if whole is not None:
        model.stored_scales[name] = whole


def _write(model: Model, processor: Processor | None, folder: Path) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in hub_tensors(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    source = model_config_to_hf(config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", source)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    if processor is not None:
        processor.save(folder)
    if model.lora is not None:
        save_adapter(model, folder / ADAPTER_FOLDER)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None
