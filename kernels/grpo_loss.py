"""The GRPO loss over logits, with its own temperature, advantage and weight for every token, in three stages.

  (i)   row pass: with x = z - max(z) over the ids that count and tau the token's temperature,
            logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
  (ii)  O(N) torch on those vectors: every variant of the loss lives here, and so do the metrics. Autograd gives
            g = dL / dlogprob          h = dL / dentropy
  (iii) back through the row pass, from the logits and what (i) kept per row:
            dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)

The loss is sum_t weights_t l_t, so group, batch, sequence and constant normalization are just weights; with the ratio
r = exp(logprob - old) and d = ref - logprob,

    l_t = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) + kl_coef (exp(d) - d - 1) - entropy_coef entropy

PPO clip: Schulman et al. 2017; separate bounds: DAPO, Yu et al. 2025; k1, k2, k3: Schulman, "Approximating KL
divergence", 2020; GSPO: Zheng et al. 2025; CISPO: MiniMax-M1, 2025; two-sided clip: INTELLECT-2, 2025; truncated
importance weights: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; KL
weighted by the ratio: DeepSeek-V3.2, 2025.

A token of temperature 0 was the argmax, whose own policy is a point: it counts as temperature 1 plus "greedy", and
`GrpoLossConfig.greedy_tokens` says what its gradient is.

Shapes: logits [N, V], packed tokens; everything else [N]. Numerics: float32 inside (float64 for float64 logits).
Traffic, n rows of weight != 0, 16-bit logits: forward reads 2 n V bytes, backward reads 2 n V and writes 2 N V. A row
of weight 0 is never read, and a row whose g and h are 0 (clipped, excluded) is not read again by the backward.
"""

# mypy: disable-error-code="no-untyped-def"
# In a kernel the outer `if` is decided when it is compiled, the inner one when it runs:
# ruff: noqa: SIM102

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    check_range,
    check_rows_contiguous,
    check_tensor,
    values_visible,
)
from thyme.kernels.rows import BannedIds, banned_mask, check_vocab_size, row_sums

LossKind = Literal["ppo", "gspo", "gspo_token", "cispo"]
KlKind = Literal["k1", "k2", "k3"]
GreedyTokens = Literal["raw", "exclude", "is_pi", "soft"]

_MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any useful ratio, far from overflow
_CHUNK = 1 << 18  # logits in flight at once on the CPU: 1 MiB of float32, which a core's cache holds


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoLossConfig:
    """Which loss; see the module's docstring for the formulas and their sources."""

    loss: LossKind = "ppo"
    """ppo: ratio per token. gspo: its geometric mean over the sequence, with that gradient; gspo_token: the same value
    with the gradient of the token. cispo: -stop_gradient(clip(r)) A logprob. The gspo losses need cu_seqlens."""
    clip_eps_low: float = 0.2
    """The ratio is clipped to >= 1 - clip_eps_low where the advantage is negative."""
    clip_eps_high: float = 0.2
    """The ratio is clipped to <= 1 + clip_eps_high where the advantage is positive."""
    ratio_cap: float | None = None
    """Two-sided clip: the ratio never counts for more than this, also where the advantage is negative; None: no cap."""
    kl_coef: float = 0.001
    """Coefficient of the KL penalty to ref_logprobs; without ref_logprobs there is none."""
    kl: KlKind = "k3"
    """Estimator of KL(policy, reference) from a token: k1 -d, k2 d^2 / 2, k3 exp(d) - d - 1; d = ref - logprob."""
    kl_times_ratio: bool = False
    """Multiply the estimator by the token's ratio, which makes its gradient unbiased off-policy."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus (entropy at temperature 1), with its gradient."""
    greedy_tokens: GreedyTokens = "raw"
    """Tokens of temperature 0. raw: as if sampled at temperature 1, the paper's way. exclude: no policy term, KL or
    entropy bonus, exact for the policy that ran. is_pi: policy term times stop_gradient(exp(logprob)). soft: code was
    sampled at a small temperature above 0, so a temperature of 0 is an error."""
    rollout_ratio_cap: float | None = None
    """Truncated importance sampling: the policy term times min(exp(old - rollout), this); needs rollout_logprobs."""

    def __post_init__(self) -> None:
        for name, kinds in (("loss", LossKind), ("kl", KlKind), ("greedy_tokens", GreedyTokens)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        for name in ("clip_eps_low", "clip_eps_high", "kl_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("ratio_cap", "rollout_ratio_cap"):
            cap = getattr(self, name)
            if cap is not None and not 0 < cap < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, or None, got {cap}")
        if self.ratio_cap is not None and self.ratio_cap < 1 + self.clip_eps_high:
            raise ValueError(f"ratio_cap must be >= 1 + clip_eps_high = {1 + self.clip_eps_high}, got {self.ratio_cap}")


class GrpoMetrics(NamedTuple):
    """One vector on the logits' device, so that reading it is the caller's choice of when to wait."""

    names: tuple[str, ...]
    values: Tensor
    """[K] float32, detached; means are over tokens of weight != 0, 0.0 where there are none."""

    def as_dict(self) -> dict[str, float]:
        """The values by name; waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))


# --- stage (i) and (iii) in torch: the definition, and the CPU path ------------------------------------------------


class _Rows(NamedTuple):
    """What the row pass reads. It returns stats [5, N] in float32 (float64 for float64 logits), 0 in masked rows:
    logprob, largest logit, log sum e^(x / tau), log sum e^x, entropy."""

    logits: Tensor
    targets: Tensor  # int64; 0 in masked rows
    tau: Tensor | None  # None: all 1
    mask: Tensor | None  # bool; None: all rows count
    banned: Tensor | None  # bool [vocab_size]
    vocab_size: int


def _row_chunks(rows: _Rows) -> Iterator[Tensor | slice]:
    """The rows that count, a cache's worth of logits at a time."""
    step = max(1, _CHUNK // rows.vocab_size)
    if rows.mask is None or bool(rows.mask.all()):
        yield from (slice(start, start + step) for start in range(0, len(rows.logits), step))
    else:
        yield from rows.mask.nonzero().flatten().split(step)


def _shifted(rows: _Rows, at: Tensor | slice, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x, largest), x = z - largest; -1e30 where an id does not count: its exp is 0 at any temperature and 0 x is 0."""
    z = rows.logits[at, : rows.vocab_size]
    z = z if z.dtype == torch.float64 else z.float()
    if rows.banned is not None:
        z = torch.where(rows.banned, -torch.inf, z)
    largest = z.amax(-1) if largest is None else largest[at]
    return (z - largest[:, None]).clamp_min_(-1e30), largest


def _forward_ref(rows: _Rows) -> Tensor:
    dtype = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    stats = torch.zeros(5, len(rows.logits), dtype=dtype, device=rows.logits.device)
    logprob, largest, log_total, log_total_raw, entropy = stats
    for at in _row_chunks(rows):
        x, largest[at] = _shifted(rows, at, None)
        x_target = x.gather(-1, rows.targets[at, None]).squeeze(-1)
        x_target = torch.where(x_target == -1e30, -torch.inf, x_target)
        e = x.exp()
        total = row_sums(e)
        log_total_raw[at] = total.log()
        entropy[at] = total.log() - row_sums(e.mul_(x)).div_(total)
        if rows.tau is None:
            log_total[at] = log_total_raw[at]
            logprob[at] = x_target - log_total[at]
        else:
            tau = rows.tau[at].to(dtype)
            log_total[at] = row_sums(x.div_(tau[:, None]).exp_()).log()
            logprob[at] = x_target / tau - log_total[at]
    return stats


def _backward_ref(rows: _Rows, stats: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    _, largest, log_total, log_total_raw, entropy = stats
    dlogits = torch.zeros_like(rows.logits)
    for at in _row_chunks(rows):
        x, _ = _shifted(rows, at, largest)
        bonus = None
        if h is not None:
            log_p = x - log_total_raw[at, None]
            bonus = log_p.exp().mul_(log_p.add_(entropy[at, None])).mul_(h[at, None])
        coefficient = g[at, None]
        if rows.tau is not None:
            tau = rows.tau[at, None].to(x.dtype)
            x, coefficient = x.div_(tau), coefficient / tau
        dz = x.sub_(log_total[at, None]).exp_().mul_(-coefficient)
        dz.scatter_add_(-1, rows.targets[at, None], coefficient)
        if bonus is not None:
            dz -= bonus
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
        stats = (_forward_triton if backend == "triton" else _forward_ref)(rows)
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
        dlogits = (_backward_triton if ctx.backend == "triton" else _backward_ref)(rows, stats, g, h)
        return dlogits, None, None, None, None, None, None


def _token_logprobs(
    backend: Literal["ref", "triton"], logits: Tensor, targets: Tensor, temperature: Tensor | None,
    mask: Tensor | None, vocab_size: int | None, banned_ids: BannedIds,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_tensor("logits", logits, (None, None), FLOATS_AND_DOUBLE if backend == "ref" else FLOATS)
    num_rows, device = logits.shape[0], logits.device
    check_tensor("targets", targets, (num_rows,), (torch.int64,), device)
    vocab_size = check_vocab_size(vocab_size, logits.shape[1])
    banned = banned_mask(banned_ids, vocab_size, device)
    if mask is not None:
        check_tensor("mask", mask, (num_rows,), (torch.bool,), device)
        targets = torch.where(mask, targets, 0)
    check_range("targets", targets, 0, vocab_size - 1)
    if banned is not None and values_visible(targets):
        hit = banned[targets] if mask is None else banned[targets] & mask
        if bool(hit.any()):
            row = int(hit.nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, a banned id: its probability is 0")
    tau = None
    if temperature is not None:
        check_tensor("temperature", temperature, (num_rows,), FLOATS_AND_DOUBLE, device)
        counted = temperature if mask is None else torch.where(mask, temperature, 1.0)
        check_range("temperature", counted, 0.0, 1e20, what="; 0 means greedy")
        tau = counted.masked_fill(counted == 0, 1.0).clamp_min(1e-30)
        if backend == "ref" and device.type == "cpu" and bool((tau == 1).all()):
            tau = None
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


# --- stage (ii): from (logprob, entropy) to loss and metrics -------------------------------------------------------


def policy_loss(
    logprob: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """The loss and its metrics from per-token log-probs, however they were computed; arguments as in `grpo_loss`."""
    config = config or GrpoLossConfig()
    _check_tokens(
        logprob,
        advantages,
        weights,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        temperature,
        cu_seqlens,
        segments,
        config,
    )
    active = weights != 0

    def used(x: Tensor) -> Tensor:  # whatever an unused token holds, NaN too, neither it nor its gradient gets in
        return torch.where(active, x.to(logprob.dtype), 0.0)

    current, entropy, advantage = used(logprob), used(entropy), used(advantages)
    sampled = current.detach()
    old = sampled if old_logprobs is None else used(old_logprobs)
    log_ratio = current - old
    token_ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    ratio = token_ratio
    if config.loss in ("gspo", "gspo_token"):
        assert cu_seqlens is not None
        log_ratio = _sequence_mean(log_ratio, active, cu_seqlens)
        if config.loss == "gspo_token":
            log_ratio = log_ratio.detach() + (current - sampled)
        ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()

    clipped = ratio.clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)
    clip_low = (ratio < 1 - config.clip_eps_low) & (advantage < 0)
    clip_high = (ratio > 1 + config.clip_eps_high) & (advantage > 0)
    if config.loss == "cispo":
        policy = -clipped.detach() * advantage * current
    else:  # min(r A, clip(r) A), written as the branch that it takes
        capped = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        policy = -torch.where(clip_low | clip_high, clipped, capped) * advantage

    greedy = torch.zeros_like(active) if temperature is None else (temperature == 0) & active
    if config.greedy_tokens == "is_pi":
        policy = torch.where(greedy, sampled.exp(), 1.0) * policy
    mismatch = None if rollout_logprobs is None else old - used(rollout_logprobs)
    if config.rollout_ratio_cap is not None:
        assert mismatch is not None
        policy = policy * mismatch.clamp(max=_MAX_LOG_RATIO).exp().clamp(max=config.rollout_ratio_cap)

    per_token = policy
    kl = None
    if ref_logprobs is not None:
        kl = _kl(used(ref_logprobs) - current, config.kl)
        per_token = per_token + config.kl_coef * (kl * token_ratio if config.kl_times_ratio else kl)
    if config.entropy_coef:
        per_token = per_token - config.entropy_coef * entropy
    if config.greedy_tokens == "exclude":
        per_token = torch.where(greedy, 0.0, per_token)
    elif config.greedy_tokens == "soft":  # an error where values are checked; elsewhere it must not go unseen
        per_token = torch.where(greedy, torch.nan, per_token)
    loss = (used(weights) * per_token).sum()

    with torch.no_grad():
        means = {
            "entropy": entropy,
            "logprob": sampled,
            "ratio": torch.where(active, ratio, 0.0),
            "clip_frac_low": clip_low,
            "clip_frac_high": clip_high,
            "clamp_frac": (log_ratio.abs() > _MAX_LOG_RATIO) & active,
            "greedy_frac": greedy,
            "kl_old": -(current - old),
        }
        if kl is not None:
            means["kl_ref"] = kl
        if mismatch is not None:
            means["mismatch_kl"] = _kl(mismatch, "k3")
        # Against what was really sampled from, so that ess judges the data and not only the last update.
        importance = token_ratio if mismatch is None else token_ratio * mismatch.clamp(max=_MAX_LOG_RATIO).exp()
        return loss, _metrics(means, ratio, importance, active, segments)


def _kl(d: Tensor, kind: KlKind) -> Tensor:
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    return d.clamp(max=_MAX_LOG_RATIO).exp() - d - 1


def _sequence_mean(x: Tensor, active: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N]: for each token the mean of x over the active tokens of its sequence."""
    ends = cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    zeros = x.new_zeros(len(ends))
    total = zeros.index_add(0, sequence, x)
    count = zeros.index_add(0, sequence, active.to(x.dtype))
    return (total / count.clamp_min(1))[sequence]


def _metrics(
    means: dict[str, Tensor], ratio: Tensor, importance: Tensor, active: Tensor, segments: Tensor | None
) -> GrpoMetrics:
    """Means, the largest ratio, the effective sample size over the count, and the count: in all and by segment."""
    groups = {"": active}
    if segments is not None:
        groups |= {"_text": active & (segments == 0), "_code": active & (segments == 1)}
    members = torch.stack(list(groups.values())).to(ratio.dtype)
    importance = torch.where(active, importance, 0.0)
    columns = [*(x.to(ratio.dtype) for x in means.values()), importance * importance, importance]
    count = members.sum(1)
    sums = members @ torch.stack(columns, 1)
    averages = sums[:, : len(means)] / count.clamp_min(1)[:, None]
    largest = (members * ratio).amax(1) if len(ratio) else torch.zeros_like(count)
    effective = sums[:, -1] ** 2 / (sums[:, -2] * count).clamp_min(1e-30)
    values = torch.cat((averages.T.flatten(), largest, effective, count)).float()
    names = (*means, "ratio_max", "ess", "tokens")
    return GrpoMetrics(tuple(name + group for name in names for group in groups), values)


def _check_tokens(
    logprob: Tensor, advantages: Tensor, weights: Tensor, old: Tensor | None, ref: Tensor | None,
    rollout: Tensor | None, temperature: Tensor | None, cu_seqlens: Tensor | None, segments: Tensor | None,
    config: GrpoLossConfig,
) -> None:  # fmt: skip
    size, device = (len(logprob),), logprob.device
    floats = {"advantages": advantages, "weights": weights, "old_logprobs": old, "ref_logprobs": ref,
              "rollout_logprobs": rollout, "temperature": temperature}  # fmt: skip
    for name, tensor in floats.items():
        if tensor is not None:
            check_tensor(name, tensor, size, FLOATS_AND_DOUBLE, device)
    if segments is not None:
        check_tensor("segments", segments, size, (torch.uint8,), device)
        check_range("segments", segments, 0, 1)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32, torch.int64), device)
        if values_visible(cu_seqlens) and (
            len(cu_seqlens) < 1
            or cu_seqlens[0] != 0
            or cu_seqlens[-1] != size[0]
            or bool((cu_seqlens.diff() < 0).any())
        ):
            raise ValueError(f"cu_seqlens must rise from 0 to {size[0]} (the tokens), got {cu_seqlens.tolist()[:16]}")
    if config.loss in ("gspo", "gspo_token") and cu_seqlens is None:
        raise ValueError(f"loss={config.loss!r} needs cu_seqlens: its ratio is one per sequence")
    if config.rollout_ratio_cap is not None and rollout is None:
        raise ValueError("rollout_ratio_cap needs rollout_logprobs")
    if config.greedy_tokens != "raw" and temperature is None:
        raise ValueError(f"greedy_tokens={config.greedy_tokens!r} needs temperature: it is what marks a greedy token")
    if config.greedy_tokens == "soft" and temperature is not None and values_visible(temperature):
        greedy = (temperature == 0) & (weights != 0)
        if bool(greedy.any()):
            row = int(greedy.nonzero()[0])
            raise ValueError(f"temperature[{row}] is 0 under greedy_tokens='soft': sample code at a small one above 0")


# --- the loss ---------------------------------------------------------------------------------------------------


def _grpo_loss(
    row_pass: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, targets: Tensor, advantages: Tensor,
    weights: Tensor, *, vocab_size: int | None, banned_ids: BannedIds, **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:  # fmt: skip
    check_tensor("logits", logits, (None, None))
    check_tensor("weights", weights, (len(logits),), FLOATS_AND_DOUBLE, logits.device)
    if values_visible(weights) and not bool(weights.isfinite().all()):
        raise ValueError("weights must be finite")
    logprob, entropy = row_pass(
        logits,
        targets,
        temperature=tokens["temperature"],
        mask=weights != 0,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
    )
    config = tokens["config"] or GrpoLossConfig()
    # Without a bonus the entropy is only a metric: detached, it costs the backward nothing.
    entropy = entropy if config.entropy_coef else entropy.detach()
    return policy_loss(logprob, entropy, advantages, weights, **tokens)


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
