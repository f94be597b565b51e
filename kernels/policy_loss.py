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

All of it is O(N) on vectors [N]: the ops that read logits (grpo_loss) or hidden states (linear_logprob) give it logprob
and entropy, and get dL / dlogprob and dL / dentropy back. Here is the definition, `policy_loss_ref`, in torch, whose
gradients are autograd's; policy_tokens.py has the same as one pass in Triton and in C++.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme import _native
from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_range, check_tensor, on_its_device, values_visible
from thyme.kernels.logit_rows import Backend, fastest
from thyme.kernels.policy_config import MAX_LOG_RATIO, GreedyTokens, KlKind, LossKind, TokenInputs
from thyme.kernels.policy_config import GrpoLossConfig as GrpoLossConfig
from thyme.kernels.policy_config import GrpoMetrics as GrpoMetrics
from thyme.kernels.policy_tokens import policy_pass_triton


@on_its_device
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
    backend: Backend | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """The loss and its metrics from per-token log-probs, however they were computed; arguments as in `grpo_loss`.

    Differentiable in logprob and entropy, once. `backend` None: Triton on a GPU, C++ for float32 on a CPU, else torch.
    """
    config = config or GrpoLossConfig()
    inputs = TokenInputs(
        logprob,
        entropy,
        advantages,
        weights,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        temperature,
        cu_seqlens,
        segments,
    )
    backend = backend or fastest(logprob)
    _check_tokens(inputs, config, FLOATS_AND_DOUBLE if backend == "ref" else (torch.float32,))
    if backend == "ref":
        return policy_loss_ref(inputs, config)
    return _one_pass(inputs, config, in_triton=backend == "triton")


def policy_loss_ref(inputs: TokenInputs, config: GrpoLossConfig) -> tuple[Tensor, GrpoMetrics]:
    """`policy_loss` in torch: the definition, and the CPU path of float64."""
    logprob, entropy, weights = inputs.logprob, inputs.entropy, inputs.weights
    cu_seqlens, temperature, segments = inputs.cu_seqlens, inputs.temperature, inputs.segments
    active = weights != 0
    everything = _all_seen(active)

    def used(x: Tensor) -> Tensor:  # whatever an unused token holds, NaN too, neither it nor its gradient gets in
        x = x.to(logprob.dtype)
        return x if everything else torch.where(active, x, 0.0)

    current, entropy, advantage = used(logprob), used(entropy), used(inputs.advantages)
    sampled = current.detach()
    old = sampled if inputs.old is None else used(inputs.old)
    log_ratio = current - old
    token_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    ratio = token_ratio
    if config.loss in ("gspo", "gspo_token"):
        assert cu_seqlens is not None
        log_ratio = _sequence_mean(log_ratio, active, cu_seqlens)
        if config.loss == "gspo_token":
            log_ratio = log_ratio.detach() + (current - sampled)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

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
    mismatch = None if inputs.rollout is None else old - used(inputs.rollout)
    if config.rollout_ratio_cap is not None:
        assert mismatch is not None
        policy = policy * mismatch.clamp(max=MAX_LOG_RATIO).exp().clamp(max=config.rollout_ratio_cap)

    per_token = policy
    kl = None
    if inputs.ref is not None:
        kl = _kl(used(inputs.ref) - current, config.kl)
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
            "clamp_frac": (log_ratio.abs() > MAX_LOG_RATIO) & active,
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
        importance = token_ratio if mismatch is None else token_ratio * mismatch.clamp(max=MAX_LOG_RATIO).exp()
        return loss, _metrics(means, ratio, used(importance), active, segments)


def _native_pass(inputs: TokenInputs, config: GrpoLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics, and the gradients [2, N] for an upstream of 1) in C++; see csrc/policy_tokens.hpp."""

    def floats(x: Tensor | None) -> Any:
        return None if x is None else x.detach().to(torch.float32).contiguous().numpy()

    grads = torch.empty(2, len(inputs.logprob))
    segments, starts = inputs.segments, inputs.cu_seqlens
    out = _native.policy_loss_f32(
        floats(inputs.logprob),
        floats(inputs.entropy),
        floats(inputs.advantages),
        floats(inputs.weights),
        floats(inputs.old),
        floats(inputs.ref),
        floats(inputs.rollout),
        floats(inputs.temperature),
        None if segments is None else segments.contiguous().numpy(),
        None if starts is None else starts.long().contiguous().numpy(),
        loss=get_args(LossKind).index(config.loss),
        kl=get_args(KlKind).index(config.kl),
        greedy=get_args(GreedyTokens).index(config.greedy_tokens),
        kl_times_ratio=config.kl_times_ratio,
        clip_low=1.0 - config.clip_eps_low,
        clip_high=1.0 + config.clip_eps_high,
        ratio_cap=float("inf") if config.ratio_cap is None else config.ratio_cap,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        rollout_cap=config.rollout_ratio_cap or 0.0,
        grads=grads.numpy(),
    )
    values = torch.from_numpy(out)
    return values[-1].clone(), values[:-1], grads


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, entropy: Tensor, inputs: TokenInputs, config: GrpoLossConfig, in_triton: bool
    ) -> tuple[Tensor, Tensor]:
        loss, values, grads = (policy_pass_triton if in_triton else _native_pass)(
            inputs._replace(logprob=logprob.detach(), entropy=entropy.detach()), config
        )
        ctx.save_for_backward(grads)
        ctx.set_materialize_grads(False)
        ctx.has_bonus = config.entropy_coef != 0
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        if upstream[0] is None:
            return (None,) * 5
        has_bonus = ctx.has_bonus and ctx.needs_input_grad[1]
        scaled = (grads if has_bonus else grads[:1]) * upstream[0]
        return scaled[0], scaled[1] if has_bonus else None, None, None, None


def _one_pass(inputs: TokenInputs, config: GrpoLossConfig, *, in_triton: bool) -> tuple[Tensor, GrpoMetrics]:
    loss, values = _PolicyLoss.apply(inputs.logprob, inputs.entropy, inputs, config, in_triton)
    return loss, GrpoMetrics(inputs.metric_names(config), values)


def _all_seen(mask: Tensor) -> bool:
    """Whether all is True, where that is known without waiting for a device: then there is nothing to mask."""
    return mask.device.type == "cpu" and bool(mask.all())


def _kl(d: Tensor, kind: KlKind) -> Tensor:
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    return d.clamp(max=MAX_LOG_RATIO).exp() - d - 1


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


def _check_tokens(inputs: TokenInputs, config: GrpoLossConfig, dtypes: tuple[torch.dtype, ...]) -> None:
    logprob, weights, temperature = inputs.logprob, inputs.weights, inputs.temperature
    cu_seqlens, segments = inputs.cu_seqlens, inputs.segments
    check_tensor("logprob", logprob, (None,), dtypes)
    size, device = (len(logprob),), logprob.device
    floats = {
        "entropy": inputs.entropy,
        "advantages": inputs.advantages,
        "weights": weights,
        "old_logprobs": inputs.old,
        "ref_logprobs": inputs.ref,
        "rollout_logprobs": inputs.rollout,
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
    if config.rollout_ratio_cap is not None and inputs.rollout is None:
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
    backend: Backend | None = None,
    **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:
    """`policy_loss` of what row_pass(mask) returns, mask [N] or None (all) being the tokens that count: the frame of
    both ops."""
    check_tensor("weights", weights, (None,), FLOATS_AND_DOUBLE)
    if len(weights) and values_visible(weights) and not all(math.isfinite(bound.item()) for bound in weights.aminmax()):
        raise ValueError("weights must be finite")
    mask = weights != 0
    logprob, entropy = row_pass(None if _all_seen(mask) else mask)
    config = config or GrpoLossConfig()
    # Without a bonus the entropy is only a metric: detached, it costs the backward nothing.
    entropy = entropy if config.entropy_coef else entropy.detach()
    return policy_loss(logprob, entropy, advantages, weights, config=config, backend=backend, **tokens)
