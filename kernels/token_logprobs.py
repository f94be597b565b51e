"""Log-probs and entropies of tokens from their logits, differentiable, each token at its own temperature.

With x = z - max(z) over the ids that count and tau the token's temperature,

    logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
    dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)

where g = dL / dlogprob and h = dL / dentropy.

Shapes: logits [N, V], packed tokens; everything else [N]. Numerics: float32 inside (float64 for float64 logits).
Traffic, n rows that count, 16-bit logits: forward reads 2 n V bytes, backward reads 2 n V and writes 2 N V. A masked
row is never read, and a row whose g and h are 0 (clipped, excluded) is not read again by the backward.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_rows_contiguous, check_tensor, on_its_device
from thyme.kernels.library import registered
from thyme.kernels.logit_rows import ROW_PASS, Backend, BannedIds, check_row_arguments, fastest, ids_of, logprobs
from thyme.kernels.row_stats import (
    ANYWHERE,
    LOG2E,
    SIZES,
    Bans,
    Tile,
    find_bans,
    is_wide,
    load_logits,
    row_stats,
    row_tile,
    row_totals,
)


class TokenRows(NamedTuple):
    """What counts of the arguments, checked."""

    logits: Tensor  # [N, V]
    targets: Tensor  # [N] int64; 0 in masked rows
    tau: Tensor | None  # [N] > 0; None: all 1
    mask: Tensor | None  # [N] bool; None: all rows count
    vocab_size: int


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _backward_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    banned_ptr,
    ban_blocks_ptr,
    stats_ptr,
    g_ptr,
    h_ptr,
    dlogits_ptr,
    stride,
    dstride,
    num_rows,
    vocab_size,
    num_columns,
    HAS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row and block: dz = g / tau (1[target] - p_tau) - h p_1 (log p_1 + entropy); 0 past vocab_size."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    start = block * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    out_ptr = dlogits_ptr + row.to(tl.int64) * dstride
    g = tl.load(g_ptr + row)
    h = 0.0
    if HAS_H:
        h = tl.load(h_ptr + row)
    dz = tl.zeros([1, BLOCK], tl.float32)
    if (g != 0.0) | (h != 0.0):  # a row that is masked, clipped or excluded is written, never read
        inverse_tau = 1.0 / tl.load(temperature_ptr + row)
        z = load_logits(
            logits_ptr,
            banned_ptr,
            ban_blocks_ptr,
            row,
            tl.full([1], 1, tl.int1),
            stride,
            block,
            vocab_size,
            BLOCK,
            True,
        )
        x = z - tl.load(stats_ptr + num_rows + row)
        shift = tl.load(stats_ptr + 2 * num_rows + row) * LOG2E
        scale = g * inverse_tau
        dz = tl.exp2(x * (inverse_tau * LOG2E) - shift) * -scale
        target = tl.load(targets_ptr + row) - start
        if (target >= 0) & (target < BLOCK):
            dz += tl.where(column - start == target.to(tl.int32), scale, 0.0)
        if HAS_H:
            log_p = tl.maximum(x - tl.load(stats_ptr + 3 * num_rows + row), -1e30)
            entropy = tl.load(stats_ptr + 4 * num_rows + row)
            dz -= tl.exp2(log_p * LOG2E) * (h * (log_p + entropy))
    dz = dz.to(out_ptr.dtype.element_ty)
    if is_wide(out_ptr, start, BLOCK, num_columns):
        tl.store(tl.multiple_of(out_ptr + column, (16, 16)), dz)
    else:
        tl.store(out_ptr + column, dz, mask=column < num_columns)


def _launch_config(vocab_size: int) -> dict[str, int]:
    """Blocks as `row_stats` has them, for which bans are listed, but of one row."""
    return {"BLOCK": row_tile(vocab_size).block, "num_warps": 2}


def _statistics(rows: TokenRows, tile: Tile, bans: Bans) -> Tensor:
    """[5, N] float32: log-prob of the target, largest logit, log sum e^(x / tau), log sum e^x, entropy."""
    tau = rows.logits.new_ones(len(rows.logits), dtype=torch.float32) if rows.tau is None else rows.tau.float()
    if rows.mask is not None:
        tau = torch.where(rows.mask, tau, -1.0)
    stats = row_stats(rows.logits, tau, bans, rows.vocab_size, tile)
    return row_totals(rows.logits, rows.targets, tau, stats, rows.vocab_size, tile)


def _gradient(rows: TokenRows, bans: Bans, stats: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    num_rows, num_columns = rows.logits.shape
    dlogits = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    if num_rows > 0:
        config = _launch_config(rows.vocab_size)
        tau = rows.logits.new_ones(num_rows, dtype=torch.float32) if rows.tau is None else rows.tau.float()
        _backward_kernel[(num_rows, triton.cdiv(num_columns, config["BLOCK"]))](
            rows.logits,
            rows.targets,
            tau,
            *bans,
            stats,
            g.contiguous(),
            None if h is None else h.contiguous(),
            dlogits,
            rows.logits.stride(0),
            dlogits.stride(0),
            num_rows,
            rows.vocab_size,
            num_columns,
            HAS_H=h is not None,
            **config,
        )
    return dlogits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tau: Tensor | None,
        mask: Tensor | None,
        banned: Tensor | None,
        vocab_size: int,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.vocab_size, ctx.backend = vocab_size, backend
        ctx.set_materialize_grads(False)
        ban_blocks = None
        if backend == "triton":
            tile = row_tile(vocab_size)
            bans = find_bans(banned, tile, vocab_size, logits.device)
            stats = _statistics(TokenRows(logits, targets, tau, mask, vocab_size), tile, bans)
            banned, ban_blocks = bans
            logprob, entropy = stats[0].clone(), stats[4].clone()
        else:
            banned = ids_of(banned)
            z = logits[:, :vocab_size]
            stats = ROW_PASS[backend].softmax(z, tau, banned, mask=mask)
            logprob, entropy = logprobs(z, targets, tau, stats)[0], stats[3].clone()
            logprob = logprob if mask is None else logprob.where(mask, 0.0)
        ctx.save_for_backward(logits, targets, tau, mask, banned, ban_blocks, stats)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, tau, mask, banned, ban_blocks, stats = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 7
        g = torch.zeros_like(stats[0]) if g is None else g
        if mask is not None:
            g, h = g * mask, None if h is None else h * mask
        if ctx.backend == "triton":
            rows = TokenRows(logits, targets, tau, mask, ctx.vocab_size)
            dlogits = _gradient(rows, Bans(banned, ban_blocks), stats, g, h)
        else:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
            ROW_PASS[ctx.backend].gradient(logits[:, : ctx.vocab_size], targets, tau, banned, stats, g, h, dlogits)
        return dlogits, None, None, None, None, None, None


def _token_logprobs(
    backend: Backend,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
) -> tuple[Tensor, Tensor]:
    check_tensor("logits", logits, (None, None), FLOATS if backend == "triton" else FLOATS_AND_DOUBLE)
    targets, tau, banned, vocab_size = check_row_arguments(
        logits.shape[0], logits.shape[1], logits.device, targets, temperature, mask, vocab_size, banned_ids
    )
    if backend == "triton":
        check_rows_contiguous("logits", logits)
        targets, tau = targets.contiguous(), None if tau is None else tau.contiguous()
    return _TokenLogprobs.apply(logits, targets, tau, mask, banned, vocab_size, backend)


def token_logprobs_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` in torch: the definition, and the CPU path of any dtype but float32."""
    return _token_logprobs("ref", logits, targets, temperature, mask, vocab_size, banned_ids)


@on_its_device
def token_logprobs_triton(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` in Triton; logits of float32, bfloat16 or float16."""
    return _token_logprobs("triton", logits, targets, temperature, mask, vocab_size, banned_ids)


@registered
@on_its_device
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> tuple[Tensor, Tensor]:
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
    return _token_logprobs(fastest(logits), logits, targets, temperature, mask, vocab_size, banned_ids)
