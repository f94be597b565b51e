"""What is measured of an RL step: rollouts, the loss, time. Rewards: thyme/train/reward_metrics.py."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from thyme import trace
from thyme.kernels.grpo_loss import GrpoMetrics
from thyme.rollout.types import Rollout, RolloutStatus
from thyme.train.distributed import World
from thyme.train.metrics import Metrics

_LOSS_NAMES = {
    "entropy": "actor/entropy",
    "entropy_text": "actor/entropy_think",
    "entropy_code": "actor/entropy_code",
    "kl_ref": "actor/kl_ref",
    "clip_frac_low": "actor/clip_frac_low",
    "clip_frac_high": "actor/clip_frac_high",
    "ratio": "actor/ratio",
    "ratio_max": "actor/ratio_max",
    "greedy_frac": "actor/greedy_frac",
    "mismatch_kl": "mismatch/kl",
    "mismatch_kl_text": "mismatch/kl_text",
    "mismatch_kl_code": "mismatch/kl_code",
    "rollout_capped": "mismatch/capped_frac",
    "ess": "mismatch/ess",
    "tokens": "batch/trained_tokens",
}
"""The loss kernel's name of a metric -> ours."""


class LossMetrics:
    """The loss metrics of a step's micro-batches put together: means weighted by tokens, sums and maxima as such."""

    def __init__(self) -> None:
        self._loss: list[Tensor] = []
        self._parts: list[GrpoMetrics] = []

    def add(self, loss: Tensor, metrics: GrpoMetrics) -> None:
        self._loss.append(loss)
        self._parts.append(metrics)

    def __bool__(self) -> bool:
        """Whether anything was trained."""
        return bool(self._parts)

    def metrics(self) -> Metrics:
        """All of the step; waits for the device once. Empty but for the loss when nothing was trained."""
        return self.together([self])

    def of_all_ranks(self, world: World) -> Self:
        """These metrics with those of the other ranks' micro-batches of the same step, on every rank."""
        if world.size == 1:
            return self
        losses = [loss.cpu() for loss in self._loss]
        parts = [GrpoMetrics(part.names, part.values.cpu()) for part in self._parts]
        out = type(self)()
        for rank_losses, rank_parts in world.gather((losses, parts)):
            out._loss += rank_losses
            out._parts += rank_parts
        return out

    @staticmethod
    def together(steps: "Sequence[LossMetrics]") -> Metrics:
        """Of several steps on one batch: the mean of their losses, the rest as if they were one step."""
        parts = [part.as_dict() for step in steps for part in step._parts]
        if not parts:
            return {"loss": 0.0}
        out: Metrics = {"loss": float(np.mean([float(torch.stack(step._loss).sum()) for step in steps if step]))}
        for name, ours in _LOSS_NAMES.items():
            if name not in parts[0]:
                continue
            values = np.array([part[name] for part in parts])
            if name == "tokens":
                out[ours] = float(values.sum())
            elif name == "ratio_max":
                out[ours] = float(values.max())
            else:
                segment = next((end for end in ("_text", "_code") if name.endswith(end)), "")
                tokens = np.array([part["tokens" + segment] for part in parts])
                if tokens.sum() > 0:
                    out[ours] = float((values * tokens).sum() / tokens.sum())
        return out


def phase_metrics(groups: Sequence[Sequence[Rollout]], names: Mapping[int, str]) -> Metrics:
    """Of each phase: its share of the sampled tokens, their mean entropy and log-prob, both at temperature 1, and the
    share that was drawn greedily. A phase without a token has its share alone, 0.

    Args:
        names: by number (`RolloutConfig.phase_names`).
    """
    columns = ("phases", "entropies", "logprobs_raw", "temperatures")
    sampled = [[getattr(rollout, name)[rollout.sampled] for name in columns] for group in groups for rollout in group]
    phases, entropies, logprobs, temperatures = (np.concatenate(parts) for parts in zip(*sampled, strict=True))
    out: Metrics = {}
    for number, name in names.items():
        here = phases == number
        out[f"phase/{name}/share"] = float(here.mean())
        if here.any():
            out[f"phase/{name}/entropy"] = float(entropies[here].mean())
            out[f"phase/{name}/logprob"] = float(logprobs[here].mean())
            out[f"phase/{name}/greedy_frac"] = float((temperatures[here] == 0).mean())
    return out


def rollout_metrics(groups: Sequence[Sequence[Rollout]], *, rollout_s: float, weight_version: int) -> Metrics:
    """Lengths, turns, tool calls, how rollouts ended, what the sandbox said. Sandbox rates are of code runs.

    Args:
        rollout_s: wall seconds that sampling them took.
        weight_version: of the weights that are about to be trained; older tokens are stale.
    """
    rollouts = [rollout for group in groups for rollout in group]
    sampled = np.array([rollout.num_sampled for rollout in rollouts])
    drawn = sum(rollout.num_drawn for rollout in rollouts)
    staleness = weight_version - np.concatenate([rollout.weight_versions[rollout.sampled] for rollout in rollouts])
    statuses = Counter(rollout.status for rollout in rollouts)
    cut = statuses[RolloutStatus.LENGTH] + statuses[RolloutStatus.CONTEXT]
    out: Metrics = {
        "completion_length/mean": float(sampled.mean()),
        "completion_length/clipped_ratio": cut / len(rollouts),
        "rollout/drawn_tokens": float(drawn),
        "rollout/turns": float(np.mean([len(rollout.turns) for rollout in rollouts])),
        "rollout/tool_calls": float(np.mean([rollout.num_code for rollout in rollouts])),
        "rollout/code_share": float(np.mean([rollout.num_code > 0 for rollout in rollouts])),
        "rollout/images": float(np.mean([len(rollout.images) for rollout in rollouts])),
        "rollout/staleness_mean": float(staleness.mean()),
        "rollout/staleness_max": float(staleness.max()),
        "perf/rollout_tok_per_s": drawn / rollout_s,
    }
    out |= {f"rollout/ended/{status.value}": count / len(rollouts) for status, count in statuses.items()}
    results = [turn.result for rollout in rollouts for turn in rollout.turns if turn.result is not None]
    if results:
        names = Counter(result.status.name for result in results)
        errors = Counter(_error_name(result.error.type) for result in results if result.error is not None)
        milliseconds = [1e3 * result.wall_s for result in results]
        out |= {
            "sandbox/success_rate": names["OK"] / len(results),
            "sandbox/timeout_rate": names["TIMEOUT"] / len(results),
            "sandbox/exec_ms_p50": float(np.percentile(milliseconds, 50)),
            "sandbox/exec_ms_p95": float(np.percentile(milliseconds, 95)),
        }
        out |= {f"sandbox/error/{kind}": count / len(results) for kind, count in errors.items()}
    return out


def speculation_metrics(before: Mapping[str, float], after: Mapping[str, float], world: World) -> Metrics:
    """What came of guessed tokens on all ranks: drafts that were verified, tokens in them, those of these that were
    drawn, and tokens that came of a verification.

    Args:
        before, after: `Engine.stats` as sampling began and when it had ended.
    """
    names = ("verifications", "drafted_tokens", "accepted_tokens")
    counts = dict(zip(names, world.sum([after[name] - before[name] for name in names]), strict=True))
    out = {f"rollout/{name}": count for name, count in counts.items()}
    if counts["verifications"]:
        out["rollout/tokens_per_verification"] = 1 + counts["accepted_tokens"] / counts["verifications"]
    return out


def _error_name(name: str) -> str:
    """The snippet chose it: anything but a plain name would make a metric name of it."""
    return name if name.isidentifier() and len(name) <= 40 else "other"


class Laps:
    """Wall seconds of the parts of a step, summed where a part comes more than once.

    rollout: sampling, and what scoring of early groups overlaps with it; reward: what is then still waited for;
    logprob: samples, packing and old log-probs; train: the updates; sync: telling the engine.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        self._traced = trace.now()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
        trace.add("steps", part, self._traced, is_own=True)
        self._traced = trace.now()

    def metrics(self) -> Metrics:
        return {f"time/{part}": seconds for part, seconds in self.seconds.items()}
