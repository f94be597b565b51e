"""Log-probs and entropies straight from hidden states: the LM head fused in, its logits never stored in full.

With z = hidden weight^T, x = z - max(z) over the ids that count, and tau the token's temperature,

    logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
    dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)
    dL / dhidden = dz weight        dL / dweight = dz^T hidden        g = dL / dlogprob, h = dL / dentropy

Rows of mask False are taken out before the matmul, so the cost is that of the rows that count.

Equal bits, always on one machine: in Triton a row has the same whatever rows are beside it, and whether it is given a
temperature of 1 or none. On a CPU its logits come from a matrix product of torch, of 16 rows at least, whose bits for a
row were never seen to depend on the others with the instructions that MKL itself chooses; with those of
MKL_CBWR=COMPATIBLE they do.

The forward keeps a few numbers a row. The backward goes by chunks of rows, of one size and as few as the workspace
allows: dz of a chunk in the operands' dtype, then two matmuls, dL / dweight summed in float32 over the chunks. It has
dz from one of two places:

    recompute    the tiles of z once more: 8 N H V flops in all, nothing is kept
    kept_tiles   of the first chunk the forward keeps x, the distance to the largest so far, and the backward turns it
                 into dz where it lies: 6 N H V flops for those rows. Of 16-bit operands x is float16, whose steps are
                 finest where p is largest: it adds 2e-5 to the relative error of dz, whose own rounding to bfloat16 is
                 1e-3, and up to 6e-4 in a row whose words are all far below the largest.

Where the gradient g is known before, as that of a cross entropy is, forward and backward go together, chunk by chunk:
6 N H V at any N. linear_grpo_loss.py does the same for its losses of single tokens.

Memory beyond the gradients: `workspace_bytes`, which holds the tiles; 16 bytes a row and 2,048 words in the forward; of
16-bit operands in more than one chunk dL / dweight in float32. The torch path upcasts 16-bit operands to float32, the
weight as a whole.

Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; a head fused with its loss:
Wijmans et al., "Cut your losses in large-vocabulary language models", 2024, and Liger-Kernel.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_tensor, on_its_device, values_visible
from thyme.kernels.library import registered
from thyme.kernels.linear_gradient import backward_tiles, gradient_tiles, scale_in_place
from thyme.kernels.linear_rows import HeadRows, backward_cpu, checked_rows, forward_cpu, gradient_cpu, spread
from thyme.kernels.linear_tiles import forward_tiles
from thyme.kernels.logit_rows import Backend, BannedIds, fastest

Backward = Literal["recompute", "kept_tiles"]

WORKSPACE_BYTES = 1 << 30


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tau: Tensor | None,
        banned: Tensor | None,
        vocab_size: int,
        keep: bool,
        workspace_bytes: int,
        known: Tensor | None,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:2]
        if not any(needs) or len(hidden) == 0 or hidden.dtype == torch.float16:  # which is scaled by the largest row
            known = None
        keep = any(needs) and (keep or known is not None)
        rows = HeadRows(hidden, weight, targets, tau, banned, vocab_size, keep, workspace_bytes)
        ctx.kept = ctx.gradients = None
        if known is not None:
            run = gradient_tiles if backend == "triton" else partial(gradient_cpu, backend=backend)
            stats, *ctx.gradients = run(rows, lambda at, *_: (known[at], None), needs)
            keep = False  # of what a second backward does
        else:
            stats, ctx.kept = forward_tiles(rows) if backend == "triton" else forward_cpu(rows, backend)
        ctx.save_for_backward(hidden, weight, targets, tau, banned, stats, known)
        ctx.options, ctx.backend = (vocab_size, keep, workspace_bytes), backend
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[4].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, tau, banned, stats, known = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 10
        if g is not None and h is None and ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None  # they are given away; a second backward recomputes
            scale_in_place(gradients, _factor(g, known), ctx.backend)
            return *gradients, *((None,) * 8)
        g = torch.zeros_like(stats[0]) if g is None else g.contiguous()  # the gradient of a sum has stride 0
        h = None if h is None else h.contiguous()
        kept, ctx.kept = ctx.kept, None  # becomes dz; a second backward recomputes
        run = backward_tiles if ctx.backend == "triton" else partial(backward_cpu, backend=ctx.backend)
        rows = HeadRows(hidden, weight, targets, tau, banned, *ctx.options)
        return *run(rows, stats, kept, g, h, ctx.needs_input_grad[:2]), *((None,) * 8)


def _factor(g: Tensor, known: Tensor) -> Tensor:
    """g over known, a scalar of the device; NaN where they are not proportional, an error where values are visible."""
    unit = known / known.abs().amax().clamp_min(1e-38)
    factor = (g * unit).sum() / (known * unit).sum().clamp_min(1e-38)
    off = (g - factor * known).abs().amax() > 1e-3 * (factor * known).abs().amax()
    if values_visible(g) and bool(off):
        raise ValueError("logprob_gradient is not proportional to the gradient that backward() brings")
    return torch.where(off, torch.nan, factor)


def _linear_logprob(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    num_counted: int | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
    backward: Backward,
    workspace_bytes: int,
    logprob_gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if backward not in get_args(Backward):
        raise ValueError(f"backward must be one of {', '.join(get_args(Backward))}, got {backward!r}")
    rows, counted = checked_rows(
        backend,
        hidden,
        weight,
        targets,
        temperature,
        mask,
        num_counted,
        vocab_size,
        banned_ids,
        keep=backward == "kept_tiles",
        workspace_bytes=workspace_bytes,
    )
    known = logprob_gradient
    if known is not None:
        check_tensor("logprob_gradient", known, (len(hidden),), FLOATS_AND_DOUBLE, hidden.device)
        known = known.detach() if counted is None else known.detach().index_select(0, counted)
        known = known.to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()
    logprob, entropy = _LinearLogprob.apply(*rows, known, backend)
    return spread(logprob, counted, len(hidden)), spread(entropy, counted, len(hidden))


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = WORKSPACE_BYTES,
    logprob_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in torch, a chunk of rows at a time: the definition."""
    return _linear_logprob(
        "ref",
        hidden,
        weight,
        targets,
        temperature,
        mask,
        num_counted,
        vocab_size,
        banned_ids,
        backward,
        workspace_bytes,
        logprob_gradient,
    )


@on_its_device
def linear_logprob_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = WORKSPACE_BYTES,
    logprob_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in Triton; float32, bfloat16 or float16."""
    return _linear_logprob(
        "triton",
        hidden,
        weight,
        targets,
        temperature,
        mask,
        num_counted,
        vocab_size,
        banned_ids,
        backward,
        workspace_bytes,
        logprob_gradient,
    )


@registered
@on_its_device
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = WORKSPACE_BYTES,
    logprob_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row under softmax(hidden weight^T), differentiable in both.

    Args:
        hidden: [N, H] float32, bfloat16 or float16 (float64 on a CPU); row t predicts targets[t].
        weight: [V, H] of the same dtype, contiguous on a GPU. One that needs no gradient costs no matmul for it.
        targets: [N] int64 in [0, vocab_size), not banned; anything in masked rows.
        temperature: [N] float, >= 0; 0 counts as 1. None: all 1.
        mask: [N] bool; a row of False is never read, returns 0.0 and has gradient exactly 0. None: all True.
        num_counted: how many rows of the mask are True, from a caller that knows. None: on a GPU the host waits once,
            to learn it. A wrong number is an error where values are visible; elsewhere rows go missing, or count that
            do not.
        vocab_size, banned_ids: as in `sample`.
        backward: "recompute" or "kept_tiles"; see the module's docstring.
        workspace_bytes: what tiles and logits in flight may take, forward and backward; bytes.
        logprob_gradient: [N] float, what dL / dlogprob will be up to one factor, from a caller that knows; entropies
            have none then. The forward makes the gradients, in place of `backward` (not of float16). Where
            backward() brings another one, gradients are NaN, and on a CPU that is an error.

    Returns:
        (logprob [N] at the temperature, entropy [N] at temperature 1), nats, float32 (float64 for float64 operands).

    Raises:
        ValueError: a wrong shape, dtype, device or option, or a workspace too small for one tile of rows; on a CPU, or
            under THYME_VALIDATE=1, also a wrong value.
    """
    return _linear_logprob(
        fastest(hidden),
        hidden,
        weight,
        targets,
        temperature,
        mask,
        num_counted,
        vocab_size,
        banned_ids,
        backward,
        workspace_bytes,
        logprob_gradient,
    )
