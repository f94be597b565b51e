"""The GRPO loss over logits, with its own temperature, advantage and weight for every token, in three stages.

  (i)   row pass: with x = z - max(z) over the ids that count and tau the token's temperature,
            logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
  (ii)  O(N) torch on those vectors, in policy_loss.py: every variant of the loss, and the metrics. Autograd gives
            g = dL / dlogprob          h = dL / dentropy
  (iii) back through the row pass, from the logits and what (i) kept per row:
            dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)

Shapes: logits [N, V], packed tokens; everything else [N]. Numerics: float32 inside (float64 for float64 logits).
Traffic, n rows of weight != 0, 16-bit logits: forward reads 2 n V bytes, backward reads 2 n V and writes 2 N V. A row
of weight 0 is never read, and a row whose g and h are 0 (clipped, excluded) is not read again by the backward. On a
CPU the forward keeps p_tau where the gradient will be, and the backward scales it in place.
"""

# mypy: disable-error-code="no-untyped-def"
# In a kernel the outer `if` is decided when it is compiled, the inner one when it runs:
# ruff: noqa: SIM102

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_rows_contiguous, check_tensor
from thyme.kernels.policy_loss import GrpoLossConfig as GrpoLossConfig
from thyme.kernels.policy_loss import GrpoMetrics as GrpoMetrics
from thyme.kernels.policy_loss import policy_loss as policy_loss
from thyme.kernels.policy_loss import weighted_policy_loss
from thyme.kernels.rows import (
    BannedIds,
    check_row_arguments,
    entropy_gradient_,
    logprob_gradient_,
    shift_rows,
    softmax_rows,
)

_CHUNK = 1 << 18  # logits in flight at once on the CPU: 1 MiB of float32, which a core's cache holds


class _Rows(NamedTuple):
    """What the row pass reads. It returns stats [5, N] in float32 (float64 for float64 logits), 0 in masked rows:
    logprob, largest logit, log sum e^(x / tau), log sum e^x, entropy; in torch the third is unused."""

    logits: Tensor
    targets: Tensor  # int64; 0 in masked rows
    tau: Tensor | None  # None: all 1
    mask: Tensor | None  # bool; None: all rows count
    banned: Tensor | None  # bool [vocab_size]
    vocab_size: int


# --- stage (i) and (iii) in torch: the definition, and the CPU path ------------------------------------------------


def _row_chunks(rows: _Rows) -> Iterator[tuple[Tensor | slice, int]]:
    """The rows that count and how many they are, a cache's worth of logits at a time."""
    step, num_rows = _chunk_rows(rows), len(rows.logits)
    if rows.mask is None or bool(rows.mask.all()):
        yield from ((slice(at, at + step), min(step, num_rows - at)) for at in range(0, num_rows, step))
    else:
        yield from ((at, len(at)) for at in rows.mask.nonzero().flatten().split(step) if len(at))


def _chunk_rows(rows: _Rows) -> int:
    return max(1, _CHUNK // rows.vocab_size)


def _scratch(rows: _Rows) -> Tensor:
    dtype = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    return rows.logits.new_empty(min(_chunk_rows(rows), len(rows.logits)), rows.vocab_size, dtype=dtype)


def _at(x: Tensor | None, at: Tensor | slice) -> Tensor | None:
    return None if x is None else x[at]


def _forward_ref(rows: _Rows, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(stats, p_tau [N, V] if it is to be kept): what the backward then turns into the gradient, where it is."""
    x_rows, p_rows = _scratch(rows), _scratch(rows)
    stats = x_rows.new_zeros(5, len(rows.logits))
    full = isinstance(next(_row_chunks(rows), (slice(0), 0))[0], slice) and rows.vocab_size == rows.logits.shape[1]
    kept = (torch.empty_like if full else torch.zeros_like)(rows.logits) if keep else None
    banned = None if rows.banned is None else rows.banned.nonzero().flatten()
    for at, num in _row_chunks(rows):
        x, p = x_rows[:num], p_rows[:num]
        if kept is not None and full:
            p = kept[at]
        largest = shift_rows(rows.logits[at, : rows.vocab_size], banned, x)
        logprob, entropy, log_total_raw = softmax_rows(x, rows.targets[at], _at(rows.tau, at), p)
        stats[:, at] = torch.stack((logprob, largest.to(x.dtype), log_total_raw, log_total_raw, entropy))
        if kept is not None and not full:
            kept[at, : rows.vocab_size] = p
    return stats, kept


def _backward_ref(rows: _Rows, stats: Tensor, kept: Tensor | None, g: Tensor, h: Tensor | None) -> Tensor:
    _, _, _, log_total_raw, entropy = stats
    dlogits = torch.zeros_like(rows.logits) if kept is None else kept
    banned = None if rows.banned is None else rows.banned.nonzero().flatten()
    x_rows = _scratch(rows)
    for at, num in _row_chunks(rows):
        x, tau = x_rows[:num], _at(rows.tau, at)
        if kept is None or h is not None:
            shift_rows(rows.logits[at, : rows.vocab_size], banned, x)
        if kept is None:
            p = (x if tau is None else x / tau[:, None].to(x.dtype)).softmax(-1)
        else:
            p = kept[at, : rows.vocab_size]
        dz = logprob_gradient_(p, rows.targets[at], tau, g[at])
        if h is not None:
            dz += entropy_gradient_(x, log_total_raw[at], entropy[at], h[at])
        if kept is None or not isinstance(at, slice):  # else dz is a view of dlogits
            dlogits[at, : rows.vocab_size] = dz.to(dlogits.dtype)
    return dlogits


# --- stage (i) and (iii) in Triton ----------------------------------------------------------------------------------


@triton.jit
def _load_row(row_ptr, banned_ptr, column, vocab_size, HAS_BANNED: tl.constexpr):
    """A block of one row in float32, -inf where an id does not count."""
    ok = column < vocab_size
    if HAS_BANNED:
        ok = ok & (tl.load(banned_ptr + column, mask=ok, other=1) == 0)
    return tl.load(row_ptr + column, mask=ok, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    logits_ptr, targets_ptr, tau_ptr, mask_ptr, banned_ptr, stats_ptr, stride, num_rows, vocab_size,
    HAS_TAU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, one read."""
    row = tl.program_id(0).to(tl.int64)
    out = stats_ptr + row
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            for plane in tl.static_range(5):
                tl.store(out + plane * num_rows, 0.0)
            return
    row_ptr = logits_ptr + row * stride
    inverse_tau = 1.0
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row).to(tl.float32)

    # Online: total = sum e^x, x_total = sum x e^x with x = z - largest, rescaled when a block has a larger one. The
    # first largest is a finite lowest, so that no difference is -inf - -inf.
    largest = -3.0e38
    total = 0.0
    x_total = 0.0
    tempered_total = 0.0
    for start in range(0, vocab_size, BLOCK):
        z = _load_row(row_ptr, banned_ptr, start + tl.arange(0, BLOCK), vocab_size, HAS_BANNED)
        new_largest = tl.maximum(largest, tl.max(z, 0))
        gap = tl.maximum(largest - new_largest, -1e30)
        x = z - new_largest
        e = tl.exp(x)
        scale = tl.exp(gap)
        x_total = scale * (x_total + gap * total) + tl.sum(e * tl.maximum(x, -1e30), 0)
        total = scale * total + tl.sum(e, 0)
        if HAS_TAU:
            if inverse_tau != 1.0:
                tempered_total = tl.exp(gap * inverse_tau) * tempered_total + tl.sum(tl.exp(x * inverse_tau), 0)
        largest = new_largest

    log_total_raw = tl.log(total)
    log_total = log_total_raw
    if HAS_TAU:
        if inverse_tau != 1.0:
            log_total = tl.log(tempered_total)
    target = tl.load(targets_ptr + row)
    z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < vocab_size), other=-float("inf")).to(tl.float32)
    tl.store(out, (z_target - largest) * inverse_tau - log_total)
    tl.store(out + num_rows, largest)
    tl.store(out + 2 * num_rows, log_total)
    tl.store(out + 3 * num_rows, log_total_raw)
    tl.store(out + 4 * num_rows, log_total_raw - x_total / total)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    logits_ptr, targets_ptr, tau_ptr, banned_ptr, stats_ptr, g_ptr, h_ptr, dlogits_ptr,
    stride, dstride, num_rows, vocab_size, num_columns,
    HAS_TAU: tl.constexpr, HAS_H: tl.constexpr, HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per row and block: dz = g / tau (1[target] - p_tau) - h p_1 (log p_1 + entropy); 0 past vocab_size."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_ptr = dlogits_ptr + row * dstride + column
    g = tl.load(g_ptr + row)
    h = 0.0
    if HAS_H:
        h = tl.load(h_ptr + row)
    if (g == 0.0) & (h == 0.0):  # masked, clipped or excluded: written, never read
        tl.store(out_ptr, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=column < num_columns)
        return
    largest = tl.load(stats_ptr + num_rows + row)
    log_total = tl.load(stats_ptr + 2 * num_rows + row)
    inverse_tau = 1.0
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row).to(tl.float32)
    x = _load_row(logits_ptr + row * stride, banned_ptr, column, vocab_size, HAS_BANNED) - largest
    dz = -tl.exp(x * inverse_tau - log_total)
    dz = g * inverse_tau * tl.where(column == tl.load(targets_ptr + row), dz + 1.0, dz)
    if HAS_H:
        log_p = x - tl.load(stats_ptr + 3 * num_rows + row)
        dz -= h * tl.exp(log_p) * (tl.maximum(log_p, -1e30) + tl.load(stats_ptr + 4 * num_rows + row))
    tl.store(out_ptr, dz.to(out_ptr.dtype.element_ty), mask=column < num_columns)


def _launch_config(num_columns: int) -> dict[str, int]:
    """Block of one row; nothing here or in the kernels depends on N or on the loss, so neither recompiles them."""
    block = min(8192, max(128, triton.next_power_of_2(num_columns)))
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def _forward_triton(rows: _Rows) -> Tensor:
    num_rows = len(rows.logits)
    stats = torch.empty(5, num_rows, dtype=torch.float32, device=rows.logits.device)
    if num_rows > 0:
        _forward_kernel[(num_rows,)](
            rows.logits, rows.targets, rows.tau, _bytes(rows.mask), _bytes(rows.banned), stats,
            rows.logits.stride(0), num_rows, rows.vocab_size,
            HAS_TAU=rows.tau is not None, HAS_MASK=rows.mask is not None, HAS_BANNED=rows.banned is not None,
            **_launch_config(rows.vocab_size),
        )  # fmt: skip
    return stats


def _backward_triton(rows: _Rows, stats: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    num_rows, num_columns = rows.logits.shape
    dlogits = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    if num_rows > 0:
        config = _launch_config(num_columns)
        _backward_kernel[(num_rows, triton.cdiv(num_columns, config["BLOCK"]))](
            rows.logits, rows.targets, rows.tau, _bytes(rows.banned), stats, g.contiguous(),
            None if h is None else h.contiguous(), dlogits,
            rows.logits.stride(0), dlogits.stride(0), num_rows, rows.vocab_size, num_columns,
            HAS_TAU=rows.tau is not None, HAS_H=h is not None, HAS_BANNED=rows.banned is not None, **config,
        )  # fmt: skip
    return dlogits


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


# --- the row pass as a differentiable function ---------------------------------------------------------------------


class _RowPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, tau: Tensor | None, mask: Tensor | None, banned: Tensor | None,
        vocab_size: int, backend: Literal["ref", "triton"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = _Rows(logits, targets, tau, mask, banned, vocab_size)
        ctx.kept = None
        if backend == "triton":
            stats = _forward_triton(rows)
        else:
            # Not in 16 bits, where p would take twice the memory of the logits.
            keep = ctx.needs_input_grad[0] and logits.dtype in (torch.float32, torch.float64)
            stats, ctx.kept = _forward_ref(rows, keep)
        ctx.save_for_backward(logits, targets, tau, mask, banned, stats)
        ctx.vocab_size, ctx.backend = vocab_size, backend
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[4].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, tau, mask, banned, stats = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 7
        g = torch.zeros_like(stats[0]) if g is None else g
        if mask is not None:
            g, h = g * mask, None if h is None else h * mask
        rows = _Rows(logits, targets, tau, mask, banned, ctx.vocab_size)
        if ctx.backend == "triton":
            dlogits = _backward_triton(rows, stats, g, h)
        else:
            kept, ctx.kept = ctx.kept, None  # becomes the gradient; a second backward computes it anew
            dlogits = _backward_ref(rows, stats, kept, g, h)
        return dlogits, None, None, None, None, None, None


def _token_logprobs(
    backend: Literal["ref", "triton"], logits: Tensor, targets: Tensor, temperature: Tensor | None,
    mask: Tensor | None, vocab_size: int | None, banned_ids: BannedIds,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_tensor("logits", logits, (None, None), FLOATS_AND_DOUBLE if backend == "ref" else FLOATS)
    targets, tau, banned, vocab_size = check_row_arguments(
        logits.shape[0], logits.shape[1], logits.device, targets, temperature, mask, vocab_size, banned_ids
    )
    if backend == "triton":
        check_rows_contiguous("logits", logits)
        targets, tau = targets.contiguous(), None if tau is None else tau.contiguous()
    return _RowPass.apply(logits, targets, tau, mask, banned, vocab_size, backend)


def token_logprobs_ref(
    logits: Tensor, targets: Tensor, *, temperature: Tensor | None = None, mask: Tensor | None = None,
    vocab_size: int | None = None, banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`token_logprobs` in torch, a few rows at a time: the definition, and the CPU path."""
    return _token_logprobs("ref", logits, targets, temperature, mask, vocab_size, banned_ids)


def token_logprobs_triton(
    logits: Tensor, targets: Tensor, *, temperature: Tensor | None = None, mask: Tensor | None = None,
    vocab_size: int | None = None, banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`token_logprobs` in Triton; logits of float32, bfloat16 or float16."""
    return _token_logprobs("triton", logits, targets, temperature, mask, vocab_size, banned_ids)


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: Tensor | None = None, mask: Tensor | None = None,
    vocab_size: int | None = None, banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of each target and entropy of each row, differentiable; also the SFT loss (the mean of -logprob).

    Args:
        logits: [N, V] float32, bfloat16 or float16 (float64 on a CPU).
        targets: [N] int64 in [0, vocab_size), not banned; anything in masked rows.
        temperature: [N] float, >= 0; 0 counts as 1. None: all 1.
        mask: [N] bool; a row of False is never read, returns 0.0 and has gradient exactly 0. None: all True.
        vocab_size, banned_ids: as in `sample`.

    Returns:
        (logprob [N] at the temperature, entropy [N] at temperature 1), nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: a wrong shape, dtype or device; on a CPU, or under THYME_VALIDATE=1, also a wrong value.
    """
    run = token_logprobs_triton if logits.is_cuda else token_logprobs_ref
    return run(
        logits, targets, temperature=temperature, mask=mask, vocab_size=vocab_size, banned_ids=banned_ids
    )  # fmt: skip


# --- the loss ---------------------------------------------------------------------------------------------------


def _grpo_loss(
    row_pass: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, targets: Tensor, advantages: Tensor,
    weights: Tensor, *, vocab_size: int | None, banned_ids: BannedIds, **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:  # fmt: skip
    check_tensor("logits", logits, (None, None))
    check_tensor("weights", weights, (len(logits),), FLOATS_AND_DOUBLE, logits.device)
    rows = partial(
        row_pass, logits, targets, temperature=tokens["temperature"], vocab_size=vocab_size, banned_ids=banned_ids
    )
    return weighted_policy_loss(lambda mask: rows(mask=mask), weights, advantages, **tokens)


def grpo_loss_ref(
    logits: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, *, old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None, rollout_logprobs: Tensor | None = None, temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None, segments: Tensor | None = None, vocab_size: int | None = None,
    banned_ids: BannedIds = None, config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:  # fmt: skip
    """`grpo_loss` in torch: the definition, and the CPU path."""
    return _grpo_loss(
        token_logprobs_ref, logits, targets, advantages, weights, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, temperature=temperature,
        cu_seqlens=cu_seqlens, segments=segments, vocab_size=vocab_size, banned_ids=banned_ids, config=config,
    )  # fmt: skip


def grpo_loss_triton(
    logits: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, *, old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None, rollout_logprobs: Tensor | None = None, temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None, segments: Tensor | None = None, vocab_size: int | None = None,
    banned_ids: BannedIds = None, config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:  # fmt: skip
    """`grpo_loss` with the row pass and its backward in Triton; logits of float32, bfloat16 or float16."""
    return _grpo_loss(
        token_logprobs_triton, logits, targets, advantages, weights, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, temperature=temperature,
        cu_seqlens=cu_seqlens, segments=segments, vocab_size=vocab_size, banned_ids=banned_ids, config=config,
    )  # fmt: skip


def grpo_loss(
    logits: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, *, old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None, rollout_logprobs: Tensor | None = None, temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None, segments: Tensor | None = None, vocab_size: int | None = None,
    banned_ids: BannedIds = None, config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:  # fmt: skip
    """The GRPO loss of packed tokens, differentiable in the logits; Triton on a GPU, torch on a CPU.

    Args:
        logits: [N, V] float32, bfloat16 or float16 (float64 on a CPU); row t predicts targets[t].
        targets: [N] int64.
        advantages: [N] float, one per token.
        weights: [N] float; the loss is sum_t weights[t] l_t. A row of weight 0 is never read and its gradient is
            exactly 0, so prompts, images and sandbox output are free.
        old_logprobs: [N], of the policy that the ratio is taken against; None: on-policy, the ratio is 1.
        ref_logprobs: [N], of the KL reference; None: no KL.
        rollout_logprobs: [N], as the engine recorded them; for rollout_ratio_cap and the mismatch metrics.
        temperature: [N] float, >= 0, that each token was sampled at; 0 is greedy. None: all 1. The three log-probs
            above are at this temperature too, and at 1 for greedy tokens.
        cu_seqlens: [S + 1] int32, the first token of each sequence and N; for the sequence losses.
        segments: [N] uint8, 0 text and 1 code, splits the metrics.
        vocab_size, banned_ids: as in `sample`; a banned target in a row of weight != 0 is an error.
        config: which loss; None: GrpoLossConfig().

    Returns:
        (loss, a scalar in float32, or float64 for float64 logits; GrpoMetrics).

    Raises:
        ValueError: a wrong shape, dtype or device, or a variant without its input; on a CPU, or under
            THYME_VALIDATE=1, also a wrong value.
    """
    run = grpo_loss_triton if logits.is_cuda else grpo_loss_ref
    return run(
        logits, targets, advantages, weights, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, temperature=temperature, cu_seqlens=cu_seqlens, segments=segments,
        vocab_size=vocab_size, banned_ids=banned_ids, config=config,
    )  # fmt: skip
