"""The plan's peak against the bytes of all tensors that live at once in a training step, op by op."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.test_lora_training import tensors
from tests.train.test_memory import larger
from tests.train.test_trainable import packed
from thyme.model import ImageInputs, LoraConfig, Model, Processor, add_adapters, build
from thyme.train.config import StageConfig
from thyme.train.memory import Job, plan
from thyme.train.objective import AllowedIds, supervised_loss
from thyme.train.optim import Optimizer
from thyme.train.packing import TrainBatch
from thyme.train.trainable import trainable


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, after every op."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in standing:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def step(model: Model, optimizer: Optimizer, batch: TrainBatch) -> None:
    """Two micro-batches, so that the second one meets the gradients of the first."""
    for _ in range(2):
        supervised_loss(model, batch, AllowedIds(size=64, banned_ids=())).backward()
        optimizer.add_up()
    optimizer.step(1.0)


@pytest.mark.parametrize(
    ("said", "dtype", "lora"),
    [
        pytest.param({"activation_checkpointing": True}, torch.float32, LoraConfig(), marks=pytest.mark.soak),
        ({}, torch.bfloat16, LoraConfig()),
        ({"activation_checkpointing": True}, torch.bfloat16, LoraConfig()),
        pytest.param({"freeze_vision": True}, torch.bfloat16, LoraConfig(), marks=pytest.mark.soak),
        pytest.param({}, torch.bfloat16, LoraConfig(rank=8), marks=pytest.mark.soak),
        pytest.param({"activation_checkpointing": True}, torch.bfloat16, LoraConfig(rank=8), marks=pytest.mark.soak),
    ],
)
def test_the_peak_of_a_step_is_the_plan_s(
    said: dict[str, Any],
    dtype: torch.dtype,
    lora: LoraConfig,
    processor: Processor,
    picture: Callable[[int], ImageInputs],
) -> None:
    model = build(larger(), processor, dtype=dtype)
    if lora.rank:
        add_adapters(model, lora)
    stage = StageConfig(optimizer="adamw", fused_head=False, **said)
    batch = packed(processor, [(200, [picture(2 * i), picture(2 * i + 1)]) for i in range(3)])
    with trainable(model, stage) as optimizer:
        step(model, optimizer, batch)
        state = [t for t in tensors(optimizer.state_dict()) if t.ndim]
        with Live([*model.parameters(), *state]) as live:
            step(model, optimizer, batch)
    assert batch.pixel_values is not None
    tokens = len(batch.input_ids)
    job = Job(
        model=model.config,
        stage=replace(stage, max_tokens_per_micro_batch=tokens),
        lora=lora,
        itemsize=dtype.itemsize,
        image_share=len(batch.pixel_values) / 4 / tokens,
    )
    found = plan(job)
    assert max(map(found.total, found.phases)) == pytest.approx(live.peak, rel=0.1)
