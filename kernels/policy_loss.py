"""The policy loss of tokens from their log-probs: every variant of GRPO, whatever the log-probs were computed with.

The loss is sum_t weights_t l_t, so group, batch, sequence and constant normalization are just weights; with the ratio
r = exp(logprob - old) and d = ref - logprob,

    l_t = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) + kl_coef (exp(d) - d - 1) - entropy_coef entropy

PPO clip: Schulman et al. 2017; separate bounds: DAPO, Yu et al. 2025; k1, k2, k3: Schulman, "Approximating KL
divergence", 2020; GSPO: Zheng et al. 2025; CISPO: MiniMax-M1, 2025; two-sided clip: INTELLECT-2, 2025; truncated
importance weights: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; KL
weighted by the ratio: DeepSeek-V3.2, 2025.

A token of temperature 0 was the argmax, whose own policy is a point: it counts as temperature 1 plus "greedy", and
`GrpoLossConfig.greedy_tokens` says what its gradient is.

All of it is O(N) torch on vectors [N], with no kernel of its own: the ops that read logits (grpo_loss) or hidden states
(linear_logprob) give it logprob and entropy, and autograd gives them dL / dlogprob and dL / dentropy back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_range, check_tensor, values_visible

LossKind = Literal["ppo", "gspo", "gspo_token", "cispo"]
KlKind = Literal["k1", "k2", "k3"]
GreedyTokens = Literal["raw", "exclude", "is_pi", "soft"]

_MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any useful ratio, far from overflow


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
    """Coefficient of the KL penalty to ref_logprobs; without ref_logprobs there is none, and at 0 they
    only make the metric."""
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
    everything = _all_seen(active)

    def used(x: Tensor) -> Tensor:  # whatever an unused token holds, NaN too, neither it nor its gradient gets in
        x = x.to(logprob.dtype)
        return x if everything else torch.where(active, x, 0.0)

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

    clipped = ratio.detach().clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)  # flat where it is taken
    clip_low = (ratio < 1 - config.clip_eps_low) & (advantage < 0)
    clip_high = (ratio > 1 + config.clip_eps_high) & (advantage > 0)
    if config.loss == "cispo":
        policy = -clipped * advantage * current
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
        if config.kl_coef:  # 0 times what may be infinite is no number
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
            "ratio": used(ratio),
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
            if config.rollout_ratio_cap is not None:
                means["rollout_capped"] = mismatch > math.log(config.rollout_ratio_cap)
        # Against what was really sampled from, so that ess judges the data and not only the last update.
        importance = token_ratio if mismatch is None else token_ratio * mismatch.clamp(max=_MAX_LOG_RATIO).exp()
        return loss, _metrics(means, ratio, used(importance), active, segments)


def _all_seen(mask: Tensor) -> bool:
    """Whether all is True, where that is known without waiting for a device: then there is nothing to mask."""
    return mask.device.type == "cpu" and bool(mask.all())


def _kl(d: Tensor, kind: KlKind) -> Tensor:
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    return d.clamp(max=_MAX_LOG_RATIO).exp() - d - 1


def _sequence_mean(x: Tensor, active: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N]: for each token the mean of x over the active tokens of its sequence.

    Summed segment by segment: adding to an index would use atomics on a GPU, whose order is another one each time.
    """
    lengths = cu_seqlens.diff().long()
    sequence = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(len(x), device=x.device), right=True)
    # unsafe: the lengths were checked where a look costs no sync
    total, count = (torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True) for part in (x, active.to(x.dtype)))
    return (total / count.clamp_min(1))[sequence]


def _metrics(
    means: dict[str, Tensor], ratio: Tensor, importance: Tensor, active: Tensor, segments: Tensor | None
) -> GrpoMetrics:
    """Means, the largest ratio, the effective sample size over the count, and the count: in all and by segment."""
    groups = {"": active}
    if segments is not None:
        groups |= {"_text": active & (segments == 0), "_code": active & (segments == 1)}
    members = torch.stack(list(groups.values())).to(ratio.dtype)
    rows = [*(x.to(ratio.dtype) for x in means.values()), importance * importance, importance]
    count = members.sum(1)
    sums = torch.stack(rows) @ members.T
    averages = sums[: len(means)] / count.clamp_min(1)
    largest = (members * ratio).amax(1) if len(ratio) else torch.zeros_like(count)
    effective = sums[-1] ** 2 / (sums[-2] * count).clamp_min(1e-30)
    values = torch.cat((averages.flatten(), largest, effective, count)).float()
    names = (*means, "ratio_max", "ess", "tokens")
    return GrpoMetrics(tuple(name + group for name in names for group in groups), values)


def _check_tokens(
    logprob: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    temperature: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    config: GrpoLossConfig,
) -> None:
    size, device = (len(logprob),), logprob.device
    floats = {
        "advantages": advantages,
        "weights": weights,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
        "temperature": temperature,
    }
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


def weighted_policy_loss(
    row_pass: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    weights: Tensor,
    advantages: Tensor,
    config: GrpoLossConfig | None,
    **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:
    """`policy_loss` of what row_pass(mask) returns, mask [N] or None (all) being the tokens that count: the frame of
    both ops."""
    check_tensor("weights", weights, (None,), FLOATS_AND_DOUBLE)
    if len(weights) and values_visible(weights) and not math.isfinite(weights.abs().amax().item()):
        raise ValueError("weights must be finite")
    mask = weights != 0
    logprob, entropy = row_pass(None if _all_seen(mask) else mask)
    config = config or GrpoLossConfig()
    # Without a bonus the entropy is only a metric: detached, it costs the backward nothing.
    entropy = entropy if config.entropy_coef else entropy.detach()
    return policy_loss(logprob, entropy, advantages, weights, config=config, **tokens)
