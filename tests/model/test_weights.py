"""Folders: ours and transformers' read each other; whatever does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from thyme.model import ImageConfig, Model, Processor, build, load, load_model, save
from thyme.model.hf import model_config_from_hf, model_config_to_hf
from thyme.model.weights import hub_tensors


def same(a: Model, b: Model) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What transformers writes for a vision model, and its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    request.getfixturevalue("hf_vision_model")(vocab_size=400).save_pretrained(folder)
    tokenizer = request.getfixturevalue("byte_level_tokenizer")
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 50176}))
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_load_and_save_back(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    assert processor is not None and model.processor is processor
    save(model, processor, tmp_path / "again")
    model2, processor2 = load(tmp_path / "again")
    assert same(model, model2) and model.config == model2.config
    assert processor2 is not None and processor2.image_config == processor.image_config
    assert processor2.eos_token_ids == processor.eos_token_ids
    theirs, ours = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_transformers_reads_our_folder(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    save(model, processor, tmp_path / "ours")
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    weights = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for k, v in reference.state_dict().items()
    }
    ours = dict(hub_tensors(model))
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in ours)
    assert reference.config.image_token_id == model.config.image_token_id
    assert list(reference.generation_config.eos_token_id) == list(model.config.eos_token_ids)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biased", "llama3"])
def test_text_models_both_directions(
    family: str, hf_text_model: Callable[[str], Any], make_batch: Any, tmp_path: Path
) -> None:
    hf_text_model(family).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save(model, None, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert reference.config.tie_word_embeddings == (model.lm_head is None) == (family == "qwen2")
    batch = make_batch([[20], [90]])
    with torch.no_grad():
        torch.testing.assert_close(batch.ours(model), batch.theirs(reference), atol=1e-4, rtol=1e-4)


def test_sharded_folder(checkpoint: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, copy / file)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_model(copy), load_model(checkpoint))
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-00003\.safetensors"):
        load_model(copy)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files of the same folder"):
        load_model(copy)


def test_names_of_other_writers_and_old_buffers(checkpoint: Path, copy: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)
            elif name.startswith("visual."):
                tensors["model." + name] = tensors.pop(name)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(copy, rename)
    assert same(load_model(copy), load_model(checkpoint))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_and_in_memory(stored: torch.dtype, checkpoint: Path, copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    wide, half = load_model(copy), load_model(copy, dtype=stored)
    assert wide.dtype == torch.float32 and half.dtype == stored
    expected = load_model(checkpoint).state_dict()
    for name, value in half.state_dict().items():
        assert torch.equal(value, expected[name].to(stored))
        assert torch.equal(wide.state_dict()[name], value.float())
    save(half, None, copy.parent / "half")
    assert same(load_model(copy.parent / "half", dtype=stored), half)
    assert json.loads((copy.parent / "half/config.json").read_text())["torch_dtype"] == str(stored).split(".")[1]


def test_tied_head_may_be_stored_but_must_agree(hf_text_model: Callable[[str], Any], tmp_path: Path) -> None:
    hf_text_model("qwen2").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path).lm_head is None
    edit_weights(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(tmp_path)


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    config = model_config_from_hf(
        dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8)
        | dict(num_hidden_layers=1, num_attention_heads=2)
    )
    first, second = build(config, seed=0), build(config, seed=1)
    folder = tmp_path / "deep" / "run"
    save(first, None, folder)
    (folder / "left-over").write_text("")
    save(second, None, folder)
    assert same(load_model(folder), second) and not same(first, second)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["run"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no checkpoint"):
        save(first, None, tmp_path / "home")
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failed_save_leaves_the_old_checkpoint(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config_from_hf(
        dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8)
        | dict(num_hidden_layers=1, num_attention_heads=2)
    )
    model = build(config)
    save(model, None, tmp_path / "run")

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    rename = Path.rename

    def rename_but_the_new(self: Path, target: Path) -> Path:
        return disk_full() if self.name.endswith(".new") else rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if step == "write":
            patch.setattr("thyme.model.weights.save_file", disk_full)
        else:
            patch.setattr(Path, "rename", rename_but_the_new)
        save(build(config, seed=5), None, tmp_path / "run")
    assert same(load_model(tmp_path / "run"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_build_is_seeded_and_scaled(checkpoint: Path) -> None:
    config = load_model(checkpoint).config
    assert same(build(config, seed=3), build(config, seed=3))
    assert not same(build(config, seed=3), build(config, seed=4))
    model = build(config, seed=3)
    assert abs(model.decoder.layers[0].mlp.gate_up.weight.std() - config.text.initializer_range) < 1e-3
    assert model.decoder.layers[0].self_attn.qkv.bias.abs().max() == 0 and model.decoder.norm.weight.min() == 1
    random, processor = load(config)
    assert processor is None and same(random, build(config, seed=0))


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(KEY), f"the checkpoint misses {KEY}$"),
        (lambda t: [t.pop(KEY), t.pop("visual.merger.mlp.2.bias")], f"misses {KEY} and 1 more"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[KEY].clone()}),
            "unexpected model.layers.2.mlp.up_p",
        ),
        (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), rf"{KEY} has shape \[32, 63\].*asks for \[32, 64\]"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} is stored as I8"),
        (lambda t: t.update({KEY: t[KEY].t().contiguous()}), rf"{KEY} has shape \[64, 32\]"),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, copy: Path) -> None:
    edit_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_folders_that_are_no_models(copy: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            load(copy)
        assert "\n" not in str(caught.value)

    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is no model folder: it has no config\.json"):
        load(tmp_path / "empty")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(ValueError, "damaged safetensors file")
    (copy / "model.safetensors").unlink()
    refused(FileNotFoundError, "no model.safetensors; weights are read from safetensors only")
    (copy / "tokenizer.json").unlink()
    refused(FileNotFoundError, "no tokenizer")
    edit_json(copy / "config.json", model_type="mamba")
    refused(ValueError, "model_type 'mamba' is not supported")
    (copy / "config.json").write_text("{")
    refused(ValueError, "config.json is not JSON")
    (copy / "config.json").write_text("[]")
    refused(ValueError, "must hold a JSON object")


def test_parts_that_do_not_go_together(copy: Path, byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    config, _ = load(copy)[0].config, edit_json(copy / "config.json", image_token_id=7)
    with pytest.raises(ValueError, match=r"image token: the tokenizer says .*config\.json 7"):
        load(copy)
    with pytest.raises(ValueError, match="patch_size"):
        build(config, Processor(byte_level_tokenizer, ImageConfig(patch_size=16)))
    small = model_config_from_hf(model_config_to_hf(config) | {"vocab_size": 300})
    with pytest.raises(ValueError, match="embedding only 300 rows"):
        build(small, Processor(byte_level_tokenizer, ImageConfig()))
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config.json"):
        load(copy)


def test_generation_config_names_the_end(copy: Path) -> None:
    edit_json(copy / "generation_config.json", eos_token_id=[2, 5])
    model, processor = load(copy)
    assert model.config.eos_token_ids == (2, 5)
    assert processor is not None and processor.eos_token_ids == (2, 5)
