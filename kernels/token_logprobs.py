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


class TokenRows(NamedTuple):
    """What counts of the arguments, checked."""

    logits: Tensor  # [N, V]
    targets: Tensor  # [N] int64; 0 in masked rows
    tau: Tensor | None  # [N] > 0; None: all 1
    mask: Tensor | None  # [N] bool; None: all rows count
    banned: Tensor | None  # [vocab_size] bool
    vocab_size: int


@triton.jit
def _load_row(row_ptr, banned_ptr, start, vocab_size, HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one row in float32, -inf where an id does not count.

    Loads are wide, 16 bytes a thread, only where no mask tells their elements apart: so ids are banned after the load,
    and only the last block, which a vocabulary of any size may cut anywhere, is read under a mask.
    """
    column = start + tl.arange(0, BLOCK)
    if start + BLOCK <= vocab_size:
        z = tl.load(row_ptr + column).to(tl.float32)
        if HAS_BANNED:
            z = tl.where(tl.load(banned_ptr + column) == 0, z, -float("inf"))
    else:
        ok = column < vocab_size
        z = tl.load(row_ptr + column, mask=ok, other=-float("inf")).to(tl.float32)
        if HAS_BANNED:
            z = tl.where(tl.load(banned_ptr + column, mask=ok, other=1) == 0, z, -float("inf"))
    return z


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets_ptr", "tau_ptr", "mask_ptr"])
def _forward_kernel(
    logits_ptr,
    targets_ptr,
    tau_ptr,
    mask_ptr,
    banned_ptr,
    stats_ptr,
    stride,
    num_rows,
    vocab_size,
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row, one read. stats [5, N]: logprob, largest logit, log sum e^(x / tau), log sum e^x, entropy.

    Temperatures and mask are always there, so that sampler and losses, whatever they are given, launch one binary: only
    then are the bits of a row the same, for the order of a sum on a GPU is the compiler's choice.
    """
    row = tl.program_id(0).to(tl.int64)
    out = stats_ptr + row
    if tl.load(mask_ptr + row) == 0:
        for plane in tl.static_range(5):
            tl.store(out + plane * num_rows, 0.0)
        return
    row_ptr = logits_ptr + row * stride
    inverse_tau = 1.0 / tl.load(tau_ptr + row)

    # Online: total = sum e^x, x_total = sum x e^x with x = z - largest, rescaled when a block has a larger one. The
    # first largest is a finite lowest, so that no difference is -inf - -inf.
    largest = -3.0e38
    total = 0.0
    x_total = 0.0
    tempered_total = 0.0
    for start in range(0, vocab_size, BLOCK):
        z = _load_row(row_ptr, banned_ptr, start, vocab_size, HAS_BANNED, BLOCK)
        new_largest = tl.maximum(largest, tl.max(z, 0))
        gap = tl.maximum(largest - new_largest, -1e30)
        x = z - new_largest
        e = tl.exp(x)
        scale = tl.exp(gap)
        x_total = scale * (x_total + gap * total) + tl.sum(e * tl.maximum(x, -1e30), 0)
        total = scale * total + tl.sum(e, 0)
        if inverse_tau != 1.0:
            tempered_total = tl.exp(gap * inverse_tau) * tempered_total + tl.sum(tl.exp(x * inverse_tau), 0)
        largest = new_largest

    log_total_raw = tl.log(total)
    log_total = log_total_raw
    if inverse_tau != 1.0:
        log_total = tl.log(tempered_total)
    target = tl.load(targets_ptr + row)
    z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < vocab_size), other=-float("inf")).to(tl.float32)
    tl.store(out, (z_target - largest) * inverse_tau - log_total)
    tl.store(out + num_rows, largest)
    tl.store(out + 2 * num_rows, log_total)
    tl.store(out + 3 * num_rows, log_total_raw)
    tl.store(out + 4 * num_rows, log_total_raw - x_total / total)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets_ptr", "tau_ptr", "g_ptr", "h_ptr"])
def _backward_kernel(
    logits_ptr,
    targets_ptr,
    tau_ptr,
    banned_ptr,
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
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row and block: dz = g / tau (1[target] - p_tau) - h p_1 (log p_1 + entropy); 0 past vocab_size."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
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
    inverse_tau = 1.0 / tl.load(tau_ptr + row)
    x = _load_row(logits_ptr + row * stride, banned_ptr, start, vocab_size, HAS_BANNED, BLOCK) - largest
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


def forward_triton(rows: TokenRows) -> Tensor:
    """What `_forward_kernel` says, [5, N] float32."""
    num_rows, device = len(rows.logits), rows.logits.device
    stats = torch.empty(5, num_rows, dtype=torch.float32, device=device)
    mask = torch.ones(num_rows, dtype=torch.bool, device=device) if rows.mask is None else rows.mask
    if num_rows > 0:
        _forward_kernel[(num_rows,)](
            rows.logits,
            rows.targets,
            _temperatures(rows),
            _bytes(mask),
            _bytes(rows.banned),
            stats,
            rows.logits.stride(0),
            num_rows,
            rows.vocab_size,
            HAS_BANNED=rows.banned is not None,
            **_launch_config(rows.vocab_size),
        )
    return stats


def _backward_triton(rows: TokenRows, stats: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    num_rows, num_columns = rows.logits.shape
    dlogits = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    if num_rows > 0:
        config = _launch_config(num_columns)
        _backward_kernel[(num_rows, triton.cdiv(num_columns, config["BLOCK"]))](
            rows.logits,
            rows.targets,
            _temperatures(rows),
            _bytes(rows.banned),
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
            HAS_BANNED=rows.banned is not None,
            **config,
        )
    return dlogits


def _temperatures(rows: TokenRows) -> Tensor:
    return rows.logits.new_ones(len(rows.logits), dtype=torch.float32) if rows.tau is None else rows.tau.float()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


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
        if backend == "triton":
            stats = forward_triton(TokenRows(logits, targets, tau, mask, banned, vocab_size))
            logprob, entropy = stats[0].clone(), stats[4].clone()
        else:
            banned = ids_of(banned)
            z = logits[:, :vocab_size]
            stats = ROW_PASS[backend].softmax(z, tau, banned, mask=mask)
            logprob, entropy = logprobs(z, targets, tau, stats)[0], stats[3].clone()
            logprob = logprob if mask is None else logprob.where(mask, 0.0)
        ctx.save_for_backward(logits, targets, tau, mask, banned, stats)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, tau, mask, banned, stats = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 7
        g = torch.zeros_like(stats[0]) if g is None else g
        if mask is not None:
            g, h = g * mask, None if h is None else h * mask
        if ctx.backend == "triton":
            dlogits = _backward_triton(TokenRows(logits, targets, tau, mask, banned, ctx.vocab_size), stats, g, h)
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
