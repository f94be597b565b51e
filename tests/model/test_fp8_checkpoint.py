"""Checkpoints in 8 bits: read as what they say, their codes found again by the engine, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from thyme.kernels.fp8 import FP8, dequantize_weight, num_blocks
from thyme.model import Model, ModelConfig, build, load_model, save
from thyme.model.fp8 import Fp8Linear, Fp8View

SAID = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "visual"],
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape(**changes: Any) -> ModelConfig:
    """Pieces of qkv that begin at blocks, of gate_up that do not; columns that no block divides."""
    sizes = dict(hidden_size=140, intermediate_size=150, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    text = tiny.text_config(**sizes | {"qkv_bias": False, "qk_norm": True} | changes)
    return ModelConfig(model_type="qwen3", text=text, eos_token_ids=(2,))


def released(tensors: dict[str, Tensor], scale_dtype: torch.dtype) -> None:
    """Projections in 8 bits, with scales that are not those that we would choose."""
    for name in [name for name in tensors if name.split(".")[-2] in PROJECTIONS and name.endswith(".weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = (torch.randn(rows, columns) * 40).clamp(-448, 448).to(FP8)
        tensors[name + "_scale_inv"] = (torch.rand(num_blocks(rows), num_blocks(columns)) * 0.01).to(scale_dtype)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], **said: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SAID | said}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build(shape(), seed=1), None, tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: released(tensors, torch.bfloat16))
    return tmp_path / "model"


def linears(view: Fp8View) -> dict[str, Fp8Linear]:
    view.refresh()
    return {name: one for name, one in view.model.decoder.named_modules() if isinstance(one, Fp8Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_read_as_code_times_scale(folder: Path, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    edit(folder, lambda tensors: released(tensors, scale_dtype))
    tensors = load_file(folder / "model.safetensors")
    layer = load_model(folder, dtype=dtype).decoder.layers[1]
    for weight, names in (
        (layer.self_attn.qkv.weight, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (layer.mlp.gate_up.weight, ("mlp.gate_proj", "mlp.up_proj")),
        (layer.mlp.down.weight, ("mlp.down_proj",)),
    ):
        stored = [f"model.layers.1.{name}.weight" for name in names]
        parts = [dequantize_weight(tensors[name], tensors[name + "_scale_inv"].float(), dtype) for name in stored]
        assert weight.dtype == dtype and torch.equal(weight, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engine_has_the_very_codes(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    found = linears(Fp8View(load_model(folder, dtype=dtype)))
    codes, scales = found["layers.0.self_attn.qkv"]._packed
    stored = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(codes.float(), torch.cat([tensors[name].float() for name in stored]))
    assert torch.equal(scales, torch.cat([tensors[name + "_scale_inv"].float() for name in stored]))
    down = found["layers.1.mlp.down"]._packed
    assert torch.equal(down[0].float(), tensors["model.layers.1.mlp.down_proj.weight"].float())


def test_what_was_trained_since_has_scales_of_its_own(folder: Path) -> None:
    """Also when it has grown past what the stored scale can say; blocks that were left alone keep theirs."""
    model = load_model(folder)
    view = Fp8View(model)
    before = [part.clone() for part in linears(view)["layers.0.self_attn.qkv"]._packed]
    with torch.no_grad():
        model.decoder.layers[0].self_attn.qkv.weight[:128, :128].mul_(5)
    codes, scales = linears(view)["layers.0.self_attn.qkv"]._packed
    assert scales[0, 0] > 1.5 * before[1][0, 0]
    assert torch.equal(scales.flatten()[1:], before[1].flatten()[1:])
    assert torch.equal(codes[128:].float(), before[0][128:].float())
    weight = model.decoder.layers[0].self_attn.qkv.weight[:128, :128]
    torch.testing.assert_close(
        dequantize_weight(codes, scales)[:128, :128], weight, atol=float(scales[0, 0]) * 16, rtol=0
    )


def test_pieces_that_begin_inside_of_a_block_are_quantized_anew(folder: Path) -> None:
    model = load_model(folder)
    assert "decoder.layers.0.mlp.gate_up.weight" not in model.stored_scales
    assert len(model.stored_scales) == 6
    one = linears(Fp8View(model))["layers.0.mlp.gate_up"]
    largest = float(model.decoder.layers[0].mlp.gate_up.weight.detach().abs().max())
    assert float(one._packed[1].max()) == pytest.approx(largest / 448)


def test_what_is_saved_again_is_whole(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save(model, None, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.stored_scales == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "scales are missing": (
        lambda tensors: tensors.pop(Q + "_scale_inv"),
        {},
        f"{Q} is in F8_E4M3, but the checkpoint misses its scales, {Q}_scale_inv",
    ),
    "scales of another shape": (
        lambda tensors: tensors.update({Q + "_scale_inv": torch.ones(1, 1)}),
        {},
        rf"{Q}_scale_inv has shape \[1, 1\], {Q} of \[128, 140\] has \[1, 2\] blocks of 128 x 128",
    ),
    "scales of another type": (
        lambda tensors: tensors.update({Q + "_scale_inv": torch.ones(1, 2, dtype=torch.int32)}),
        {},
        f"{Q}_scale_inv is stored as I32; supported: F32, BF16",
    ),
    "scales of nothing": (
        lambda tensors: tensors.update({Q: torch.ones(128, 140)}),
        {},
        f"has unexpected {Q}_scale_inv",
    ),
    "another format": (
        lambda tensors: tensors.update({Q: torch.ones(128, 140).to(torch.float8_e5m2)}),
        {},
        f"{Q} is stored as F8_E5M2; supported:|has unexpected {Q}_scale_inv",
    ),
    "one scale a tensor": (
        lambda tensors: None,
        {"weight_block_size": None},
        r"quantization_config has quant_method 'fp8', fmt 'e4m3', weight_block_size None; supported: fp8",
    ),
    "another method": (lambda tensors: None, {"quant_method": "awq"}, "quant_method 'awq'"),
    "other blocks": (lambda tensors: None, {"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
}


@pytest.mark.parametrize(("change", "said", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], said: dict[str, Any], message: str
) -> None:
    edit(folder, change, **said)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_model_without_them_has_no_scales() -> None:
    model: Model = build(shape(), seed=1)
    assert model.stored_scales == {}
