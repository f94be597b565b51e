"""Log-probs of tokens under the distribution that truncation leaves, differentiable: what top_k, top_p and min_p drew.

With K the ids that the sampler keeps of a row (sample.py: the same function of the same probabilities, the same ties)
and the target itself, which a policy that has moved on may not keep,

    logprob = x_target / tau - log sum_K exp(x / tau) = log p_tau(target) - log p_tau(K)
    dL / dz_i = g / tau * (1[i = target] - p_tau(i) / p_tau(K)) for i in K, else 0;  the entropy's part as without

K itself has no gradient: it is a step function of the logits. Without the renormalization a rollout's tokens are taken
to be rarer than they were, and the gradient pushes mass to ids that could not be drawn. A row of temperature 0 is not
truncated, as in the sampler, and counts as temperature 1.

What is saved of a row are its kept ids and their probabilities, so the backward reads no logits of truncated rows (the
entropy bonus aside): 12 bytes a kept id, few beside a row's V where there is something to truncate.
On a CPU the softmax is that of the sampler, so both have the same bits. On a GPU the rows are read by the kernels of
token_logprobs.py, but the cut is found in torch, by sorting: an id within rounding of top_p's edge may fall on the
other side than in the sampler's own kernels, and it costs more than the loss itself.

Shapes and numerics as in token_logprobs.py; limits as in sample.py, one for all rows or [N].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.logit_rows import ROW_PASS, Backend, BannedIds, check_row_arguments, fastest, ids_of
from thyme.kernels.sample import Limits, _kept, _limits
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_ref, token_logprobs_triton

_LOGITS_AT_ONCE = {False: 1 << 20, True: 1 << 24}
"""On a CPU and on a GPU."""


class _Rows(NamedTuple):
    """What counts of the arguments, checked."""

    targets: Tensor
    tau: Tensor | None
    mask: Tensor | None
    banned: Tensor | None
    """[vocab_size] bool."""
    vocab_size: int
    limits: Limits


class _TruncatedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, backend: Backend) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        # The rows as if nothing were truncated: right for those in which nothing is, and the entropies of all.
        with torch.enable_grad():
            whole = _ROW_PASSES[backend](
                leaf,
                rows.targets,
                temperature=rows.tau,
                mask=rows.mask,
                vocab_size=rows.vocab_size,
                banned_ids=rows.banned,
            )
        logprob, entropy = (x.detach().clone() for x in whole)
        z, banned = leaf.detach()[:, : rows.vocab_size], ids_of(rows.banned)
        counted = torch.arange(len(z), device=z.device) if rows.mask is None else rows.mask.nonzero().flatten()
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        step = max(1, _LOGITS_AT_ONCE[z.is_cuda] // rows.vocab_size)
        for some in counted.split(step) if len(counted) else ():
            tau = None if rows.tau is None else rows.tau[some]
            limits = Limits(*(limit[some] for limit in rows.limits))
            mass, (row, ids, p) = _truncate(z[some], rows.targets[some], tau, banned, limits, backend)
            logprob[some] -= mass.log()
            kept.append((some[row].int(), ids.int(), p))
        row, ids, p = (torch.cat(parts) for parts in zip(*kept, strict=True)) if kept else (counted,) * 3
        ctx.leaf, ctx.whole, ctx.rows = leaf, whole, rows
        ctx.save_for_backward(row, ids, p)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, None, None]:
        row, ids, p = ctx.saved_tensors
        if g is None and h is None:
            return None, None, None
        rows: _Rows = ctx.rows
        g = torch.zeros_like(ctx.whole[0]) if g is None else g
        h = torch.zeros_like(g) if h is None else h
        row, ids = row.long(), ids.long()
        untouched = torch.ones_like(g).index_fill_(0, row, 0.0)
        (dlogits,) = torch.autograd.grad(ctx.whole, ctx.leaf, (g * untouched, h), retain_graph=True)
        factor = g if rows.tau is None else g / rows.tau.to(g.dtype)
        part = factor[row] * ((ids == rows.targets[row]).to(p.dtype) - p)
        dlogits[row, ids] += part.to(dlogits.dtype)  # no id of a row is there twice
        return dlogits, None, None


_ROW_PASSES = {"ref": token_logprobs_ref, "native": token_logprobs, "triton": token_logprobs_triton}


def _truncate(
    z: Tensor, targets: Tensor, tau: Tensor | None, banned: Tensor | None, limits: Limits, backend: Backend
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(the kept mass, 1 where nothing is cut; of rows where something is: row, id, and the id's share of that mass)."""
    p = torch.empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    logits = z if banned is None else z.index_fill(-1, banned, -torch.inf)
    if backend == "triton":  # all that follows asks for ratios alone, so the largest may be 1
        x = logits.to(p.dtype) - logits.amax(-1, keepdim=True)
        torch.exp(x if tau is None else x / tau[:, None], out=p)
    else:
        ROW_PASS[backend].softmax(z, tau, banned, p=p)
    kept = _kept(logits, p, *limits)
    truncated = ~(kept | (logits == -torch.inf)).all(-1)
    total = p.cumsum(-1, dtype=torch.float64)[:, -1]  # added one by one, as in the sampler
    mass = (p.masked_fill(~kept, 0.0).cumsum(-1, dtype=torch.float64)[:, -1] / total).to(p.dtype)
    of_target = targets[:, None]
    share = (p / total[:, None]).to(p.dtype) if backend == "triton" else p
    left_out = ~kept.gather(-1, of_target).squeeze(-1)
    mass = torch.where(left_out, mass + share.gather(-1, of_target).squeeze(-1), mass)
    mass = torch.where(truncated, mass, 1.0)
    some = (kept & truncated[:, None] & (p > 0)).scatter_(-1, of_target, truncated[:, None])
    row, ids = some.nonzero(as_tuple=True)
    return mass, (row, ids, share[row, ids] / mass[row])


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
    check_tensor("logits", logits, (None, None), FLOATS if backend == "triton" else FLOATS_AND_DOUBLE)
    targets, tau, banned, vocab_size = check_row_arguments(
        logits.shape[0], logits.shape[1], logits.device, targets, temperature, mask, vocab_size, banned_ids
    )
    limits = _limits(*cuts, logits)
    if limits is None:
        raise ValueError("top_k, top_p and min_p are all None: nothing is truncated, use token_logprobs")
    if temperature is not None:
        off = Limits(*(torch.full_like(limit, value) for limit, value in zip(limits, (0, 1, 0), strict=True)))
        limits = Limits(*(torch.where(temperature == 0, no, limit) for no, limit in zip(off, limits, strict=True)))
    return _TruncatedLogprobs.apply(logits, _Rows(targets, tau, mask, banned, vocab_size, limits), backend)


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
def truncated_logprobs_triton(
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
    """`truncated_logprobs` over the row pass in Triton, the cut in torch; float32, bfloat16 or float16."""
    cuts = (top_k, top_p, min_p)
    return _truncated_logprobs("triton", logits, targets, temperature, mask, vocab_size, banned_ids, cuts)


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
    cuts = (top_k, top_p, min_p)
    return _truncated_logprobs(fastest(logits), logits, targets, temperature, mask, vocab_size, banned_ids, cuts)
