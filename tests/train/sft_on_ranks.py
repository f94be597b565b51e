"""What each rank of tests/train/test_distributed.py runs: SFT by all ranks, and by this process alone.

The first rank writes, as JSON, the largest differences between the two.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thyme.data.rows import Demonstration
from thyme.model import LoraConfig, Model, add_adapters, build
from thyme.toy.model import tiny_config, tiny_processor
from thyme.toy.scenarios import demonstrations
from thyme.train import trainable
from thyme.train.config import DistributedConfig, SftConfig
from thyme.train.distributed import World, open_world
from thyme.train.metrics import Metrics
from thyme.train.muon import whole
from thyme.train.optim import Optimizer
from thyme.train.sft import row_samples, train_sft

PROCESSOR = tiny_processor()
STEPS = (("crop", "arithmetic", "arithmetic", "zoom", "arithmetic"), ("arithmetic", "crop"), ("zoom",))
"""Scenarios by step: a rank without pictures, one row each, and a rank without any row."""
GRADIENTS: list[list[Tensor]] = []
OPTIMIZERS: list[Optimizer] = []


def rows(start: int, n: int) -> Sequence[Demonstration]:
    return [demonstrations(0, 1, {name: 1.0}, start=start + i)[0] for i, name in enumerate(STEPS[start // n])]


class Recorder(Optimizer):
    """Keeps the gradients of every step, gathered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        OPTIMIZERS.append(self)

    def step(self, share: float, loss: float = 0.0) -> float:
        GRADIENTS.append([torch.zeros(()) if p.grad is None else whole(p.grad).clone() for p in self.parameters])
        return super().step(share, loss)


def train(
    config: SftConfig, world: World | None, *, dtype: torch.dtype = torch.float32, lora: bool = False
) -> tuple[Model, list[Metrics], list[list[Tensor]]]:
    GRADIENTS.clear()
    model = build(tiny_config(), PROCESSOR, seed=0, dtype=dtype)
    if lora:
        add_adapters(model, LoraConfig(rank=4, alpha=16.0))
    samples = row_samples(PROCESSOR, rows, "all", "short")
    history = train_sft(model, PROCESSOR, samples, config, world=world)
    return model, history, list(GRADIENTS)


def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def differences(config: SftConfig, world: World, **model_options: Any) -> dict[str, Any]:
    model, history, gradients = train(config, world, **model_options)
    alone, expected, true = train(config, None, **model_options)
    return {
        "losses": [entry["loss"] for entry in history],
        "expected": [entry["loss"] for entry in expected],
        "tokens": [entry["batch/tokens"] for entry in history] == [entry["batch/tokens"] for entry in expected],
        "gradients": [furthest(ours, theirs) for ours, theirs in zip(gradients, true, strict=True)],
        "weights": max(
            float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True)
        ),
    }


def masters(config: SftConfig, world: World) -> dict[str, Any]:
    """A model in bfloat16: how alike its masters moved, and whether the model is what they round to."""
    start = [p.detach().float() for p in build(tiny_config(), PROCESSOR, seed=0, dtype=torch.bfloat16).parameters()]
    moved: list[Tensor] = []
    rounds = True
    for ranks in (world, None):
        model, _, _ = train(config, ranks, dtype=torch.bfloat16)
        kept = [whole(master) for master in OPTIMIZERS[-1].state_dict()["masters"].values()]
        rounds &= all(torch.equal(p, master.to(p.dtype)) for p, master in zip(model.parameters(), kept, strict=True))
        moved.append(torch.cat([(master - p).flatten() for master, p in zip(kept, start, strict=True)]).double())
    cosine = torch.dot(moved[0], moved[1]) / moved[0].norm() / moved[1].norm()
    return {"cosine": float(cosine), "longer": float(moved[0].norm() / moved[1].norm()), "rounds": rounds}


def main() -> None:
    torch.set_num_threads(1)
    trainable.build_optimizer = Recorder  # type: ignore[assignment]
    out, shard_ranks = Path(sys.argv[1]), int(sys.argv[2])
    common: dict[str, Any] = {"steps": len(STEPS), "batch_size": 5, "loss_rule": "all", "warmup_steps": 0}
    with open_world(DistributedConfig(shard_ranks=shard_ranks)) as world:
        found = {
            "muon": differences(SftConfig(**common, max_tokens_per_micro_batch=100), world),
            "adamw": differences(SftConfig(**common, optimizer="adamw", fused_head=True), world),
        }
        if sys.argv[3:] == ["more"]:
            adamw = common | {"optimizer": "adamw"}
            spared = SftConfig(**adamw, freeze_vision=True, activation_checkpointing=True)
            found["spared"] = differences(spared, world)
            found["lora"] = differences(SftConfig(**adamw), world, lora=True)
            found["masters"] = masters(SftConfig(**common, learning_rate=1e-6, muon_learning_rate=1e-6), world)
        if world.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
