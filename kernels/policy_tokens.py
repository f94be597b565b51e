"""The Triton side of `policy_loss`: loss, metrics and both gradients of N tokens in one pass.

The loss is a scalar, so its gradients are known but for the factor that the backward brings: the forward writes them
for a factor of 1, and the backward is one product. A program takes a block of tokens and leaves its sums; a second
kernel of one program adds these in a fixed order. The losses of sequences need a kernel before: a program a sequence
adds its tokens in their order, without atomics.

Shapes: all [N]; the sums of the programs [planes, programs]. Numerics: float32. Traffic: 4 bytes a token and input, 8
out; launches, forward and backward: 3, or 4 with sequences.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.policy_config import MAX_LOG_RATIO, GreedyTokens, GrpoLossConfig, KlKind, LossKind, TokenInputs

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_PLANES = 16
"""Sums that a program leaves for one group of tokens: 8 to 11 means, 5 others; the rest is not used."""
_BLOCK = 128
"""Tokens of a program of one warp: no barriers, and enough programs at the few thousand tokens of a micro-batch."""


_VECTORS = ["logprob_ptr", "entropy_ptr", "advantages_ptr", "weights_ptr", "old_ptr", "ref_ptr", "rollout_ptr"]
_VECTORS += ["temperature_ptr", "segments_ptr"]


@triton.jit
def _clamped_exp(x):
    """e^x of x clamped, and its derivative, 0 where the clamp holds."""
    e = tl.exp(tl.minimum(tl.maximum(x, -_MAX_LOG_RATIO), _MAX_LOG_RATIO))
    return e, tl.where(tl.abs(x) > _MAX_LOG_RATIO, 0.0, e)


@triton.jit
def _policy_term(
    ratio, slope, logprob, advantage, greedy, mismatch, low, high, cap, rollout_cap, CISPO, IS_PI, HAS_ROLLOUT_CAP
):
    """A token's policy term, its derivative by the log-ratio, and whether it was clipped below and above."""
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    at_low = (ratio < low) & (advantage < 0)
    at_high = (ratio > high) & (advantage > 0)
    if CISPO:
        policy = -clipped * advantage * logprob
        policy_slope = -clipped * advantage
    else:
        held = at_low | at_high
        policy = -tl.where(held, clipped, tl.minimum(ratio, cap)) * advantage
        policy_slope = -tl.where(held | (ratio > cap), 0.0, slope) * advantage
    factor = tl.full(ratio.shape, 1.0, tl.float32)
    if IS_PI:
        factor = tl.where(greedy, tl.exp(logprob), 1.0)
    if HAS_ROLLOUT_CAP:
        factor *= tl.minimum(tl.exp(tl.minimum(mismatch, _MAX_LOG_RATIO)), rollout_cap)
    return policy * factor, policy_slope * factor, at_low, at_high


@triton.jit
def _kl_term(d, KL: tl.constexpr):
    """The estimator of the KL from d = ref - logprob, and its derivative by logprob."""
    if KL == 0:
        kl, slope = -d, tl.full(d.shape, 1.0, tl.float32)
    elif KL == 1:
        kl, slope = 0.5 * d * d, -d
    else:
        e = tl.exp(tl.minimum(d, _MAX_LOG_RATIO))
        kl, slope = e - d - 1.0, 1.0 - tl.where(d > _MAX_LOG_RATIO, 0.0, e)
    return kl, slope


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=[*_VECTORS, "cu_seqlens_ptr"])
def _sequences_kernel(
    logprob_ptr,
    advantages_ptr,
    weights_ptr,
    old_ptr,
    rollout_ptr,
    temperature_ptr,
    cu_seqlens_ptr,
    shared_ptr,
    num_tokens,
    low,
    high,
    cap,
    rollout_cap,
    ONE_GRADIENT: tl.constexpr,
    GREEDY: tl.constexpr,
    HAS_ROLLOUT_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a sequence. shared [2, N]: the mean of its log-ratios, at each of its tokens; and with ONE_GRADIENT the
    mean over its tokens of the policy term's derivatives by that mean, times their weights."""
    first = tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        active = tl.load(weights_ptr + token, mask=token < last, other=0.0) != 0
        if old_ptr is not None:
            logprob = tl.load(logprob_ptr + token, mask=active, other=0.0).to(tl.float32)
            total += logprob - tl.load(old_ptr + token, mask=active, other=0.0).to(tl.float32)
        count += tl.where(active, 1.0, 0.0)
    counted = tl.maximum(tl.sum(count, 0), 1.0)
    log_ratio = tl.sum(total, 0) / counted
    share = 0.0
    if ONE_GRADIENT:
        ratio, slope = _clamped_exp(log_ratio + tl.zeros([BLOCK], tl.float32))
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            weight = tl.load(weights_ptr + token, mask=token < last, other=0.0).to(tl.float32)
            active = weight != 0
            logprob = tl.load(logprob_ptr + token, mask=active, other=0.0).to(tl.float32)
            advantage = tl.load(advantages_ptr + token, mask=active, other=0.0).to(tl.float32)
            greedy = active & (weight == 0)
            if temperature_ptr is not None:
                greedy = tl.load(temperature_ptr + token, mask=active, other=1.0) == 0
            mismatch = tl.zeros([BLOCK], tl.float32)
            if HAS_ROLLOUT_CAP:
                old = logprob
                if old_ptr is not None:
                    old = tl.load(old_ptr + token, mask=active, other=0.0).to(tl.float32)
                mismatch = old - tl.load(rollout_ptr + token, mask=active, other=0.0).to(tl.float32)
            _, policy_slope, _, _ = _policy_term(
                ratio,
                slope,
                logprob,
                advantage,
                greedy,
                mismatch,
                low,
                high,
                cap,
                rollout_cap,
                False,
                GREEDY == 2,
                HAS_ROLLOUT_CAP,
            )
            if GREEDY == 1:
                policy_slope = tl.where(greedy, 0.0, policy_slope)
            sums += tl.where(active, weight * policy_slope, 0.0)
        share = tl.sum(sums, 0) / counted
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(shared_ptr + token, log_ratio + tl.zeros([BLOCK], tl.float32), mask=token < last)
        if ONE_GRADIENT:
            tl.store(shared_ptr + num_tokens + token, share + tl.zeros([BLOCK], tl.float32), mask=token < last)


@triton.jit
def _store_sum(partial_ptr, plane, num_programs, x, members):
    """The program's sum of x over the members, whatever x holds elsewhere."""
    total = tl.sum(tl.where(members, x, 0.0), 0)
    tl.store(partial_ptr + plane * num_programs + tl.program_id(0), total)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=_VECTORS)
def _tokens_kernel(
    logprob_ptr,
    entropy_ptr,
    advantages_ptr,
    weights_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    temperature_ptr,
    segments_ptr,
    shared_ptr,
    grads_ptr,
    partial_ptr,
    num_tokens,
    low,
    high,
    cap,
    kl_coef,
    entropy_coef,
    rollout_cap,
    log_rollout_cap,
    LOSS: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    GREEDY: tl.constexpr,
    HAS_ROLLOUT_CAP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for BLOCK tokens: grads [2, N]; sums of metrics and loss [PLANES, programs], twice with segments."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + token, mask=token < num_tokens, other=0.0).to(tl.float32)
    active = weight != 0
    logprob = tl.load(logprob_ptr + token, mask=active, other=0.0).to(tl.float32)
    entropy = tl.load(entropy_ptr + token, mask=active, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + token, mask=active, other=0.0).to(tl.float32)
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + token, mask=active, other=0.0).to(tl.float32)
    greedy = active & (weight == 0)
    if temperature_ptr is not None:
        greedy = active & (tl.load(temperature_ptr + token, mask=active, other=1.0) == 0)
    mismatch = tl.zeros([BLOCK], tl.float32)
    if rollout_ptr is not None:
        mismatch = old - tl.load(rollout_ptr + token, mask=active, other=0.0).to(tl.float32)

    own_log_ratio = logprob - old
    own_ratio, own_slope = _clamped_exp(own_log_ratio)
    log_ratio, ratio, slope = own_log_ratio, own_ratio, own_slope
    if shared_ptr is not None:
        log_ratio = tl.load(shared_ptr + token, mask=active, other=0.0)
        ratio, slope = _clamped_exp(log_ratio)
    policy, policy_slope, at_low, at_high = _policy_term(
        ratio,
        slope,
        logprob,
        advantage,
        greedy,
        mismatch,
        low,
        high,
        cap,
        rollout_cap,
        LOSS == 3,
        GREEDY == 2,
        HAS_ROLLOUT_CAP,
    )
    loss, gradient = policy, policy_slope
    if LOSS == 1:
        gradient = tl.zeros([BLOCK], tl.float32)  # it comes through the sequence
    kl = tl.zeros([BLOCK], tl.float32)
    if ref_ptr is not None:
        kl, kl_slope = _kl_term(tl.load(ref_ptr + token, mask=active, other=0.0).to(tl.float32) - logprob, KL)
        penalty, penalty_slope = kl, kl_slope
        if KL_TIMES_RATIO:
            penalty, penalty_slope = kl * own_ratio, kl_slope * own_ratio + kl * own_slope
        if kl_coef != 0.0:  # 0 times what may be infinite is no number
            loss += kl_coef * penalty
            gradient += kl_coef * penalty_slope
    if entropy_coef != 0.0:
        loss -= entropy_coef * entropy
    bonus = tl.zeros([BLOCK], tl.float32) - entropy_coef
    if GREEDY == 1 or GREEDY == 3:  # out, or an error that must not go unseen
        instead = 0.0 if GREEDY == 1 else float("nan")
        loss, gradient, bonus = (
            tl.where(greedy, instead, loss),
            tl.where(greedy, instead, gradient),
            tl.where(greedy, instead, bonus),
        )
    gradient *= weight
    if LOSS == 1:
        gradient += tl.load(shared_ptr + num_tokens + token, mask=active, other=0.0)
    tl.store(grads_ptr + token, tl.where(active, gradient, 0.0), mask=token < num_tokens)
    tl.store(grads_ptr + num_tokens + token, tl.where(active, weight * bonus, 0.0), mask=token < num_tokens)

    importance = own_ratio
    corrected = tl.exp(tl.minimum(mismatch, _MAX_LOG_RATIO))
    if rollout_ptr is not None:
        importance *= corrected
    HAS_REF: tl.constexpr = ref_ptr is not None
    HAS_ROLLOUT: tl.constexpr = rollout_ptr is not None
    MISMATCH_AT: tl.constexpr = 8 + HAS_REF
    MEANS: tl.constexpr = MISMATCH_AT + HAS_ROLLOUT + HAS_ROLLOUT_CAP
    programs = tl.num_programs(0)
    for group in tl.static_range(2 if segments_ptr is not None else 1):
        members = active
        if segments_ptr is not None:
            members = active & ((tl.load(segments_ptr + token, mask=active, other=0) != 0) == (group == 1))
        to = partial_ptr + group * PLANES * programs
        _store_sum(to, 0, programs, entropy, members)
        _store_sum(to, 1, programs, logprob, members)
        _store_sum(to, 2, programs, ratio, members)
        _store_sum(to, 3, programs, at_low.to(tl.float32), members)
        _store_sum(to, 4, programs, at_high.to(tl.float32), members)
        _store_sum(to, 5, programs, (tl.abs(log_ratio) > _MAX_LOG_RATIO).to(tl.float32), members)
        _store_sum(to, 6, programs, greedy.to(tl.float32), members)
        _store_sum(to, 7, programs, -own_log_ratio, members)
        if HAS_REF:
            _store_sum(to, 8, programs, kl, members)
        if HAS_ROLLOUT:
            _store_sum(to, MISMATCH_AT, programs, corrected - mismatch - 1.0, members)
        if HAS_ROLLOUT_CAP:
            _store_sum(to, MISMATCH_AT + 1, programs, (mismatch > log_rollout_cap).to(tl.float32), members)
        largest = tl.max(tl.where(members, ratio, 0.0), 0)
        tl.store(to + MEANS * programs + tl.program_id(0), largest)
        _store_sum(to, MEANS + 1, programs, importance, members)
        _store_sum(to, MEANS + 2, programs, tl.full([BLOCK], 1.0, tl.float32), members)
        _store_sum(to, MEANS + 3, programs, importance * importance, members)
        _store_sum(to, MEANS + 4, programs, weight * loss, members)


@triton.jit
def _store_metrics(totals, out_ptr, place, PLACES: tl.constexpr, MEANS: tl.constexpr, PLANES: tl.constexpr):
    """A group's column of the metrics [MEANS + 3, PLACES] from its sums [PLANES]; returns its loss."""
    plane = tl.arange(0, PLANES)
    importance = tl.sum(tl.where(plane == MEANS + 1, totals, 0.0), 0)
    count = tl.sum(tl.where(plane == MEANS + 2, totals, 0.0), 0)
    squares = tl.sum(tl.where(plane == MEANS + 3, totals, 0.0), 0)
    value = tl.where(plane < MEANS, totals / tl.maximum(count, 1.0), totals)
    value = tl.where(plane == MEANS + 1, importance * importance / tl.maximum(squares * count, 1e-30), value)
    tl.store(out_ptr + plane * PLACES + place, value, mask=plane < MEANS + 3)
    return tl.sum(tl.where(plane == MEANS + 4, totals, 0.0), 0)


@triton.jit(do_not_specialize=["num_programs"])
def _finish_kernel(
    partial_ptr,
    out_ptr,
    loss_ptr,
    num_programs,
    MEANS: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One program: the loss, and the metrics of all tokens and with two GROUPS of each."""
    plane = tl.arange(0, PLANES)
    PLACES: tl.constexpr = 1 if GROUPS == 1 else 3
    both = tl.zeros([PLANES], tl.float32)
    for group in tl.static_range(GROUPS):
        totals = tl.zeros([PLANES], tl.float32)
        largest = tl.zeros([PLANES], tl.float32)
        for start in range(0, num_programs, PROGRAMS):
            program = start + tl.arange(0, PROGRAMS)[None, :]
            at = partial_ptr + (group * PLANES + plane)[:, None] * num_programs + program
            sums = tl.load(at, mask=(program < num_programs) & (plane < MEANS + 5)[:, None], other=0.0)
            totals += tl.sum(sums, 1)
            largest = tl.maximum(largest, tl.max(sums, 1))
        totals = tl.where(plane == MEANS, largest, totals)
        both = tl.where(plane == MEANS, tl.maximum(both, totals), both + totals)
        if GROUPS == 2:
            _store_metrics(totals, out_ptr, group + 1, PLACES, MEANS, PLANES)
    loss = _store_metrics(both, out_ptr, 0, PLACES, MEANS, PLANES)
    tl.store(loss_ptr, loss)


def policy_pass_triton(inputs: TokenInputs, config: GrpoLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics, and the gradients [2, N] for an upstream of 1)."""
    size, device = len(inputs.logprob), inputs.logprob.device
    inputs = TokenInputs(*(None if x is None else x.contiguous() for x in inputs))  # type: ignore[arg-type]
    programs, groups = triton.cdiv(size, _BLOCK), 1 if inputs.segments is None else 2
    names = inputs.metric_names(config)
    means = len(names) // (1 if groups == 1 else 3) - 3
    grads = torch.empty(2, size, dtype=torch.float32, device=device)
    partial = torch.empty(groups * _PLANES, programs, dtype=torch.float32, device=device)
    out, loss = torch.empty(len(names), dtype=torch.float32, device=device), grads.new_empty(())
    capped = config.rollout_ratio_cap is not None
    bounds = (
        1.0 - config.clip_eps_low,
        1.0 + config.clip_eps_high,
        float("inf") if config.ratio_cap is None else float(config.ratio_cap),
    )
    rollout_cap = float(config.rollout_ratio_cap or 0.0)
    greedy = get_args(GreedyTokens).index(config.greedy_tokens)
    shared = None
    if size > 0 and config.loss in ("gspo", "gspo_token"):
        assert inputs.cu_seqlens is not None
        shared = torch.empty(2, size, dtype=torch.float32, device=device)
        _sequences_kernel[(len(inputs.cu_seqlens) - 1,)](
            inputs.logprob,
            inputs.advantages,
            inputs.weights,
            inputs.old,
            inputs.rollout,
            inputs.temperature,
            inputs.cu_seqlens,
            shared,
            size,
            *bounds,
            rollout_cap,
            ONE_GRADIENT=config.loss == "gspo",
            GREEDY=greedy,
            HAS_ROLLOUT_CAP=capped,
            BLOCK=_BLOCK,
            num_warps=1,
        )
    if size > 0:
        _tokens_kernel[(programs,)](
            inputs.logprob,
            inputs.entropy,
            inputs.advantages,
            inputs.weights,
            inputs.old,
            inputs.ref,
            inputs.rollout,
            inputs.temperature,
            inputs.segments,
            shared,
            grads,
            partial,
            size,
            *bounds,
            float(config.kl_coef),
            float(config.entropy_coef),
            rollout_cap,
            math.log(rollout_cap or 1.0),
            LOSS=get_args(LossKind).index(config.loss),
            KL=get_args(KlKind).index(config.kl),
            KL_TIMES_RATIO=config.kl_times_ratio,
            GREEDY=greedy,
            HAS_ROLLOUT_CAP=capped,
            PLANES=_PLANES,
            BLOCK=_BLOCK,
            num_warps=1,
        )
    _finish_kernel[(1,)](
        partial, out, loss, programs, MEANS=means, GROUPS=groups, PLANES=_PLANES, PROGRAMS=_BLOCK, num_warps=4
    )
    return loss, out, grads
