"""The optimizer: Muon for the matrices inside blocks, AdamW for embeddings, head, patch projection, norms and biases.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to a momentum, which suits
hidden layers and nothing else. One schedule scales both rates: warm-up, flat, decay in the last share of the steps.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from thyme.train.config import StageConfig
from thyme.train.muon import Muon, sharded_like, whole

BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95

State = dict[str, dict[str, Tensor]]
"""Optimizer's name, or "masters" -> "<parameter>:<entry>", or the parameter's name -> value."""


def rate_share(config: StageConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) of `steps` uses.

    The first step already moves (1 over the steps of warm-up) and so does the last one: the decay would reach
    `final_rate` one step later.
    """
    warmup_steps = max(config.warmup_steps, round(config.warmup_share * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = round(config.decay_share * steps)
    done = (step - (steps - decay_steps)) / max(decay_steps, 1)
    if done <= 0:
        return 1.0
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_rate + (1 - config.final_rate) * falling


class Optimizer:
    """Steps the trainable parameters of `model`; holds the optimizer's state, not the step count.

    A weight in bfloat16 keeps 8 bits: at the rates of RL nearly every update rounds to nothing. So the optimizer steps
    a float32 master of each weight that is not float32 itself, adds its gradients up in float32, and copies the result
    into the model in place, where the engine reads it. `StageConfig.optimizer_state` and `optimizer_offload` say what
    is kept instead where that is too much memory.

    Args:
        model: its parameters may be shards of several ranks (DTensors, float32).
        config: of the stage.
        are_masters: the parameters are float32 masters of weights that are kept elsewhere in another dtype.

    Raises:
        ValueError: the model has no trainable parameter, or its weights do not go with `config.optimizer_state`.
    """

    def __init__(self, model: nn.Module, config: StageConfig, *, are_masters: bool = False) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        self.config = config
        self.parameters = [p for _, p in named]
        _check_sharded(self.parameters, config)
        self._masters: dict[nn.Parameter, Tensor] = {}
        if config.optimizer_state == "fp32":
            self._masters = {p: self._master(p) for p in self.parameters if self._needs_master(p)}
        stepped = [(name, self._masters.get(p, p)) for name, p in named]
        self._stepped = dict(stepped)
        self._kept_masters = {name: self._stepped[name] for name, p in named if are_masters or p in self._masters}
        matrices = [p for name, p in stepped if config.optimizer == "muon" and is_block_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in stepped if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._peaks: list[tuple[torch.optim.Optimizer, float]] = []
        if rest:
            self._peaks.append((_adamw([g for g in groups if g["params"]], config), config.learning_rate))
        if matrices:
            muon = Muon(matrices, momentum=MUON_MOMENTUM, weight_decay=config.weight_decay)
            self._peaks.append((muon, config.muon_learning_rate))

    def add_up(self) -> None:
        """To be called after each backward pass: sums gradients in float32, where the masters are beside the model."""
        if not self.config.optimizer_offload:
            self._move_gradients()

    def step(self, share: float, loss: float = 0.0) -> float:
        """One update at `share` of the peak rates, then the gradients are dropped.

        Nothing is updated where the norm or `loss` is not a finite number: one such gradient would spoil every weight.

        Returns:
            The norm of all gradients before clipping.
        """
        self.add_up()
        offloaded = self.config.optimizer_offload
        graded = [p if offloaded else self._masters.get(p, p) for p in self.parameters]
        norm = _total_norm([p.grad for p in graded if p.grad is not None])
        if norm.isfinite() and math.isfinite(loss):
            nn.utils.clip_grads_with_norm_(graded, self.config.max_grad_norm or math.inf, norm)
            if offloaded:
                self._move_gradients()
            for optimizer, peak in self._peaks:
                for group in optimizer.param_groups:
                    if isinstance(group["lr"], Tensor):  # torchao's, compiled with it
                        group["lr"].fill_(peak * share)
                    else:
                        group["lr"] = peak * share
                optimizer.step()
            self._publish()
        for parameter in (*self.parameters, *self._masters.values()):
            parameter.grad = None
        return float(norm)

    def state_dict(self) -> State:
        """What is kept beside the weights: of each optimizer, and float32 masters, by name of the parameter.

        Of several ranks, each one's shards.
        """
        names = {p: name for name, p in self._stepped.items()}
        state: State = {}
        for optimizer, _ in self._peaks:
            entries = state[type(optimizer).__name__] = {}
            for parameter, held in optimizer.state.items():
                entries |= {f"{names[parameter]}:{entry}": value for entry, value in held.items()}
        return state | (
            {"masters": {name: p.detach() for name, p in self._kept_masters.items()}} if self._kept_masters else {}
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from what `state_dict` of an optimizer with the same settings gave, on any number of ranks.

        Args:
            state: whole tensors, or shards as this rank has them.

        Raises:
            ValueError: the state is another optimizer's, or of another layout.
        """
        masters = state.get("masters", {})
        self.check_layout(state.keys() - {"masters"}, len(masters))
        for optimizer, _ in self._peaks:
            for key, value in state[type(optimizer).__name__].items():
                name, _, entry = key.rpartition(":")
                parameter = self._of_name(name)
                optimizer.state[parameter][entry] = _placed(value, parameter)
        for name, value in masters.items():
            self._of_name(name).copy_(_placed(value, self._of_name(name)))
        self._publish()

    def check_layout(self, optimizers: Set[str], masters: int) -> None:
        """Raises ValueError unless a state of these optimizers with so many masters is one of this optimizer's."""
        names = {type(optimizer).__name__ for optimizer, _ in self._peaks}
        if names != optimizers or masters != len(self._kept_masters):
            raise ValueError(
                f"the checkpoint holds {', '.join(sorted(optimizers))} and {masters} float32 masters, this run needs "
                f"{', '.join(sorted(names))} and {len(self._kept_masters)}: resume with its optimizer, state and dtype"
            )

    def room_for(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor for a value that is kept of the parameter `name`: sharded as it is where the shapes are the same."""
        parameter = self._of_name(name)
        if parameter.shape == torch.Size(shape):
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)

    def _of_name(self, name: str) -> Tensor:
        if name not in self._stepped:
            raise ValueError(f"the checkpoint holds the optimizer's state of {name}, which this run does not train")
        return self._stepped[name]

    def _needs_master(self, parameter: nn.Parameter) -> bool:
        offloaded = self.config.optimizer_offload and parameter.device.type != "cpu"
        return parameter.dtype != torch.float32 or offloaded

    def _master(self, parameter: nn.Parameter) -> Tensor:
        device = torch.device("cpu") if self.config.optimizer_offload else parameter.device
        return parameter.detach().to(device, torch.float32, copy=True)

    def _move_gradients(self) -> None:
        for parameter, master in self._masters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.to(master.device, torch.float32)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        """The masters' values into the model, in place."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)


def build_optimizer(model: nn.Module, config: StageConfig, *, are_masters: bool = False) -> Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`."""
    return Optimizer(model, config, are_masters=are_masters)


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may have it: a matrix between hidden states, not an embedding, a head, a patch filter or a
    factor of an adapter."""
    return parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head", "lora"))


def _adamw(groups: list[dict[str, Any]], config: StageConfig) -> torch.optim.Optimizer:
    if config.optimizer_state == "fp32":
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    try:
        from torchao.optim import AdamW8bit, _AdamW
    except ImportError as error:
        raise ValueError(
            f"optimizer_state {config.optimizer_state!r} needs torchao: pip install thyme[train]"
        ) from error
    if config.optimizer_state == "8bit":
        return AdamW8bit(groups, betas=BETAS, bf16_stochastic_round=True)
    if any(p.dtype != torch.bfloat16 for group in groups for p in group["params"]):
        raise ValueError("optimizer_state 'bf16' is for weights in bfloat16: the model's are not, so say 'fp32'")
    return _AdamW(groups, betas=BETAS, bf16_stochastic_round=True)


def _check_sharded(parameters: Sequence[Tensor], config: StageConfig) -> None:
    """Raises where the config asks for what only one process has."""
    if not any(hasattr(p, "full_tensor") for p in parameters):
        return
    if config.optimizer_state != "fp32":
        raise ValueError(
            f"optimizer_state {config.optimizer_state!r} is for one process: ranks share float32 masters and moments"
        )
    if config.optimizer_offload:
        raise ValueError("optimizer_offload is for one process: ranks share masters and moments on their devices")


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A saved value where the parameter is, and sharded as it is unless it is sharded already or a mere number."""
    if hasattr(value, "full_tensor"):
        return value
    value = value.to(parameter.device)
    return sharded_like(value, parameter) if value.shape == parameter.shape else value


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, summed in float32 whatever they are in."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return whole(nn.utils.get_total_norm(gradients))
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
