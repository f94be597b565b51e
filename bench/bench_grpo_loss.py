"""The GRPO loss, forward and backward to the logits: plain torch, torch.compile of it, Liger-Kernel, and grpo_loss.

    pytest bench/bench_grpo_loss.py

Bytes counted: the logits of active rows read twice, all gradients written once. Temperature per token throughout;
Liger-Kernel, which knows one for all, takes 1, and writes the gradient over the logits as is its default.
The stage between the two passes over the logits is timed alone too, as the recipes train: what it reads and writes is
little, and the time is that of its launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders, greedy_or_one, ids_that_count, num_sampled
from selection import shapes
from torch import Tensor

from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss, grpo_loss_ref, policy_loss
from thyme.kernels.logit_rows import Backend

NUM_SEQS = 8
# rows, vocabulary, dtype, fraction of rows that are trained
GPU_SHAPES = [(rows, 152_064, torch.bfloat16, active) for rows in (2_048, 8_192) for active in (1.0, 0.4)]
CPU_SHAPES = [(4_000, 163, torch.float32, 1.0), (64, 49_152, torch.float32, 1.0), (64, 49_152, torch.float32, 0.4)]
Shape = tuple[int, int, torch.dtype, float]


@dataclass(frozen=True)
class Problem:
    logits: Tensor
    targets: Tensor
    advantages: Tensor
    """The same for all tokens of a sequence; NUM_SEQS sequences of one length."""
    weights: Tensor
    old: Tensor
    ref: Tensor
    tau: Tensor


def problem(rows: int, vocab: int, dtype: torch.dtype, active: float) -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    logits = (normal(rows, vocab) * 3).to(dtype)
    targets = torch.randint(0, num_sampled(vocab), (rows,), generator=generator, device=DEVICE)
    picked = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return Problem(
        logits=logits.requires_grad_(),
        targets=targets,
        advantages=normal(NUM_SEQS).repeat_interleave(rows // NUM_SEQS),
        weights=(torch.rand(rows, generator=generator, device=DEVICE) < active).float() / rows,
        old=picked + 0.1 * normal(rows),
        ref=picked + 0.1 * normal(rows),
        tau=torch.ones(rows, device=DEVICE),
    )


def plain(
    logits: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, old: Tensor, ref: Tensor, tau: Tensor
) -> Tensor:
    logprob = (logits.float() / tau[:, None]).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    ratio = (logprob - old).exp()
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    d = ref - logprob
    return (weights * (policy + 0.001 * (d.exp() - d - 1))).sum()


def torch_loss(run: Callable[..., Tensor], case: Problem) -> Callable[[], Tensor]:
    return lambda: run(case.logits, case.targets, case.advantages, case.weights, case.old, case.ref, case.tau)


def our_loss(op: Callable[..., tuple[Tensor, object]], case: Problem) -> Callable[[], Tensor]:
    """As the trainer calls it; a temperature of 0 counts as 1, which is what the others are given."""
    more = {"temperature": greedy_or_one(len(case.logits)), **ids_that_count(case.logits.shape[1])}
    positional = (case.logits, case.targets, case.advantages, case.weights)
    return lambda: op(*positional, old_logprobs=case.old, ref_logprobs=case.ref, **more)[0]


def liger_loss(case: Problem) -> Callable[[], Tensor]:
    """In its layout: logits [B, L + 1, V], of which the last of each sequence is not used."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def batched(x: Tensor) -> Tensor:
        return x.view(NUM_SEQS, -1)

    length, vocab = len(case.logits) // NUM_SEQS, case.logits.shape[1]
    logits = case.logits.new_zeros(NUM_SEQS, length + 1, vocab)
    logits[:, :-1] = case.logits.detach().view(NUM_SEQS, length, vocab)
    arguments = (
        batched(case.old),
        batched(case.ref),
        batched(case.targets),
        batched(case.advantages)[:, 0].contiguous(),
        batched(case.weights != 0).int(),
    )

    def loss() -> Tensor:
        leaf = logits.detach().requires_grad_()
        more = {"temperature": 1.0, "beta": 0.001, "eps_low": 0.2, "eps_high": 0.2}
        return (triton_grpo_loss(leaf, *arguments, **more)[0] * batched(case.weights)).sum()

    return loss


LOSSES: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "torch": partial(torch_loss, plain),
    "torch.compile": lambda case: torch_loss(compiled(plain), case),
    "reference": partial(our_loss, grpo_loss_ref),
    "ours": partial(our_loss, grpo_loss),
    "liger": liger_loss,
}
PEERS = {"liger": "liger_kernel"}
CONTENDERS = contenders("torch", "torch.compile", "reference", "ours", **PEERS)


def title(rows: int, vocab: int, dtype: torch.dtype, active: float) -> str:
    return f"grpo_loss forward + backward: {rows} x {vocab} {str(dtype)[6:]}, {active:.0%} trained"


def group(shape: Shape) -> Group:
    case = problem(*shape)
    rows, vocab, dtype, _ = shape

    def step(loss: Callable[[], Tensor]) -> None:
        case.logits.grad = None
        loss().backward()

    trained = int((case.weights != 0).sum())
    return Group(
        title=title(*shape),
        num_bytes=(2 * trained + rows) * vocab * dtype.itemsize,
        dtype=dtype,
        names=CONTENDERS,
        build=lambda name: partial(step, LOSSES[name](case)),
        training=True,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", shapes(GPU_SHAPES if GPU else CPU_SHAPES), ids=str)
def test_grpo_loss(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: group(shape), absent(**PEERS))


def stage_title(tokens: int) -> str:
    return f"policy_loss forward + backward: {tokens} tokens"


def stage_group(tokens: int) -> Group:
    """PPO with all metrics: KL to a reference, rollout log-probs, text and code apart, a fifth of the tokens masked."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, tokens, generator=generator, device=DEVICE)
    logprob = (-normal().abs()).requires_grad_()
    index = torch.arange(tokens, device=DEVICE)
    near = [logprob.detach() + 0.1 * normal() for _ in range(3)]
    more = dict(zip(("old_logprobs", "ref_logprobs", "rollout_logprobs"), near, strict=True))
    more |= {"temperature": greedy_or_one(tokens), "segments": (index % 3 == 0).to(torch.uint8)}
    arguments = (logprob, normal().abs(), normal(), (index % 5 != 0).float() / tokens)
    config = GrpoLossConfig(rollout_ratio_cap=2.0)

    def step(backend: Backend | None) -> None:
        logprob.grad = None
        policy_loss(*arguments, **more, config=config, backend=backend)[0].backward()

    return Group(
        title=stage_title(tokens),
        num_bytes=tokens * (8 * 4 + 1 + 3 * 4),
        dtype=torch.float32,
        names=["reference", "ours"],
        build=lambda name: partial(step, "ref" if name == "reference" else None),
        training=True,
    )


@pytest.mark.parametrize("contender", ["reference", "ours"])
@pytest.mark.parametrize("tokens", [2_048, 8_192])
def test_policy_loss(compare: Callable[..., None], tokens: int, contender: str) -> None:
    compare(contender, lambda: stage_group(tokens), {})
