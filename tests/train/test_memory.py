"""The memory plan against bytes that are counted: parameters, states, gradients, and what autograd keeps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.train.test_lora_training import tensors
from tests.train.test_trainable import packed, saved_bytes
from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import ImageInputs, LoraConfig, Model, ModelConfig, Processor, add_adapters, build
from thyme.model.sizes import SIZES
from thyme.toy.model import tiny_config
from thyme.train.activations import Pass, decoder_layer, vision_block
from thyme.train.activations import saved_bytes as planned_bytes
from thyme.train.config import RlConfig, SftConfig, StageConfig
from thyme.train.fitting import changed, fitting
from thyme.train.memory import GIB, Job, _moments, count, plan
from thyme.train.optim import build_optimizer
from thyme.train.reference import frozen_copy
from thyme.train.trainable import trainable

SEVEN = SIZES["qwen2.5-vl-7b"]
CARD = 76 * GIB
"""Of 80 GiB, four kept back."""


def larger() -> ModelConfig:
    """Six layers of 512 with shared keys, and a tower with windows."""
    tiny = tiny_config()
    assert tiny.vision is not None
    text = replace(
        tiny.text,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
    )
    vision = replace(tiny.vision, hidden_size=256, intermediate_size=680, depth=4, out_hidden_size=512, window_size=56)
    return replace(tiny, text=text, vision=vision)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8), LoraConfig(rank=4, targets=("q_proj", "v_proj"))])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"activation_checkpointing": True},
        {"freeze_vision": True},
        {"freeze_vision": True, "freeze_merger": True},
        {"freeze_merger": True, "fused_head": True},
    ],
)
@pytest.mark.parametrize(
    ("size", "dtype"), [("tiny", torch.float32), ("tiny", torch.bfloat16), ("larger", torch.bfloat16)]
)
def test_activations_are_those_that_autograd_keeps(
    size: str,
    dtype: torch.dtype,
    said: dict[str, bool],
    lora: LoraConfig,
    processor: Processor,
    picture: Callable[[int], ImageInputs],
) -> None:
    config = tiny_config() if size == "tiny" else larger()
    model = build(config, processor, dtype=dtype)
    if lora.rank:
        add_adapters(model, lora)
    batch = packed(processor, [(60, [picture(1), picture(2)]), (30, [picture(3)]), (78, [])])
    stage = StageConfig(**said)
    assert batch.pixel_values is not None
    how = Pass(
        tokens=len(batch.input_ids),
        patches=len(batch.pixel_values),
        rows=len(batch.rows),
        itemsize=dtype.itemsize,
        recomputes=stage.activation_checkpointing,
        fused_head=bool(stage.fused_head),
        lora=lora,
        trains_tower=not (stage.freeze_vision or lora.rank),
        trains_merger=not (stage.freeze_merger or lora.rank),
    )
    counted = saved_bytes(model, batch, stage)
    assert planned_bytes(config.text, config.vision, how) == pytest.approx(counted, rel=0.1)


STAGES = {
    "adamw": StageConfig(optimizer="adamw"),
    "muon": StageConfig(optimizer="muon"),
    "frozen": StageConfig(optimizer="muon", freeze_vision=True),
}


def standing_matches(model: Model, stage: StageConfig, lora: LoraConfig) -> None:
    """After a step, and in the next one's backward pass, there is what the plan says, to the byte."""
    job = Job(model=model.config, stage=stage, lora=lora, itemsize=model.dtype.itemsize)
    if lora.rank:
        add_adapters(model, lora)
    with trainable(model, stage) as optimizer:
        for p in optimizer.parameters:
            p.grad = torch.ones_like(p)
        optimizer.step(1.0)
        for p in optimizer.parameters:
            p.grad = torch.ones_like(p)
        optimizer.add_up()
    found = plan(job)
    step, state = found.phases["step"], optimizer.state_dict()
    masters = list(tensors(state.pop("masters", [])))
    assert found.counts.trained == sum(p.numel() for p in optimizer.parameters)
    assert step["weights"] == sum(p.nbytes for p in model.parameters())
    assert step.get("masters", 0) == sum(t.nbytes for t in masters)
    assert step["moments"] == sum(stored(t) for t in tensors(state) if t.ndim)
    graded = [*model.parameters(), *optimizer._masters.values()]
    assert step["gradients"] == sum(p.grad.nbytes for p in graded if p.grad is not None)


def stored(tensor: torch.Tensor) -> int:
    """Bytes; of torchao's tensors, of all that they are made of."""
    if hasattr(tensor, "codes"):
        return int(tensor.codes.nbytes + tensor.scale.nbytes + tensor.qmap.nbytes)
    return tensor.nbytes


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon", "frozen"])
def test_what_stands_is_counted_to_the_byte(name: str, dtype: torch.dtype, lora: LoraConfig, model: Model) -> None:
    standing_matches(model.to(dtype), STAGES[name], lora)


@pytest.mark.soak
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("numbers", [64, 4096, 4096 + 128, 6144, 1 << 20])
@pytest.mark.parametrize("state", ["8bit", "bf16"])
def test_small_moments_are_torchao_s_to_the_byte(state: Any, numbers: int) -> None:
    pytest.importorskip("torchao", reason="the extra train is not installed")
    weight = torch.nn.Parameter(torch.zeros(numbers, dtype=torch.bfloat16))
    stage = StageConfig(optimizer="adamw", optimizer_state=state)
    ((optimizer, _),) = build_optimizer(torch.nn.ParameterList([weight]), stage)._peaks
    made = [optimizer._new_buffer(weight, signed) for signed in (True, False)]  # type: ignore[attr-defined]
    job = Job(model=SEVEN, stage=stage)
    assert _moments(job, numbers, is_muon=False) == sum(stored(t) for t in made)


@pytest.mark.parametrize("place", ["device", "host"])
def test_the_reference_is_counted_to_the_byte(place: Any, model: Model) -> None:
    found = plan(Job(model=model.config, stage=RlConfig(reference=place), itemsize=4))
    on_host = place == "host"
    reference = frozen_copy(model, blocks_on_host=on_host)
    inside = ("decoder.layers", "visual.blocks")
    far = sum(p.nbytes for name, p in reference.named_parameters() if on_host and name.startswith(inside))
    assert found.host == far and (far > 0) == on_host
    assert found.phases["rollout"]["reference"] == sum(p.nbytes for p in reference.parameters()) - far
    assert "reference" not in plan(Job(model=model.config, stage=RlConfig(kl_coef=0.0))).phases


def test_a_token_of_the_cache_is_the_engine_s(model: Model) -> None:
    engine = Engine(model, EngineConfig(num_blocks=7, block_size=16, max_sequences=4, quiet=True))
    found = plan(Job(model=model.config, stage=RlConfig(), itemsize=4))
    assert found.kv_token * 7 * 16 == engine.runner.kv_cache.nbytes
    budget = found.total("rollout") + 1000
    assert found.kv_bytes(budget) == 1000 and found.fits(10**12, 0)
    assert not found.fits(max(map(found.total, found.phases)), 10**12)


def test_an_engine_in_fp8_is_counted_to_the_byte(model: Model) -> None:
    """Its cache by the token; its copy of the weights in the rollout, and in no phase in which it sleeps."""
    sizes: dict[str, Any] = dict(num_blocks=7, block_size=16, max_sequences=4, quiet=True)
    config = EngineConfig(weight_dtype="fp8", kv_dtype="fp8", **sizes)
    engine = Engine(model, config)
    engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2, seed=1))
    job = Job(model=model.config, stage=RlConfig(), itemsize=4)
    found, plain = plan(replace(job, fp8_weights=True, fp8_cache=True)), plan(job)
    assert found.kv_token * 7 * 16 == engine.stats()["kv_bytes"]
    copy = engine.stats()["packed_bytes"]
    assert copy > 0 and found.total("rollout") == plain.total("rollout") + copy
    assert all(found.total(phase) == plain.total(phase) for phase in plain.phases if phase != "rollout")


def test_the_seven_billion_are_those_of_the_hub() -> None:
    """Parameters as the published safetensors count them; bytes as saved_tensors_hooks count them on such a layer."""
    counts = {name: count(Job(model=size, stage=StageConfig())).all for name, size in SIZES.items()}
    assert counts == {
        "qwen2.5-vl-3b": 3_754_622_976,
        "qwen2.5-vl-7b": 8_292_166_656,
        "qwen2.5-vl-32b": 33_452_718_336,
        "qwen2.5-vl-72b": 73_410_777_344,
    }
    how = Pass(
        tokens=1,
        patches=1,
        rows=1,
        itemsize=2,
        recomputes=False,
        fused_head=True,
        lora=LoraConfig(),
        trains_tower=True,
        trains_merger=True,
    )
    assert SEVEN.vision is not None
    assert decoder_layer(SEVEN.text, how) == pytest.approx(163.6 * 1024, rel=0.01)
    assert vision_block(SEVEN.vision, how) == pytest.approx(45.4 * 1024, rel=0.06)  # windows of one size there


def test_full_grpo_of_the_seven_billion_fits_one_card_of_80() -> None:
    job = Job(model=SEVEN, stage=RlConfig())
    assert not plan(job).fits(CARD, 8 * GIB)
    changes = fitting(job, CARD, 8 * GIB)
    assert changes == {"activation_checkpointing": True, "optimizer_offload": True}
    assert plan(changed(job, changes)).kv_bytes(CARD) > 40 * GIB


def test_eight_cards_leave_40_for_the_cache() -> None:
    job = Job(model=SEVEN, stage=RlConfig(), gpus=8)
    changes = fitting(job, CARD, 40 * GIB)
    assert changes == {"activation_checkpointing": True}  # the reference is sharded as it is


def test_only_changes_that_are_needed_are_named() -> None:
    for job, kv in (
        (Job(model=SEVEN, stage=RlConfig()), 8 * GIB),
        (Job(model=SEVEN, stage=RlConfig(), gpus=8), 30 * GIB),
        (Job(model=SEVEN, stage=SftConfig(optimizer="adamw")), 0),
        (Job(model=SEVEN, stage=RlConfig(fused_head=False), longest=30_000), 55 * GIB),
        (Job(model=SIZES["qwen2.5-vl-3b"], stage=RlConfig(), longest=20_000), 20 * GIB),
        (Job(model=SIZES["qwen2.5-vl-32b"], stage=RlConfig()), 5 * GIB),
    ):
        changes = fitting(job, CARD, kv)
        assert changes and plan(changed(job, changes)).fits(CARD, kv)
        for key in changes.keys() - {"optimizer", "optimizer_offload", "optimizer_state"}:
            rest = {k: v for k, v in changes.items() if k != key}
            assert not plan(changed(job, rest)).fits(CARD, kv), (key, changes)


def test_nothing_is_named_where_nothing_helps_or_is_needed() -> None:
    tiny = Job(model=tiny_config(), stage=RlConfig())
    assert fitting(tiny, CARD, GIB) == {}
    assert fitting(Job(model=SIZES["qwen2.5-vl-72b"], stage=RlConfig()), CARD, GIB) is None


def test_what_ranks_do_not_share_is_refused() -> None:
    for stage in (RlConfig(optimizer_offload=True), RlConfig(optimizer_state="8bit")):
        with pytest.raises(ValueError, match="is for one GPU"):
            Job(model=SEVEN, stage=stage, gpus=2)


def test_more_of_anything_takes_more() -> None:
    job = Job(model=SEVEN, stage=RlConfig())
    peak = max(map(plan(job).total, plan(job).phases))
    for more in (
        replace(job, itemsize=4),
        replace(job, longest=40_000),
        replace(job, stage=replace(job.stage, fused_head=False)),
        replace(job, stage=replace(job.stage, max_tokens_per_micro_batch=32_768)),
    ):
        assert max(map(plan(more).total, plan(more).phases)) > peak
