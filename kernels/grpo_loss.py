"""The GRPO loss over logits, with its own temperature, advantage and weight for every token, in three stages.

  (i)   row pass, token_logprobs.py: logprob and entropy of each token, one read of its logits
  (ii)  one pass over those vectors, policy_loss.py: every variant of the loss, the metrics, and
            g = dL / dlogprob          h = dL / dentropy
  (iii) back through the row pass, from the logits, g, h and a few numbers a row

Rollouts that were truncated take truncated_logprobs.py in the place of (i) and (iii). A row of weight 0 is never read,
and a row whose g and h are 0 (clipped, excluded) is not read again by the backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.logit_rows import Backend, BannedIds
from thyme.kernels.policy_loss import GrpoLossConfig as GrpoLossConfig
from thyme.kernels.policy_loss import GrpoMetrics as GrpoMetrics
from thyme.kernels.policy_loss import policy_loss as policy_loss
from thyme.kernels.policy_loss import weighted_policy_loss
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_ref, token_logprobs_triton
from thyme.kernels.truncated_logprobs import truncated_logprobs, truncated_logprobs_ref, truncated_logprobs_triton

_ROW_PASSES: dict[Backend | None, Callable[..., tuple[Tensor, Tensor]]] = {
    "ref": token_logprobs_ref,
    "triton": token_logprobs_triton,
    None: token_logprobs,
}
_TRUNCATED: dict[Backend | None, Callable[..., tuple[Tensor, Tensor]]] = {
    "ref": truncated_logprobs_ref,
    "triton": truncated_logprobs_triton,
    None: truncated_logprobs,
}


def _grpo_loss(
    backend: Backend | None,
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None,
    banned_ids: BannedIds,
    cuts: dict[str, Any],
    **tokens: Any,
) -> tuple[Tensor, GrpoMetrics]:
    check_tensor("logits", logits, (None, None))
    check_tensor("weights", weights, (len(logits),), FLOATS_AND_DOUBLE, logits.device)
    cuts = {name: cut for name, cut in cuts.items() if cut is not None}
    run = (_TRUNCATED if cuts else _ROW_PASSES)[backend]
    rows = partial(
        run,
        logits,
        targets,
        temperature=tokens["temperature"],
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        **cuts,
    )
    return weighted_policy_loss(lambda mask: rows(mask=mask), weights, advantages, backend=backend, **tokens)


def grpo_loss_ref(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """`grpo_loss` in torch: the definition."""
    return _grpo_loss(
        "ref",
        logits,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        cuts={"top_k": top_k, "top_p": top_p, "min_p": min_p},
        config=config,
    )


@on_its_device
def grpo_loss_triton(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """`grpo_loss` with the row pass and its backward in Triton; logits of float32, bfloat16 or float16."""
    return _grpo_loss(
        "triton",
        logits,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        cuts={"top_k": top_k, "top_p": top_p, "min_p": min_p},
        config=config,
    )


@on_its_device
def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    temperature: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    config: GrpoLossConfig | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """The GRPO loss of packed tokens, differentiable in the logits; Triton on a GPU, C++ or torch on a CPU.

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
        top_k, top_p, min_p: as in `sample`, one for all tokens or [N], where rollouts were truncated: log-probs are
            over the ids that it keeps (truncated_logprobs.py), and so are the three above. None: not truncated.
        config: which loss; None: GrpoLossConfig().

    Returns:
        (loss, a scalar in float32, or float64 for float64 logits; GrpoMetrics).

    Raises:
        ValueError: a wrong shape, dtype or device, or a variant without its input; on a CPU, or under
            THYME_VALIDATE=1, also a wrong value.
    """
    return _grpo_loss(
        None,
        logits,
        targets,
        advantages,
        weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        segments=segments,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        cuts={"top_k": top_k, "top_p": top_p, "min_p": min_p},
        config=config,
    )
