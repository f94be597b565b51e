"""What is frozen and what is kept for the backward pass: the gradients are the same, and the bytes are counted."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme.cli import main
from thyme.model import ImageInputs, Model, ModelConfig, Processor, TextConfig, build, load_model
from thyme.options import parse
from thyme.toy.model import tiny_config
from thyme.train.config import SftConfig, StageConfig
from thyme.train.objective import AllowedIds, supervised_loss
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.tokenization import positions
from thyme.train.trainable import FUSED_VOCABULARY, fuses_head, trainable
from thyme.verbs import rl


@pytest.fixture
def batch(processor: Processor, picture: Callable[[int], ImageInputs]) -> TrainBatch:
    """Two sequences with a picture each and one without."""
    return packed(processor, [(9, [picture(1)]), (30, [picture(2)]), (24, [])])


def packed(processor: Processor, parts: Sequence[tuple[int, list[ImageInputs]]]) -> TrainBatch:
    """One micro-batch: of each sequence its text tokens and its pictures."""
    draw = np.random.default_rng(0)
    samples = []
    for words, images in parts:
        shown = [processor.image_token_id] * sum(image.num_tokens for image in images)
        ids = np.array([5, *shown, *draw.integers(10, 60, words)], dtype=np.int64)
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[-words:] = 1 / words
        samples.append(
            Sample(token_ids=ids, positions=positions(processor, ids, images), weights=weights, images=tuple(images))
        )
    (batch,) = pack(samples, image_token_id=processor.image_token_id)
    return batch


def gradients(model: Model, batch: TrainBatch, config: StageConfig) -> dict[str, Tensor]:
    """By parameter, those that are trained."""
    with trainable(model, config):
        supervised_loss(model, batch, AllowedIds(size=64, banned_ids=())).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Held:
    """What the graph holds of one saved tensor; gone when the graph lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: Model, batch: TrainBatch, config: StageConfig) -> int:
    """Of storages that autograd keeps of one forward pass, parameters left out."""
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Held:
        held = Held(tensor)
        alive.add(held)
        return held

    with trainable(model, config), torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        fused = fuses_head(model, config)
        loss = supervised_loss(model, batch, AllowedIds(size=64, banned_ids=()), fused_head=fused)
        storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage() for held in alive}
    assert loss.requires_grad
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in storages.items() if at not in parameters)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_gradients_are_the_same_to_the_bit(
    model: Model, batch: TrainBatch, dtype: torch.dtype, frozen: bool
) -> None:
    model.to(dtype)
    plain = gradients(model, batch, StageConfig(freeze_vision=frozen))
    again = gradients(model, batch, StageConfig(freeze_vision=frozen, activation_checkpointing=True))
    assert plain.keys() == again.keys() and len(plain) > 30
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_recomputing_keeps_the_inputs_of_the_layers(model: Model, batch: TrainBatch) -> None:
    plain = saved_bytes(model, batch, StageConfig())
    again = saved_bytes(model, batch, StageConfig(activation_checkpointing=True))
    assert batch.pixel_values is not None
    tokens, patches, text, vision = (
        len(batch.input_ids),
        len(batch.pixel_values),
        model.config.text,
        model.config.vision,
    )
    assert vision is not None
    inputs = (2 * text.num_hidden_layers - 1) * tokens * text.hidden_size * 4
    inputs += (2 * vision.depth - 1) * patches * vision.hidden_size * 4
    around = saved_bytes(without_layers(model), batch, StageConfig())  # patch embedding, merger, final norm, head
    assert inputs <= again <= 1.1 * (inputs + around)
    assert again < plain / 3


def without_layers(model: Model) -> Model:
    text = model.config.text
    assert model.visual is not None
    bare = build(model.config)
    assert bare.visual is not None
    bare.decoder.layers, bare.visual.blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    assert len(bare.decoder.layers) == 0 and text.num_hidden_layers > 0
    return bare


def test_a_frozen_tower_and_merger_are_thawed_again(model: Model) -> None:
    def trained(config: StageConfig) -> set[str]:
        with trainable(model, config) as optimizer:
            held = {id(p) for p in optimizer.parameters}
            return {name for name, p in model.named_parameters() if id(p) in held}

    assert model.visual is not None
    blocks = ("visual.blocks", "visual.patch_embed")
    assert not any(name.startswith(blocks) for name in trained(StageConfig(freeze_vision=True)))
    assert "visual.merger.up.weight" in trained(StageConfig(freeze_vision=True))
    both = trained(SftConfig(freeze_vision=True, freeze_merger=True, activation_checkpointing=True))
    assert both == {name for name, _ in model.named_parameters() if not name.startswith("visual.")}
    assert all(p.requires_grad for p in model.parameters())
    assert not model.decoder.recomputes and not model.visual.recomputes


def test_an_error_inside_thaws_too(model: Model) -> None:
    with pytest.raises(ValueError, match="boom"), trainable(model, StageConfig(freeze_vision=True)):
        raise ValueError("boom")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("said", "words", "fused"), [(None, -1, False), (None, 0, True), (False, 0, False)])
def test_the_head_is_fused_from_a_number_of_words_on(said: bool | None, words: int, fused: bool) -> None:
    text = TextConfig(
        vocab_size=FUSED_VOCABULARY + words,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
    )
    with torch.device("meta"):
        model = Model(ModelConfig(model_type="qwen2", text=text))
    assert fuses_head(model, StageConfig(fused_head=said)) is fused


def test_one_flag_may_be_on_off_or_left_open() -> None:
    for said, value in (((), None), (("--rl.fused-head",), True), (("--rl.fused-head", "none"), None)):
        assert parse(rl.Config, [*said]).rl.fused_head is value
    assert parse(rl.Config, ["--rl.fused-head", "false", "--seed", "2"]).rl.fused_head is False


def test_sft_leaves_the_frozen_tower_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frozen = ["--sft.freeze-vision", "--sft.freeze-merger"]
    main(
        [
            "sft",
            "--threads",
            "1",
            "--sft.activation-checkpointing",
            *frozen,
            "--sft.steps",
            "1",
            "--sft.batch-size",
            "2",
        ]
    )
    before, after = build(tiny_config()).state_dict(), load_model("runs/sft/checkpoints/sft").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("visual.")}
