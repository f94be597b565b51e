"""Which GRPO loss, of what, and what is said of it: `GrpoLossConfig`, `TokenInputs`, `GrpoMetrics`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

LossKind = Literal["ppo", "gspo", "gspo_token", "cispo"]
KlKind = Literal["k1", "k2", "k3"]
GreedyTokens = Literal["raw", "exclude", "is_pi", "soft"]

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any useful ratio, far from overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoLossConfig:
    """Which loss; the formulas and their sources stand at the head of policy_loss.py."""

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


class TokenInputs(NamedTuple):
    """What `policy_loss` was given, checked; [N] each."""

    logprob: Tensor
    entropy: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    temperature: Tensor | None
    cu_seqlens: Tensor | None
    """[S + 1], from 0 to N."""
    segments: Tensor | None
    """uint8: 0 text, 1 code."""

    def metric_names(self, config: GrpoLossConfig) -> tuple[str, ...]:
        """The metrics there are, in their order: each for all tokens, and with segments for text and for code."""
        names = [
            "entropy",
            "logprob",
            "ratio",
            "clip_frac_low",
            "clip_frac_high",
            "clamp_frac",
            "greedy_frac",
            "kl_old",
        ]
        names += ["kl_ref"] * (self.ref is not None) + ["mismatch_kl"] * (self.rollout is not None)
        names += ["rollout_capped"] * (self.rollout is not None and config.rollout_ratio_cap is not None)
        groups = ("",) if self.segments is None else ("", "_text", "_code")
        return tuple(name + group for name in (*names, "ratio_max", "ess", "tokens") for group in groups)
