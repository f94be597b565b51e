"""The optimizer: Muon for the matrices inside blocks, AdamW for embeddings, head, patch projection, norms and biases.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to a momentum, which suits
hidden layers and nothing else. One schedule scales both rates: warm-up, flat, decay in the last share of the steps.
"""

import math
from typing import Any

import torch
from torch import nn

from thyme.train.config import StageConfig
from thyme.train.muon import Muon

BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95


def rate_share(config: StageConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) of `steps` uses.

    The first step already moves (1/warmup_steps) and so does the last one: the decay would reach `final_rate` one
    step later.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = round(config.decay_share * steps)
    done = (step - (steps - decay_steps)) / max(decay_steps, 1)
    if done <= 0:
        return 1.0
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_rate + (1 - config.final_rate) * falling


class Optimizer:
    """Steps the trainable parameters of `model`; holds the optimizer's state, not the step count.

    Raises:
        ValueError: the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, config: StageConfig) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        self.config = config
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if config.optimizer == "muon" and is_block_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._peaks: list[tuple[torch.optim.Optimizer, float]] = []
        if rest:
            adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS, fused=True)
            self._peaks.append((adamw, config.learning_rate))
        if matrices:
            muon = Muon(matrices, momentum=MUON_MOMENTUM, weight_decay=config.weight_decay)
            self._peaks.append((muon, config.muon_learning_rate))

    def step(self, share: float) -> float:
        """One update at `share` of the peak rates, then the gradients are dropped. Returns the norm before clipping."""
        limit = self.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        for optimizer, peak in self._peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer, _ in self._peaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, _ in self._peaks:
            optimizer.load_state_dict(state[type(optimizer).__name__])


def build_optimizer(model: nn.Module, config: StageConfig) -> Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`."""
    return Optimizer(model, config)


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may have it: a matrix between hidden states, not an embedding, a head or a patch filter."""
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
