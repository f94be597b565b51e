"""The GRPO loss, forward and backward to the logits: plain torch, torch.compile of it, the reference and grpo_loss.

    pytest bench/bench_grpo_loss.py

Bytes counted: the logits of active rows read twice, all gradients written once. Per-token temperature throughout.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thyme.kernels.grpo_loss import grpo_loss, grpo_loss_ref

# rows, vocabulary, dtype, fraction of rows that are trained
SHAPES = [(4_000, 163, torch.float32, 1.0), (64, 49_152, torch.float32, 1.0), (64, 49_152, torch.float32, 0.4)]
if torch.cuda.is_available():
    SHAPES = [(rows, 152_064, torch.bfloat16, active) for rows in (2_048, 8_192) for active in (1.0, 0.4)]


def plain(
    logits: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, old: Tensor, ref: Tensor, tau: Tensor
) -> Tensor:
    logprob = (logits.float() / tau[:, None]).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    ratio = (logprob - old).exp()
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    d = ref - logprob
    return (weights * (policy + 0.001 * (d.exp() - d - 1))).sum()


@pytest.mark.parametrize("rival", ["torch", "torch.compile", "reference", "ours"])
@pytest.mark.parametrize(("rows", "vocab", "dtype", "active"), SHAPES, ids=str)
def test_grpo_loss(
    measure: Callable[..., None], device: torch.device, rows: int, vocab: int, dtype: torch.dtype, active: float,
    rival: str,
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits = (normal(rows, vocab) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    advantages = normal(rows)
    weights = (torch.rand(rows, generator=generator, device=device) < active).float() / rows
    with torch.no_grad():
        picked = logits.detach().float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    old, ref = picked + 0.1 * normal(rows), picked + 0.1 * normal(rows)
    tau = torch.where(torch.arange(rows, device=device) % 4 == 0, 0.7, 1.0)
    if rival.startswith("torch"):
        loss_of = torch.compile(plain) if rival == "torch.compile" else plain
        loss = lambda: loss_of(logits, targets, advantages, weights, old, ref, tau)  # noqa: E731
    else:
        op = grpo_loss if rival == "ours" else grpo_loss_ref
        loss = lambda: op(  # noqa: E731
            logits, targets, advantages, weights, old_logprobs=old, ref_logprobs=ref, temperature=tau
        )[0]

    def step() -> None:
        logits.grad = None
        loss().backward()

    trained = int((weights != 0).sum())
    num_bytes = (2 * trained + rows) * vocab * logits.element_size()
    measure(step, num_bytes, f"grpo_loss forward + backward: {rows} x {vocab} {str(dtype)[6:]}, {active:.0%} trained")
