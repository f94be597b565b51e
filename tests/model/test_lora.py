"""LoRA against PEFT: our adapters in its hands and its in ours, merged and not; and what the folder refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from thyme.model import (
    LoraConfig,
    Model,
    add_adapters,
    build,
    load_adapter,
    load_model,
    merge_adapters,
    save,
    save_adapter,
)
from thyme.model.config import LORA_TARGETS
from thyme.model.lora import adapters_off, is_adapter
from thyme.model.weights import restore
from thyme.toy.model import tiny_config

TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
SOME = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
ALL = LoraConfig(rank=4, alpha=8.0, rslora=True)


def randomized(model: Model) -> Model:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def reference(hf_vision_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return hf_vision_model()


@pytest.fixture
def base(reference: PreTrainedModel, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def batch(make_batch: Any) -> Any:
    return make_batch([[5, (1, 4, 4), 9], [12]])


@pytest.mark.parametrize("config", [SOME, ALL], ids=["some", "all"])
def test_peft_reads_our_adapters(
    config: LoraConfig, reference: PreTrainedModel, base: Path, batch: Any, tmp_path: Path
) -> None:
    model = load_model(base)
    plain = batch.ours(model)
    add_adapters(model, config, base=str(base))
    assert torch.equal(batch.ours(model), plain)  # B begins at 0
    ours = batch.ours(randomized(model))
    assert (ours - plain).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    torch.testing.assert_close(batch.theirs(theirs), ours, **TOLERANCE)
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n, _ in theirs.named_parameters() if "lora_A" in n}
    assert adapted == set(config.targets)
    assert not any("visual" in n for n, _ in theirs.named_parameters() if "lora" in n)
    torch.testing.assert_close(batch.theirs(theirs.merge_and_unload()), ours, **TOLERANCE)


def test_we_read_what_peft_writes(reference: PreTrainedModel, base: Path, batch: Any, tmp_path: Path) -> None:
    targets = ["k_proj", "o_proj", "gate_proj"]
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=rf".*language_model.*\.({'|'.join(targets)})", init_lora_weights=False
    )
    theirs = peft.get_peft_model(reference, config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter")
    assert model.lora == LoraConfig(rank=2, alpha=5.0, targets=tuple(targets))
    torch.testing.assert_close(batch.ours(model), batch.theirs(theirs), **TOLERANCE)


def test_merged_in_place_and_on_disk(base: Path, batch: Any, tmp_path: Path) -> None:
    model = load_model(base)
    add_adapters(model, ALL)
    adapted = batch.ours(randomized(model))
    save(model, None, tmp_path / "merged")
    torch.testing.assert_close(batch.ours(load_model(tmp_path / "merged")), adapted, **TOLERANCE)
    fresh = load_model(base)
    load_adapter(fresh, tmp_path / "merged" / "adapter")
    assert torch.equal(batch.ours(fresh), adapted)  # the adapter beside the merged weights is exact
    merge_adapters(model)
    torch.testing.assert_close(batch.ours(model), adapted, **TOLERANCE)
    assert model.lora is None and all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in load_model(base).named_parameters()}


def test_restoring_puts_the_adapters_back_and_leaves_the_base(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    add_adapters(model, SOME)
    before = {name: p.clone() for name, p in randomized(model).named_parameters()}
    save(model, None, tmp_path / "saved")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.zero_()
    restore(model, tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = load_model(base)
    restore(plain, tmp_path / "saved")  # a model without adapters gets the merged weights
    assert not torch.equal(plain.decoder.layers[0].mlp.down.weight, before["decoder.layers.0.mlp.down.weight"])


def test_only_adapters_are_trained_and_off_they_do_nothing(base: Path, batch: Any) -> None:
    model = load_model(base)
    plain = batch.ours(model).detach()
    add_adapters(model, ALL, seed=1)
    batch.ours(randomized(model)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == is_adapter(name)
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == is_adapter(name)
    with adapters_off(model):
        assert torch.equal(batch.ours(model), plain)
    assert not torch.equal(batch.ours(model), plain)


def test_gradients_are_those_of_the_merged_product() -> None:
    """dA = s B^T dW and dB = s dW A^T, dW the gradient of the merged weight; in float64."""
    model = build(tiny_config(), dtype=torch.float64)
    add_adapters(model, LoraConfig(rank=3, alpha=2.0, targets=("q_proj", "v_proj")))
    layer = randomized(model).decoder.layers[0].self_attn.qkv
    x = torch.randn(9, 128, dtype=torch.float64)
    weight = layer.weight.detach().clone().requires_grad_()
    grad = torch.randn(9, 384, dtype=torch.float64)
    layer(x).backward(grad)
    (x @ weight.T).backward(grad)
    assert weight.grad is not None and layer.lora_a.grad is not None and layer.lora_b.grad is not None
    for i, rows in enumerate((slice(0, 128), slice(256, 384))):  # the key's rows have no adapter
        a, b = layer.lora_a[3 * i : 3 * i + 3], layer.lora_b[128 * i : 128 * i + 128]
        torch.testing.assert_close(layer.lora_a.grad[3 * i : 3 * i + 3], 2 / 3 * b.T @ weight.grad[rows])
        torch.testing.assert_close(layer.lora_b.grad[128 * i : 128 * i + 128], 2 / 3 * weight.grad[rows] @ a.T)


def test_the_same_seed_draws_the_same_adapters() -> None:
    def drawn(seed: int) -> Tensor:
        model = build(tiny_config())
        add_adapters(model, ALL, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("lora_a")])

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert float(drawn(0).detach().abs().max()) <= 128**-0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r = 0 must be a rank"),
        ({"r": 2}, "has shape"),
    ],
)
def test_other_adapters_are_refused_in_words(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build(tiny_config())
    add_adapters(model, SOME)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(build(tiny_config()), tmp_path)


def test_adapters_that_do_not_fit_are_refused_in_words(tmp_path: Path) -> None:
    model = build(tiny_config())
    add_adapters(model, SOME)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != first}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the adapter misses model\.layers\.0"):
        load_adapter(build(tiny_config()), tmp_path)
    visual = {first.replace("language_model.layers.0.mlp.down_proj", "visual.blocks.0.attn.qkv"): tensors[first]}
    save_file(visual, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an adapter on 'qkv'"):
        load_adapter(build(tiny_config()), tmp_path)
    other = build(tiny_config())
    add_adapters(other, ALL)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "saved").mkdir()
    with pytest.raises(ValueError, match="its adapters are"):
        tmp_path.joinpath("adapter_config.json").rename(tmp_path / "saved" / "adapter_config.json")
        tmp_path.joinpath("adapter_model.safetensors").rename(tmp_path / "saved" / "adapter_model.safetensors")
        (tmp_path / "saved").rename(tmp_path / "adapter")
        restore(other, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(build(tiny_config()), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank -1"),
        ({"alpha": 0.0}, "alpha 0.0 positive"),
        ({"targets": ("qkv",)}, "'qkv' must be some of q_proj"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
        ({"targets": ()}, "each once"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**wrong)
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(build(tiny_config()), "never")
    with pytest.raises(ValueError, match="rank of 0"):
        add_adapters(build(tiny_config()), LoraConfig())


def test_all_targets_are_adapted_by_default() -> None:
    assert LoraConfig().targets == LORA_TARGETS and LoraConfig(rank=16).scale == 2.0
    assert LoraConfig(rank=16, rslora=True).scale == 8.0
