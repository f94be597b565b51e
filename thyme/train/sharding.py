"""The model as a stage trains it: the module itself on one process, FSDP2's shards of a copy on several.

On several ranks each holds two things: its shard of float32 master weights, which the optimizer steps, and the whole
model in its own dtype, which the engine runs and checkpoints are written from; `publish` brings the first into the
second. Computing gathers a block's weights in the model's dtype when it is reached and drops them after it. Gradients
are summed over ranks in float32, not averaged: losses carry the denominator of the global batch already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thyme.model.model import Model
from thyme.train.distributed import Ranks, World

T = TypeVar("T")


class TrainedModel:
    """The model on one process: `module` and `full` are the same, and nothing needs to be published.

    Args:
        model: what is trained.
        world: the ranks that train it.
    """

    def __init__(self, model: Model, world: World | None = None) -> None:
        self.full = model
        """All weights, in the model's dtype: what the engine runs and what is saved."""
        self.module = model
        """Its parameters are what the optimizer steps."""
        self.world = world or World()

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(model, *args, **kwargs)`, which may use all of the model: pictures, decoder and head."""
        return function(self.module, *args, **kwargs)

    @property
    def are_masters(self) -> bool:
        """Whether the parameters of `module` are float32 masters of a model in another dtype."""
        return self.module is not self.full and self.full.dtype != torch.float32

    def publish(self) -> None:
        """Brings the weights of the last update into `full`, in place."""

    def reload(self) -> None:
        """Takes over the weights of `full`, which were read from somewhere else."""


class ShardedModel(TrainedModel):
    """The model on several ranks; every rank must make it, call it and publish it alike.

    Each call must run the same blocks on every rank, in its backward pass too, or the ranks wait for each other for
    ever: `thyme.train.balance.aligned` sees to that.

    Args:
        model: what is trained, whole on each rank.
        world: the ranks.
        is_frozen: the shards are kept in the model's dtype and never trained.
    """

    def __init__(self, model: Model, world: Ranks, *, is_frozen: bool = False) -> None:
        super().__init__(model, world)
        self._root = _Root(_meta_copy(model, model.dtype if is_frozen else torch.float32))
        self.module = self._root.model
        if is_frozen:
            self.module.requires_grad_(False)
        _shard(self._root, world, model.dtype)
        self.module.to_empty(device=model.device)
        self.reload()

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self._root(function, *args, **kwargs)

    @torch.no_grad()
    def publish(self) -> None:
        for whole, shard in self._pairs():
            if shard.requires_grad:
                # Rounded before it is gathered: half the traffic under a model in bfloat16.
                whole.copy_(shard.to(whole.dtype).full_tensor())

    @torch.no_grad()
    def reload(self) -> None:
        from torch.distributed.tensor import distribute_tensor

        for whole, shard in self._pairs():
            # Every rank has the whole and cuts its own part out: no rank sends anything.
            own = distribute_tensor(whole.detach(), shard.device_mesh, shard.placements, src_data_rank=None)
            shard.to_local().copy_(own.to_local())

    def _pairs(self) -> list[tuple[Tensor, Any]]:
        return list(zip(self.full.parameters(), self.module.parameters(), strict=True))


class _Root(nn.Module):
    """FSDP gathers what belongs to no block, the head among it, around this module's forward."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return function(self.model, *args, **kwargs)


def trained_model(model: Model, world: World | None) -> TrainedModel:
    """`model`, ready to be trained by the ranks of `world`; as it is where that is one process."""
    return ShardedModel(model, world) if isinstance(world, Ranks) else TrainedModel(model, world)


def _shard(root: _Root, world: Ranks, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # Inputs are not cast: rotary tables are float32 whatever the weights are.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    model = root.model
    blocks: list[nn.Module] = [*model.decoder.layers, *(model.visual.blocks if model.visual is not None else ())]
    for module in (*blocks, root):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _meta_copy(model: Model, dtype: torch.dtype) -> Model:
    """The model with parameters that have a shape and no memory yet."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=dtype), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo[id(model.processor)] = model.processor  # the tokenizer need not be copied
    return copy.deepcopy(model, memo)
