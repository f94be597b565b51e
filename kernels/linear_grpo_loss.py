"""`grpo_loss` straight from hidden states: the LM head fused in, its logits never stored in full.

The loss of a token, of the losses that are not of whole sequences, hangs on its own log-prob alone; so a chunk of rows
is done with at once, while its tiles are there: forward, the loss's g and h, dz, and the two matmuls. That is
`backward="in_forward"`:

    6 N H V flops at any N, and the tiles of one chunk; the gradients exist when the forward ends, and backward() hands
    them out, times its own gradient. A second backward() (retain_graph) computes them again.

It is so where a gradient is wanted (that of hidden, of weight, or both: the other costs no matmul) and `config.loss` is
"ppo" or "cispo". Else, and for float16, whose gradients have to be scaled by the largest of all rows, the op is
`linear_logprob` with `backward="recompute"` and the loss of its log-probs, 8 N H V.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_tensor, on_its_device, values_visible
from thyme.kernels.library import registered
from thyme.kernels.linear_gradient import gradient_tiles, scale_in_place
from thyme.kernels.linear_logprob import (
    WORKSPACE_BYTES,
    Backward,
    linear_logprob,
    linear_logprob_ref,
    linear_logprob_triton,
)
from thyme.kernels.linear_rows import HeadRows, checked_rows, gradient_cpu, spread
from thyme.kernels.logit_rows import Backend, BannedIds, fastest
from thyme.kernels.policy_loss import GrpoLossConfig, GrpoMetrics, policy_loss, weighted_policy_loss

LossBackward = Literal["in_forward", "recompute", "kept_tiles"]

_OF_TOKENS = ("ppo", "cispo")
"""Losses of a token that hang on no other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """What the loss is told beside log-probs and entropies: vectors [N], some of whose rows count."""

    advantages: Tensor
    weights: Tensor
    more: dict[str, Tensor | None]
    """Arguments of `policy_loss` by name, [N] each."""
    cu_seqlens: Tensor | None
    config: GrpoLossConfig
    counted: Tensor | None
    """[n] int64, the rows that count; None: all."""
    backend: Backend

    def loss(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, GrpoMetrics]:
        """Of all rows; logprob and entropy [n] of those that count."""
        logprob, entropy = (spread(x, self.counted, len(self.weights)) for x in (logprob, entropy))
        more: Any = self.more | {"cu_seqlens": self.cu_seqlens, "backend": self.backend}
        return policy_loss(logprob, entropy, self.advantages, self.weights, config=self.config, **more)

    def gradient(self, at: slice, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dL / dlogprob, dL / dentropy or None where it is 0) of some of the rows that count."""

        def rows(x: Tensor) -> Tensor:
            return x[at] if self.counted is None else x.index_select(0, self.counted[at])

        has_bonus = self.config.entropy_coef != 0
        more: Any = {name: None if x is None else rows(x) for name, x in self.more.items()}
        with torch.enable_grad():
            logprob, entropy = logprob.detach().requires_grad_(), entropy.detach().requires_grad_(has_bonus)
            loss, _ = policy_loss(
                logprob,
                entropy,
                rows(self.advantages),
                rows(self.weights),
                config=self.config,
                backend=self.backend,
                **more,
            )
            inputs = (logprob, entropy) if has_bonus else (logprob,)
            g, *h = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return g, h[0] if h else None


class _TokenLoss(torch.autograd.Function):
    """(loss, the values of its metrics, their names); `rows` is without hidden and weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Callable[..., HeadRows], tokens: _Tokens, backend: Backend
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        needs = ctx.needs_input_grad[:2]
        run = gradient_tiles if backend == "triton" else partial(gradient_cpu, backend=backend)
        ctx.run = lambda hidden, weight: run(rows(hidden, weight), tokens.gradient, needs)
        stats, *ctx.gradients = ctx.run(hidden, weight)
        ctx.save_for_backward(hidden, weight)
        ctx.backend = backend
        loss, metrics = tokens.loss(stats[0], stats[4])
        ctx.mark_non_differentiable(metrics.values)
        return loss, metrics.values, metrics.names

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # they are given away; a second backward computes them again
        if gradients is None:
            _, *gradients = ctx.run(*ctx.saved_tensors)
        scale_in_place(gradients, scale, ctx.backend)
        return *gradients, None, None, None


_ROW_PASSES: dict[Backend, Callable[..., tuple[Tensor, Tensor]]] = {
    "ref": linear_logprob_ref,
    "native": linear_logprob,
    "triton": linear_logprob_triton,
}


def _linear_grpo_loss(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    temperature: Tensor | None,
    cu_seqlens: Tensor | None,
    num_counted: int | None,
    tempered: bool,
    vocab_size: int | None,
    banned_ids: BannedIds,
    config: GrpoLossConfig | None,
    backward: LossBackward,
    workspace_bytes: int,
    **more: Tensor | None,
) -> tuple[Tensor, GrpoMetrics]:
    if backward not in get_args(LossBackward):
        raise ValueError(f"backward must be one of {', '.join(get_args(LossBackward))}, got {backward!r}")
    config = config or GrpoLossConfig()
    check_tensor("hidden", hidden, (None, None))
    check_tensor("weights", weights, (len(hidden),), FLOATS_AND_DOUBLE, hidden.device)
    if values_visible(weights) and not bool(weights.isfinite().all()):
        raise ValueError("weights must be finite")
    if not tempered:
        _check_untempered(temperature)
    among: Any = {
        "temperature": temperature if tempered else None,
        "vocab_size": vocab_size,
        "banned_ids": banned_ids,
        "workspace_bytes": workspace_bytes,
    }
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if backward != "in_forward" or not wanted or config.loss not in _OF_TOKENS or hidden.dtype == torch.float16:
        how: Backward = "kept_tiles" if backward == "kept_tiles" else "recompute"

        def row_pass(mask: Tensor | None) -> tuple[Tensor, Tensor]:
            count = None if mask is None else num_counted
            return _ROW_PASSES[backend](hidden, weight, targets, mask=mask, num_counted=count, backward=how, **among)

        tokens: Any = more | {"temperature": temperature, "cu_seqlens": cu_seqlens}
        return weighted_policy_loss(row_pass, weights, advantages, config, backend, **tokens)

    mask: Tensor | None = weights != 0
    if values_visible(weights) and bool((weights != 0).all()) and num_counted in (None, len(weights)):
        mask = num_counted = None
    rows, counted = checked_rows(
        backend, hidden, weight, targets, mask=mask, num_counted=num_counted, keep=True, **among
    )
    vectors = more | {"temperature": temperature}
    for name, vector in {"advantages": advantages, **vectors}.items():
        if vector is not None:
            check_tensor(name, vector, (len(hidden),), None, hidden.device)
    of_tokens = _Tokens(
        advantages=advantages,
        weights=weights,
        more=vectors,
        cu_seqlens=cu_seqlens,
        config=config,
        counted=counted,
        backend=backend,
    )
    rest = rows[2:]
    loss, values, names = _TokenLoss.apply(
        rows.hidden, rows.weight, lambda hidden, weight: HeadRows(hidden, weight, *rest), of_tokens, backend
    )
    return loss, GrpoMetrics(names, values)


def _check_untempered(temperature: Tensor | None) -> None:
    if temperature is not None and values_visible(temperature):
        other = (temperature != 0) & (temperature != 1)
        if bool(other.any()):
            row = int(other.nonzero()[0])
            raise ValueError(f"tempered=False, but temperature[{row}] is {temperature[row].item()}: neither 0 nor 1")


def linear_grpo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    num_counted: int | None = None,
    tempered: bool = True,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: LossBackward = "in_forward",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`linear_grpo_loss` in torch, a chunk of rows at a time: the definition."""
    return _linear_grpo_loss(
        "ref",
        hidden,
        weight,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        num_counted=num_counted,
        tempered=tempered,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        config=config,
        backward=backward,
        workspace_bytes=workspace_bytes,
    )


@on_its_device
def linear_grpo_loss_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    num_counted: int | None = None,
    tempered: bool = True,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: LossBackward = "in_forward",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`linear_grpo_loss` with the head and the row pass in Triton; float32, bfloat16 or float16."""
    return _linear_grpo_loss(
        "triton",
        hidden,
        weight,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        num_counted=num_counted,
        tempered=tempered,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        config=config,
        backward=backward,
        workspace_bytes=workspace_bytes,
    )


@registered
@on_its_device
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    num_counted: int | None = None,
    tempered: bool = True,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: LossBackward = "in_forward",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`grpo_loss` of the logits hidden weight^T, which are never stored in full; differentiable in both.

    Args:
        hidden, weight, targets, workspace_bytes: as in `linear_logprob`; weights != 0 is its mask, and num_counted how
            many they are.
        tempered: False: the caller knows that no temperature is other than 0, which counts as 1, or 1: a tile then has
            one exponential a logit to do, not two.
        backward: "in_forward", or as in `linear_logprob`; see the module's docstring.
        advantages, weights and the rest: as in `grpo_loss`.

    Returns:
        (loss, a scalar in float32, or float64 for float64 operands; GrpoMetrics).

    Raises:
        ValueError: as in `linear_logprob` and `grpo_loss`.
    """
    return _linear_grpo_loss(
        fastest(hidden),
        hidden,
        weight,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        num_counted=num_counted,
        tempered=tempered,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        config=config,
        backward=backward,
        workspace_bytes=workspace_bytes,
    )
