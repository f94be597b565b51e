"""What of a model a stage trains, and what its passes keep in memory: the same switches for every stage."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from thyme.model.model import Model
from thyme.train.config import StageConfig
from thyme.train.optim import Optimizer, build_optimizer

FUSED_VOCABULARY = 32_768
"""Words from which on the LM head is fused with the loss where the config leaves it open."""


@contextmanager
def trainable(model: Model, config: StageConfig, *, are_masters: bool = False) -> Iterator[Optimizer]:
    """Freezes what `config` freezes and recomputes what it recomputes, inside the block; undone after it.

    Args:
        model: what is trained.
        config: of the stage.
        are_masters: see `Optimizer`.

    Yields:
        The optimizer of `config` over what is left to train.

    Raises:
        ValueError: nothing is left to train, or see `Optimizer`.
    """
    frozen = [p for part in frozen_parts(model, config) for p in part.parameters() if p.requires_grad]
    recomputing = [part for part in (model.decoder, model.visual) if part is not None and not part.recomputes]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for part in recomputing:
        part.recomputes = config.activation_checkpointing
    try:
        yield build_optimizer(model, config, are_masters=are_masters)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for part in recomputing:
            part.recomputes = False


def fuses_head(model: Model, config: StageConfig) -> bool:
    """Whether the LM head is fused with the loss: as configured, or by the size of the vocabulary."""
    if config.fused_head is not None:
        return config.fused_head
    return model.config.text.vocab_size >= FUSED_VOCABULARY


def frozen_parts(model: Model, config: StageConfig) -> list[nn.Module]:
    """What `config` freezes of the vision tower; nothing of a text model."""
    visual = model.visual
    if visual is None:
        return []
    parts: list[nn.Module] = [visual.patch_embed, visual.blocks] if config.freeze_vision else []
    return parts + ([visual.merger] if config.freeze_merger else [])
