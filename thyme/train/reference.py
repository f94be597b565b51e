"""The reference policy of the KL term: the model as training found it, on the device or mostly in host memory."""

from typing import Any

import torch
from torch import Tensor, nn

from thyme.model.model import Model
from thyme.train.config import RlConfig
from thyme.train.distributed import Ranks, World
from thyme.train.sharding import ShardedModel


def reference_policy(model: Model, config: RlConfig, world: World | None = None) -> Model | ShardedModel | None:
    """What the KL term measures against; None where there is no KL term. A policy with adapters is its own reference,
    read without them: there is no copy. Several ranks share one copy, unless it lies in host memory.

    Args:
        model: the policy before its first step.
        config: its `kl_coef` and `reference`.
        world: the ranks that train the policy.
    """
    if config.kl_coef == 0:
        return None
    if model.lora is not None:
        return model
    if isinstance(world, Ranks) and config.reference == "device":
        return ShardedModel(model, world, is_frozen=True)
    reference = frozen_copy(model, blocks_on_host=config.reference == "host")
    if config.reference == "host":
        for block in blocks(reference):
            stream(block, model.device)
    return reference


def frozen_copy(model: Model, *, blocks_on_host: bool = False) -> Model:
    """A copy that is never trained, in the model's dtype.

    Args:
        model: stays as it is; its processor is not the copy's.
        blocks_on_host: decoder layers and vision blocks lie in host memory (pinned, for a GPU) and never exist twice
            on the device; embeddings, head, merger and the last norm are on it.
    """
    far = {id(p) for block in blocks(model) for p in block.parameters()} if blocks_on_host else set()

    def copied(p: Tensor) -> Tensor:
        if id(p) not in far:
            return p.detach().clone()
        host = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.device.type == "cuda")
        return host.copy_(p.detach())

    with torch.device("meta"):
        reference = Model(model.config)
    reference.load_state_dict({name: copied(p) for name, p in model.named_parameters()}, assign=True)
    return reference.requires_grad_(False)


def blocks(model: Model) -> list[nn.Module]:
    """Decoder layers and vision blocks: all but a few matrices of a large model."""
    return [*model.decoder.layers, *(model.visual.blocks if model.visual is not None else ())]


def stream(block: nn.Module, device: torch.device) -> None:
    """From here on the block's parameters are on `device` while it runs; for a block that is never trained."""
    homes = [(part, name, p) for part in block.modules() for name, p in part.named_parameters(recurse=False)]

    def fetch(*_: Any) -> None:
        for part, name, home in homes:
            setattr(part, name, nn.Parameter(home.to(device, non_blocking=True), requires_grad=False))

    def drop(*_: Any) -> None:
        for part, name, home in homes:
            setattr(part, name, home)

    block.register_forward_pre_hook(fetch)
    block.register_forward_hook(drop, always_call=True)
