"""Log-probs of tokens under the distribution that truncation leaves, differentiable: what top_k, top_p and min_p drew.

With K the ids that the sampler keeps of a row (sample.py: the same function of the same probabilities, the same ties)
and the target itself, which a policy that has moved on may not keep,

    logprob = x_target / tau - log sum_K exp(x / tau) = log p_tau(target) - log p_tau(K)
    dL / dz_i = g / tau * (1[i = target] - p_tau(i) / p_tau(K)) for i in K, else 0;  the entropy's part as without

K itself has no gradient: it is a step function of the logits. Without the renormalization a rollout's tokens are taken
to be rarer than they were, and the gradient pushes mass to ids that could not be drawn. A row of temperature 0 is not
truncated, as in the sampler, and counts as temperature 1.

What is kept of a row are its kept ids and their probabilities, so the backward reads no logits of truncated rows (the
entropy bonus aside): 12 bytes a kept id, few beside a row's V where there is something to truncate.
On a CPU the softmax is that of the sampler, so both have the same bits; on a GPU all of it is torch, and an id within
rounding of top_p's edge may fall on the other side than it did in the sampler's own kernels.

Shapes and numerics as in token_logprobs.py; limits as in sample.py, one for all rows or [N].
"""

from typing import Any

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.logit_rows import ROW_PASS, Backend, BannedIds, check_row_arguments, fastest, ids_of, logprobs
from thyme.kernels.sample import Limits, _kept, _limits

_ROWS_AT_ONCE = 1 << 20  # logits


class _TruncatedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tau: Tensor | None,
        mask: Tensor | None,
        banned: Tensor | None,
        vocab_size: int,
        limits: Limits,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        z = logits[:, :vocab_size]
        stats = z.new_zeros(4, len(z), dtype=torch.promote_types(z.dtype, torch.float32))
        logprob = torch.zeros_like(stats[0])
        counted = torch.arange(len(z), device=z.device) if mask is None else mask.nonzero().flatten()
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in counted.split(max(1, _ROWS_AT_ONCE // vocab_size)):
            of = Limits(*(limit[rows] for limit in limits))
            some_tau = None if tau is None else tau[rows]
            logprob[rows], stats[:, rows], found = _truncate(z[rows], targets[rows], some_tau, banned, of, backend)
            row, ids, p = found
            kept.append((rows[row].int(), ids.int(), p))
        row, ids, p = (torch.cat(parts) for parts in zip(*kept, strict=True)) if kept else (targets[:0],) * 3
        ctx.save_for_backward(logits, targets, tau, mask, banned, stats, row, ids, p)
        ctx.vocab_size, ctx.backend = vocab_size, backend
        ctx.set_materialize_grads(False)
        return logprob, stats[3].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, tau, mask, banned, stats, row, ids, p = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 8
        g = torch.zeros_like(stats[0]) if g is None else g
        if mask is not None:
            g, h = g * mask, None if h is None else h * mask
        row, ids = row.long(), ids.long()
        whole = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        whole[row] = False
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        z = logits[:, : ctx.vocab_size]
        ROW_PASS[ctx.backend].gradient(z, targets, tau, banned, stats, g * whole, h, dlogits)
        factor = g.to(p.dtype) if tau is None else g.to(p.dtype) / tau.to(p.dtype)
        part = factor[row] * ((ids == targets[row]).to(p.dtype) - p)
        dlogits[row, ids] += part.to(dlogits.dtype)  # no id of a row is there twice
        return dlogits, *(None,) * 7


def _truncate(
    z: Tensor, targets: Tensor, tau: Tensor | None, banned: Tensor | None, limits: Limits, backend: Backend
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(log-probs, the softmax's stats, and of truncated rows: row, id and renormalized probability of each kept id)."""
    p = torch.empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    stats = ROW_PASS[backend].softmax(z, tau, banned, p=p)
    logits = z if banned is None else z.index_fill(-1, banned, -torch.inf)
    kept = _kept(logits, p, *limits)
    truncated = ~(kept | (logits == -torch.inf)).all(-1)
    total = p.cumsum(-1, dtype=torch.float64)[:, -1]  # added one by one, as in the sampler
    mass = (p.masked_fill(~kept, 0.0).cumsum(-1, dtype=torch.float64)[:, -1] / total).to(p.dtype)
    of_target = targets[:, None]
    left_out = ~kept.gather(-1, of_target).squeeze(-1)
    mass = torch.where(left_out, mass + p.gather(-1, of_target).squeeze(-1), mass)
    mass = torch.where(truncated, mass, 1.0)
    kept.scatter_(-1, of_target, True)
    row, ids = (kept & truncated[:, None] & (p > 0)).scatter_(-1, of_target, truncated[:, None]).nonzero(as_tuple=True)
    logprob = logprobs(z, targets, tau, stats)[0] - mass.log()
    return logprob, stats, (row, ids, p[row, ids] / mass[row])


def _truncated_logprobs(
    backend: Backend,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
    cuts: tuple[Any, Any, Any],
) -> tuple[Tensor, Tensor]:
    check_tensor("logits", logits, (None, None), FLOATS_AND_DOUBLE)
    targets, tau, banned, vocab_size = check_row_arguments(
        logits.shape[0], logits.shape[1], logits.device, targets, temperature, mask, vocab_size, banned_ids
    )
    limits = _limits(*cuts, logits)
    if limits is None:
        raise ValueError("top_k, top_p and min_p are all None: nothing is truncated, use token_logprobs")
    if temperature is not None:
        off = Limits(*(torch.full_like(limit, value) for limit, value in zip(limits, (0, 1, 0), strict=True)))
        limits = Limits(*(torch.where(temperature == 0, no, limit) for no, limit in zip(off, limits, strict=True)))
    return _TruncatedLogprobs.apply(logits, targets, tau, mask, ids_of(banned), vocab_size, limits, backend)


def truncated_logprobs_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`truncated_logprobs` in torch: the definition."""
    cuts = (top_k, top_p, min_p)
    return _truncated_logprobs("ref", logits, targets, temperature, mask, vocab_size, banned_ids, cuts)


@on_its_device
def truncated_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` over the ids that the sampler keeps: logprob - log(kept_mass) of `sample`, with its gradient.

    Args:
        logits, targets, temperature, mask, vocab_size, banned_ids: as in `token_logprobs`.
        top_k, top_p, min_p: as in `sample`, one for all rows or [N]; not all None.

    Returns:
        (logprob [N] at the temperature over the kept ids, entropy [N] at temperature 1 over all ids), nats.

    Raises:
        ValueError: as `token_logprobs`; a limit out of range, or no limit at all.
    """
    backend: Backend = "native" if fastest(logits) == "native" else "ref"
    cuts = (top_k, top_p, min_p)
    return _truncated_logprobs(backend, logits, targets, temperature, mask, vocab_size, banned_ids, cuts)
