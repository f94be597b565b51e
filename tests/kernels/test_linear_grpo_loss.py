"""linear_grpo_loss: grpo_loss on stored logits, and what its gradients in the forward cost, save and fall back to."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.kernels.head_problem import IDS, Run, problem
from thyme.kernels.grpo_loss import grpo_loss_ref
from thyme.kernels.linear_grpo_loss import (
    LossBackward,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_grpo_loss_triton,
)
from thyme.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_triton
from thyme.kernels.policy_loss import GrpoLossConfig

LOSSES = pytest.mark.parametrize("run", [linear_grpo_loss_ref, linear_grpo_loss, linear_grpo_loss_triton], ids=IDS)
BACKWARDS = pytest.mark.parametrize("backward", get_args(LossBackward))
CONFIGS = {
    "default": GrpoLossConfig(),
    "gspo, k1": GrpoLossConfig(loss="gspo", clip_eps_low=0.05, clip_eps_high=0.05, kl="k1", kl_coef=0.3),
    "entropy, greedy excluded": GrpoLossConfig(entropy_coef=0.2, greedy_tokens="exclude"),
    "cispo, is_pi, truncated": GrpoLossConfig(loss="cispo", greedy_tokens="is_pi", rollout_ratio_cap=1.1),
}


def loss_arguments(args: dict[str, Any]) -> dict[str, Any]:
    num_rows = len(args["hidden"])
    tokens = {name: torch.randn(num_rows, dtype=torch.float64) - 5 for name in ("old", "ref", "rollout")}
    return {name: value for name, value in args.items() if name not in ("mask",)} | {
        "advantages": torch.randn(num_rows, dtype=torch.float64),
        "weights": torch.rand(num_rows, dtype=torch.float64) * args["mask"],
        "cu_seqlens": torch.tensor([0, num_rows // 2, num_rows], dtype=torch.int32),
        "segments": (torch.arange(num_rows) % 2).to(torch.uint8),
        **{f"{name}_logprobs": value for name, value in tokens.items()},
    }


def call_loss(run: Run, args: dict[str, Any], **more: Any) -> tuple[list[Tensor], dict[str, float]]:
    args = args | more
    hidden, weight = (args.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight"))
    loss, metrics = run(hidden, weight, args.pop("targets"), args.pop("advantages"), args.pop("weights"), **args)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad], metrics.as_dict()


def stored(hidden: Tensor, weight: Tensor, *args: Tensor, backward: str, **more: Any) -> tuple[Tensor, Any]:
    return grpo_loss_ref(hidden @ weight.T, *args, **more)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@BACKWARDS
def test_the_loss_is_grpo_loss_of_stored_logits(config: GrpoLossConfig, backward: LossBackward) -> None:
    args = loss_arguments(problem()) | {"config": config, "backward": backward}
    (got, metrics), (exact, exact_metrics) = (call_loss(run, args) for run in (linear_grpo_loss_ref, stored))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert metrics == pytest.approx(exact_metrics, abs=1e-6, rel=1e-6)


@BACKWARDS
def test_the_loss_in_triton(backward: LossBackward, tolerances: dict) -> None:
    args = loss_arguments(problem(9, 150, 20, torch.float32)) | {"backward": backward}
    exact_args = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    (got, _), (exact, _) = call_loss(linear_grpo_loss_triton, args), call_loss(stored, exact_args)
    for name, a, b in zip(("loss", "grad", "grad"), got, exact, strict=True):
        atol, rtol = tolerances[name, torch.float32]
        torch.testing.assert_close(a.double(), b, atol=10 * atol, rtol=rtol)


@LOSSES
def test_on_policy_the_ratio_is_one(run: Run) -> None:
    args = loss_arguments(problem(9, 150, 20, torch.float32))
    passes: dict[Run, Run] = {
        linear_grpo_loss_ref: linear_logprob_ref,
        linear_grpo_loss: linear_logprob,
        linear_grpo_loss_triton: linear_logprob_triton,
    }
    names = ("temperature", "vocab_size", "banned_ids")
    more = {name: args[name] for name in names} | {"mask": args["weights"] != 0}
    old = passes[run](args["hidden"], args["weight"], args["targets"], **more)[0]
    results = [call_loss(run, args, old_logprobs=same, rollout_logprobs=None) for same in (None, old)]
    for _, metrics in results:
        assert metrics["ratio"] == metrics["ratio_max"] == metrics["ess"] == 1.0
        assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == metrics["kl_old"] == 0.0
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)


def test_tokens_in_parts_add_up() -> None:
    args = loss_arguments(problem()) | {"cu_seqlens": None}
    tokens = [name for name, value in args.items() if isinstance(value, Tensor) and name != "weight"]
    whole, _ = call_loss(linear_grpo_loss_ref, args)
    parts = [
        call_loss(linear_grpo_loss_ref, args | {name: args[name][at] for name in tokens})[0]
        for at in torch.arange(12).split(5)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2], atol=1e-12, rtol=0)


def test_bad_arguments_of_the_loss() -> None:
    args = loss_arguments(problem(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"weights must have shape \[12\], got \[11\]"):
        call_loss(linear_grpo_loss_ref, args, weights=torch.ones(11))
    with pytest.raises(ValueError, match="weights must be finite"):
        call_loss(linear_grpo_loss_ref, args, weights=torch.full((12,), torch.inf))
    transposed = torch.randn(24, 300).T
    with pytest.raises(ValueError, match=r"weight must be contiguous, got strides \(1, 300\)"):
        call_loss(linear_grpo_loss_triton, args, weight=transposed)
