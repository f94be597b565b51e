"""Log-probs and entropies straight from hidden states: the LM head fused in, its logits never stored in full.

With z = hidden weight^T, x = z - max(z) over the ids that count, and tau the token's temperature,

    logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
    dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)
    dL / dhidden = dz weight        dL / dweight = dz^T hidden        g = dL / dlogprob, h = dL / dentropy

Rows of mask False are taken out before the matmul, so the cost is that of the rows that count.

Equal bits, always on one machine: in Triton a row has the same whatever rows are beside it. On a CPU its logits come
from a matrix product of torch, of 16 rows at least, whose bits for a row were never seen to depend on the others with
the instructions that MKL itself chooses; with those of MKL_CBWR=COMPATIBLE they do.

The forward keeps a few numbers a row. The backward goes by chunks of rows: dz of a chunk in the operands' dtype, then
two matmuls, dL / dweight summed in float32 over the chunks. It has dz from one of two places:

    recompute   the tiles of z once more: 8 N H V flops in all, nothing is kept
    exp_tiles   the forward keeps exp((z - max so far) / tau) in the operands' dtype for as many rows as fit, and the
                backward turns it into dz where it lies: 6 N H V flops for those rows. Rounding them to bfloat16 adds
                1e-4 to the relative error of dz, whose own rounding is 1e-3; kept logits would add 2e-3. A gradient of
                the entropy needs p_1 too: with one, everything is recomputed.

Memory beyond the gradients: `workspace_bytes`, which holds the tiles; 20 bytes a row and 2,048 words in the forward; of
16-bit operands in more than one chunk dL / dweight in float32. The torch path upcasts 16-bit operands to float32, the
weight as a whole.

Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; a head fused with its loss:
Wijmans et al., "Cut your losses in large-vocabulary language models", 2024, and Liger-Kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.library import registered
from thyme.kernels.linear_tiles import HeadRows, backward_tiles, chunks, forward_tiles, rows_at, rows_that_fit
from thyme.kernels.logit_rows import ROW_PASS, Backend, BannedIds, check_row_arguments, fastest, ids_of, logprobs
from thyme.kernels.policy_loss import GrpoLossConfig, GrpoMetrics, weighted_policy_loss

Backward = Literal["recompute", "exp_tiles"]

_WORKSPACE_BYTES = 1 << 30
_CHUNK = 1 << 18  # logits in flight at once on the CPU, which a core's cache holds,
_CHUNK_ROWS = 256  # but for many words no fewer rows than make it worth to walk dL / dweight once more
_MIN_ROWS = 16  # BLAS gives other bits for a few rows


# --- on a CPU, the row pass in torch (the definition) or in C++ -----------------------------------------------------


class _Plan(NamedTuple):
    weight: Tensor  # [vocab_size, H], in the dtype that is computed in
    banned: Tensor | None  # ids
    z: Tensor  # [step, vocab_size], the logits of one chunk
    kept_rows: int


def _plan(rows: HeadRows) -> _Plan:
    dtype = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
    fit = rows_that_fit(rows.workspace_bytes, rows.vocab_size * dtype.itemsize, _MIN_ROWS)
    step = min(fit, max(_CHUNK_ROWS, _CHUNK // rows.vocab_size // _MIN_ROWS * _MIN_ROWS))
    num_rows, left = len(rows.hidden), fit - step
    return _Plan(
        weight=rows.weight[: rows.vocab_size].to(dtype),
        banned=ids_of(rows.banned),
        z=rows.hidden.new_empty(max(_MIN_ROWS, min(step, num_rows)), rows.vocab_size, dtype=dtype),
        kept_rows=0 if not rows.keep else num_rows if num_rows <= left else left // step * step,
    )


def _logits(rows: HeadRows, plan: _Plan, at: slice) -> Tensor:
    hidden = rows.hidden[at].to(plan.z.dtype)
    num = len(hidden)
    if num < _MIN_ROWS:
        hidden = torch.cat((hidden, hidden.new_zeros(_MIN_ROWS - num, hidden.shape[1])))
    return torch.mm(hidden, plan.weight.T, out=plan.z[: len(hidden)])[:num]


def _forward_cpu(rows: HeadRows, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """(stats [5, n]: logprob, then those of the row pass; p_tau of the first rows)."""
    plan = _plan(rows)
    kept = plan.z.new_empty(plan.kept_rows, rows.vocab_size) if plan.kept_rows else None
    stats = plan.z.new_empty(5, len(rows.hidden))
    for at in chunks(len(rows.hidden), len(plan.z)):
        z, tau = _logits(rows, plan, at), rows_at(rows.tau, at)
        p = kept[at] if kept is not None and at.stop <= len(kept) else None
        stats[1:, at] = ROW_PASS[backend].softmax(z, tau, plan.banned, p=p)
        stats[0, at], _ = logprobs(z, rows.targets[at], tau, stats[1:, at])
    return stats, kept


def _backward_cpu(
    rows: HeadRows,
    stats: Tensor,
    kept: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    needs: tuple[bool, bool],
    *,
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    plan = _plan(rows)
    dhidden = plan.z.new_empty(rows.hidden.shape) if needs[0] else None
    dweight = plan.z.new_zeros(rows.weight.shape) if needs[1] else None
    for at in chunks(len(rows.hidden), len(plan.z)):
        targets, tau = rows.targets[at], rows_at(rows.tau, at)
        if kept is not None and at.stop <= len(kept):
            factor = g[at, None] if tau is None else (g[at] / tau.to(g.dtype))[:, None]
            dz = kept[at].mul_(-factor).scatter_add_(-1, targets[:, None], factor)
        else:
            dz = _logits(rows, plan, at)
            ROW_PASS[backend].gradient(dz, targets, tau, plan.banned, stats[1:, at], g[at], rows_at(h, at), dz)
        if dhidden is not None:
            torch.mm(dz, plan.weight, out=dhidden[at])
        if dweight is not None:
            dweight[: rows.vocab_size].addmm_(dz.T, rows.hidden[at].to(dz.dtype))
    return (
        None if dhidden is None else dhidden.to(rows.hidden.dtype),
        None if dweight is None else dweight.to(rows.weight.dtype),
    )


# --- the differentiable function, and the op ------------------------------------------------------------------------


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
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        keep = keep and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        rows = HeadRows(hidden, weight, targets, tau, banned, vocab_size, keep, workspace_bytes)
        stats, ctx.kept = forward_tiles(rows) if backend == "triton" else _forward_cpu(rows, backend)
        ctx.save_for_backward(hidden, weight, targets, tau, banned, stats)
        ctx.options, ctx.backend = (vocab_size, keep, workspace_bytes), backend
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[4].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, tau, banned, stats = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 9
        g = torch.zeros_like(stats[0]) if g is None else g.contiguous()  # the gradient of a sum has stride 0
        h = None if h is None else h.contiguous()
        kept, ctx.kept = ctx.kept, None  # becomes dz; a second backward recomputes
        kept = kept if h is None else None
        run = backward_tiles if ctx.backend == "triton" else partial(_backward_cpu, backend=ctx.backend)
        rows = HeadRows(hidden, weight, targets, tau, banned, *ctx.options)
        return *run(rows, stats, kept, g, h, ctx.needs_input_grad[:2]), *((None,) * 7)


def _linear_logprob(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
    backward: Backward,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    check_tensor("hidden", hidden, (None, None), FLOATS if backend == "triton" else FLOATS_AND_DOUBLE)
    check_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden.device)
    if backward not in get_args(Backward):
        raise ValueError(f"backward must be one of {', '.join(get_args(Backward))}, got {backward!r}")
    if backend == "triton" and not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    targets, tau, banned, vocab_size = check_row_arguments(
        len(hidden), len(weight), hidden.device, targets, temperature, mask, vocab_size, banned_ids
    )
    num_rows, counted = len(hidden), None
    if mask is not None:
        counted = mask.nonzero().flatten()
        hidden, targets = hidden[counted], targets[counted]
        tau = None if tau is None else tau[counted]
    tau = None if tau is None else tau.contiguous()
    logprob, entropy = _LinearLogprob.apply(
        hidden.contiguous(),
        weight,
        targets.contiguous(),
        tau,
        banned,
        vocab_size,
        backward == "exp_tiles",
        workspace_bytes,
        backend,
    )
    if counted is not None:
        logprob, entropy = (x.new_zeros(num_rows).index_copy(0, counted, x) for x in (logprob, entropy))
    return logprob, entropy


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in torch, a chunk of rows at a time: the definition."""
    return _linear_logprob(
        "ref", hidden, weight, targets, temperature, mask, vocab_size, banned_ids, backward, workspace_bytes
    )


@on_its_device
def linear_logprob_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in Triton; float32, bfloat16 or float16."""
    return _linear_logprob(
        "triton", hidden, weight, targets, temperature, mask, vocab_size, banned_ids, backward, workspace_bytes
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
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row under softmax(hidden weight^T), differentiable in both.

    Args:
        hidden: [N, H] float32, bfloat16 or float16 (float64 on a CPU); row t predicts targets[t].
        weight: [V, H] of the same dtype, contiguous on a GPU. One that needs no gradient costs no matmul for it.
        targets: [N] int64 in [0, vocab_size), not banned; anything in masked rows.
        temperature: [N] float, >= 0; 0 counts as 1. None: all 1.
        mask: [N] bool; a row of False is never read, returns 0.0 and has gradient exactly 0. None: all True. On a GPU a
            mask makes the host wait once, for how many rows count; rows picked by the caller spare that.
        vocab_size, banned_ids: as in `sample`.
        backward: "recompute" or "exp_tiles"; see the module's docstring.
        workspace_bytes: what tiles and logits in flight may take, forward and backward; bytes.

    Returns:
        (logprob [N] at the temperature, entropy [N] at temperature 1), nats, float32 (float64 for float64 operands).

    Raises:
        ValueError: a wrong shape, dtype, device or option, or a workspace too small for one tile of rows; on a CPU, or
            under THYME_VALIDATE=1, also a wrong value.
    """
    return _linear_logprob(
        fastest(hidden), hidden, weight, targets, temperature, mask, vocab_size, banned_ids, backward, workspace_bytes
    )


def _linear_grpo_loss(
    row_pass: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None,
    banned_ids: BannedIds,
    backward: Backward,
    workspace_bytes: int,
    **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:
    check_tensor("hidden", hidden, (None, None))
    check_tensor("weights", weights, (len(hidden),), FLOATS_AND_DOUBLE, hidden.device)
    if tokens["config"] is not None and tokens["config"].entropy_coef and backward == "exp_tiles":
        backward = "recompute"  # its gradient would have the tiles thrown away
    rows = partial(
        row_pass,
        hidden,
        weight,
        targets,
        temperature=tokens["temperature"],
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        backward=backward,
        workspace_bytes=workspace_bytes,
    )
    return weighted_policy_loss(lambda mask: rows(mask=mask), weights, advantages, **tokens)


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
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`linear_grpo_loss` in torch, a chunk of rows at a time: the definition."""
    return _linear_grpo_loss(
        linear_logprob_ref,
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
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`linear_grpo_loss` with the head and the row pass in Triton; float32, bfloat16 or float16."""
    return _linear_grpo_loss(
        linear_logprob_triton,
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
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    config: GrpoLossConfig | None = None,
    backward: Backward = "recompute",
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> tuple[Tensor, GrpoMetrics]:
    """`grpo_loss` of the logits hidden weight^T, which are never stored in full; differentiable in both.

    Args:
        hidden, weight, targets, backward, workspace_bytes: as in `linear_logprob`; weights != 0 is its mask.
        advantages, weights and the rest: as in `grpo_loss`.

    Returns:
        (loss, a scalar in float32, or float64 for float64 operands; GrpoMetrics).

    Raises:
        ValueError: as in `linear_logprob` and `grpo_loss`.
    """
    return _linear_grpo_loss(
        linear_logprob,
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
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        config=config,
        backward=backward,
        workspace_bytes=workspace_bytes,
    )
