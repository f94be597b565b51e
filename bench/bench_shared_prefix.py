"""An RL update on a group of rollouts of one question, its prompt computed once and once a rollout.

    pytest bench/bench_shared_prefix.py

8 rollouts of a prompt of a picture of 1,024 tokens and 64 of text, 128 sampled tokens each, ids fixed by a seed: 9,728
tokens, 2,112 of them distinct. The step is packing, forward and backward pass and AdamW; the picture is encoded once on
both sides. The two take turns, and their losses and gradients are compared before anything is timed. "tower frozen" is
as Thyme trains (freeze_vision), "tower trained" adds what both sides spend on the picture. On a CPU: the random model
of 9 M parameters of bench_update in float32, on 2 threads. On a GPU: one of the width of Qwen2.5-VL-3B, a third of its
layers, in bfloat16, layers recomputed, the head fused.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import harness
import numpy as np
import pytest
import torch
from bench_update import THREADS, wide_config
from PIL import Image

from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model import ImageConfig, Model, ModelConfig, Processor, build
from thyme.model.sizes import SIZES
from thyme.toy.model import tiny_config
from thyme.toy.tokenizer import toy_tokenizer
from thyme.train.config import RlConfig
from thyme.train.objective import AllowedIds, normalize, rollout_loss
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.tokenization import positions
from thyme.train.trainable import trainable

ROUNDS = 5
GROUP, SIDE, ASKED, SAMPLED = 8, 896, 64, 128
GOAL = 2.0


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(toy_tokenizer(), ImageConfig(), tiny_config().eos_token_ids)


@pytest.fixture(scope="module")
def model(processor: Processor) -> Model:
    if not harness.GPU:
        return build(wide_config(), processor, seed=0)
    return build(large_config(), processor, seed=0, device="cuda", dtype=torch.bfloat16)


def large_config() -> ModelConfig:
    """Qwen2.5-VL-3B with 12 layers of 36, 8 blocks of 32, and the toy's ids."""
    three = SIZES["qwen2.5-vl-3b"]
    assert three.vision is not None
    text = replace(three.text, num_hidden_layers=12)
    vision = replace(three.vision, depth=8, fullatt_block_indexes=(3, 7))
    return replace(wide_config(), text=text, vision=vision)


@pytest.fixture(scope="module")
def samples(processor: Processor) -> list[Sample]:
    draw = np.random.default_rng(0)
    image = processor.preprocess(Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))
    shown = [processor.vision_start_id, *[processor.image_token_id] * image.num_tokens, processor.vision_end_id]
    prompt = [*shown, *draw.integers(0, 90, ASKED - 2).tolist()]
    assert image.num_tokens == 1024
    made = []
    for advantage in draw.standard_normal(GROUP):
        ids = np.array([*prompt, *draw.integers(0, 90, SAMPLED).tolist()])
        made.append(
            Sample(
                token_ids=ids,
                positions=positions(processor, ids, (image,)),
                weights=(np.arange(len(ids)) >= len(prompt)).astype(np.float32),
                images=(image,),
                advantages=np.full(len(ids), advantage, dtype=np.float32),
                temperatures=np.ones(len(ids), dtype=np.float32),
                group=0,
            )
        )
    return normalize([made], "group_tokens")


@pytest.mark.benchmark(group="RL update, 8 rollouts of 1,024 picture tokens, 64 of text and 128 sampled")
@pytest.mark.parametrize("tower", ["tower frozen", "tower trained"])
def test_shared_prefix(
    benchmark: Any, model: Model, processor: Processor, samples: Sequence[Sample], tower: str
) -> None:
    """Our time is the row's; every round is preceded by the turn of the side that shares nothing."""
    config = RlConfig(
        learning_rate=1e-6,
        max_grad_norm=0.0,
        kl_coef=0.0,
        freeze_vision=tower == "tower frozen",
        activation_checkpointing=harness.GPU,
    )
    everything = AllowedIds(size=model.config.text.vocab_size, banned_ids=())

    def packed(share: bool) -> TrainBatch:
        (batch,) = pack(samples, image_token_id=processor.image_token_id, share_prefixes=share)
        return batch.to(model.device)

    def passes(share: bool) -> torch.Tensor:
        loss_config = GrpoLossConfig(kl_coef=0.0)
        loss, _ = rollout_loss(model, packed(share), everything, loss_config, fused_head=harness.GPU)
        loss.backward()
        return loss.detach()

    with trainable(model, config) as optimizer:

        def step(share: bool) -> None:
            passes(share)
            optimizer.add_up()
            optimizer.step(1.0)
            if harness.GPU:
                torch.cuda.synchronize()

        found = []
        for share in (True, False):
            loss = passes(share)
            found.append((loss, [p.grad.float() for p in model.parameters() if p.grad is not None]))
            model.zero_grad()
        (loss, ours), (expected, theirs) = found
        near = 3e-2 if harness.GPU else 1e-5
        torch.testing.assert_close(loss, expected, rtol=near, atol=near)
        apart = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
        assert apart <= near * torch.stack([g.norm() for g in theirs]).norm()
        del found, ours, theirs

        times: list[float] = []

        def unshared() -> None:
            start = time.perf_counter()
            step(False)
            times.append(time.perf_counter() - start)

        unshared()
        step(True)
        times.clear()
        benchmark.pedantic(step, args=(True,), setup=unshared, rounds=ROUNDS, iterations=1)
    seconds, unshared_s = benchmark.stats.stats.median, median(times)
    batch = packed(True)
    benchmark.extra_info |= {
        "figure": f"{unshared_s / seconds:.2f}x the step that shares nothing",
        "goal": f">= {GOAL:g}x",
        "met": unshared_s / seconds >= GOAL,
        "unshared_s": round(unshared_s, 4),
        "tokens": len(batch.input_ids),
        "unshared_tokens": sum(len(sample.token_ids) for sample in samples),
        "gradients_apart": float(f"{float(apart):.2g}"),
    }
