"""One optimizer step of the demo's base stage and SFT, on 1 and 2 threads, beside its parts.

    pytest bench/bench_train_step.py

The 1.7 M parameter toy; 48 captions or 36 demonstrations, as in the recipe. `data` draws and tokenizes the batch,
`forward` ends at the loss, `optimizer` is Muon and AdamW. extra_info: cpu_s a step, packed and trained tokens of the
batch, gflop_per_s of the matmuls with weights (2 flops a weight and token forward, 6 with backward).
"""

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from thyme.model import build
from thyme.toy.captions import captions
from thyme.toy.config import BaseStageConfig
from thyme.toy.gates import caption_sample
from thyme.toy.model import tiny_config, tiny_processor
from thyme.toy.scenarios import demonstrations
from thyme.train.config import SftConfig
from thyme.train.objective import AllowedIds, normalize, supervised_loss
from thyme.train.optim import build_optimizer
from thyme.train.packing import Sample, pack
from thyme.train.sft import row_sample
from thyme.train.sharding import TrainedModel
from thyme.train.supervised import supervised_step

BASE, SFT = BaseStageConfig(), SftConfig(loss_rule="all")
PROCESSOR = tiny_processor()


def base_samples() -> Sequence[Sample]:
    return [caption_sample(PROCESSOR, caption) for caption in captions(0, BASE.batch_size)]


def sft_samples() -> Sequence[Sample]:
    rows = demonstrations(0, SFT.batch_size, no_code=0.65, box_noise=0.1)
    return [row_sample(PROCESSOR, row, SFT.loss_rule, "short") for row in rows]


STAGES: dict[str, tuple[Callable[[], Sequence[Sample]], BaseStageConfig | SftConfig]] = {
    "base, 48 captions": (base_samples, BASE),
    "sft, 36 demonstrations": (sft_samples, SFT),
}


@pytest.mark.benchmark(group="train step of the toy")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("part", ["whole step", "data", "forward", "forward and backward", "optimizer"])
@pytest.mark.parametrize("stage", STAGES)
def test_train_step(benchmark, stage: str, part: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    make, config = STAGES[stage]
    model = build(tiny_config(), PROCESSOR, seed=0)
    optimizer, trained = build_optimizer(model, config), TrainedModel(model)
    allowed = AllowedIds.of(PROCESSOR)
    samples = make()
    (batch,) = pack(normalize([samples], "batch_tokens"), image_token_id=PROCESSOR.image_token_id)

    def forward() -> torch.Tensor:
        return supervised_loss(model, batch, allowed)

    def step() -> None:
        supervised_step(trained, PROCESSOR, optimizer, make(), rate=0.1, max_tokens=config.max_tokens_per_micro_batch)

    def update() -> None:
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.0)

    run = {
        "whole step": step,
        "data": make,
        "forward": forward,
        "forward and backward": lambda: forward().backward(),
        "optimizer": update,
    }[part]
    rounds, warmup = 5, 2
    for _ in range(warmup):
        run()
    started = time.process_time()
    benchmark.pedantic(run, rounds=rounds)
    benchmark.extra_info["cpu_s"] = round((time.process_time() - started) / rounds, 4)
    torch.set_num_threads(before)

    assert batch.pixel_values is not None and model.visual is not None
    weights = sum(p.numel() for p in model.decoder.layers.parameters())
    seen = sum(p.numel() for p in model.visual.parameters())
    flops = 2 * (weights * sum(batch.lengths) + seen * len(batch.pixel_values))
    passes = {"forward": 1, "forward and backward": 3, "whole step": 3}.get(part)
    if passes:
        gflop_per_s = passes * flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["gflop_per_s"] = round(gflop_per_s, 1)
    benchmark.extra_info["tokens"] = sum(batch.lengths)
    benchmark.extra_info["trained_tokens"] = len(batch.rows)
