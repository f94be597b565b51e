"""The LM head fused into log-probs and into the GRPO loss, forward, and backward to both operands: plain torch,
torch.compile of it, Liger-Kernel, cut-cross-entropy, ours.

    pytest bench/bench_linear_logprob.py

Flops counted: 2 N H V forward and 6 N H V with the backward, N rows that are trained: the matmul and its two gradients,
whatever a contender computes twice or in vain. Ours are called as the trainer calls them: told that temperatures are 0
and 1, which is what the others compute at, with ids that do not count, how many rows do, and the default workspace.
"Known gradient" is SFT, whose loss says each token's gradient before.
Liger-Kernel has two heads: the cross entropy in chunks, and the scaled one, which gives entropies too and runs on
Hopper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders, greedy_or_one, ids_that_count, num_sampled
from selection import shapes
from torch import Tensor

from thyme.kernels.linear_grpo_loss import linear_grpo_loss
from thyme.kernels.linear_logprob import linear_logprob

NUM_SEQS = 8
# rows, features, vocabulary, dtype, fraction of rows that are trained
GPU_SHAPES = [(rows, 3_584, 152_064, torch.bfloat16, active) for rows in (2_048, 8_192) for active in (1.0, 0.4)]
CPU_SHAPES = [
    (2_000, 192, 163, torch.float32, 1.0),
    (256, 256, 16_384, torch.float32, 1.0),
    (256, 256, 16_384, torch.float32, 0.4),
]
SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES)
Shape = tuple[int, int, int, torch.dtype, float]


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    tau: Tensor
    mask: Tensor | None
    advantages: Tensor
    """The same for all tokens of a sequence; NUM_SEQS sequences of one length."""
    weights: Tensor
    old: Tensor
    ref: Tensor

    @property
    def tempered(self) -> Tensor:
        return (self.hidden / self.tau[:, None]).to(self.hidden.dtype)


def problem(rows: int, features: int, vocab: int, dtype: torch.dtype, active: float) -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    hidden = normal(rows, features).to(dtype)
    weight = (3 * normal(vocab, features) / features**0.5).to(dtype)
    mask = torch.rand(rows, generator=generator, device=DEVICE) < active
    old = normal(rows) * 0.1 - 12
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=torch.randint(0, num_sampled(vocab), (rows,), generator=generator, device=DEVICE),
        tau=torch.ones(rows, device=DEVICE),
        mask=mask if active < 1 else None,
        advantages=normal(NUM_SEQS).repeat_interleave(rows // NUM_SEQS),
        weights=mask.float() / rows,
        old=old,
        ref=old + 0.1 * normal(rows),
    )


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float() / tau[:, None]
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tau: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old: Tensor,
    ref: Tensor,
) -> Tensor:
    logprob = plain(hidden, weight, targets, tau)
    ratio = (logprob - old).exp()
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    d = ref - logprob
    return (weights * (policy + 0.001 * (d.exp() - d - 1))).sum()


def torch_logprobs(run: Callable[..., Tensor], case: Problem) -> Callable[[], Tensor]:
    return lambda: run(case.hidden, case.weight, case.targets, case.tau)


def torch_loss(run: Callable[..., Tensor], case: Problem) -> Callable[[], Tensor]:
    more = (case.advantages, case.weights, case.old, case.ref)
    return lambda: run(case.hidden, case.weight, case.targets, case.tau, *more)


def ours(backward: str, case: Problem) -> dict[str, Any]:
    """As the trainer calls it, with the default workspace; a temperature of 0 counts as 1, what others are given."""
    return {
        "backward": backward,
        "temperature": greedy_or_one(len(case.hidden)),
        **ids_that_count(len(case.weight)),
    }


def our_logprobs(backward: str, case: Problem, known: bool = False) -> Callable[[], Tensor]:
    more = ours(backward, case) | {"temperature": None, "logprob_gradient": case.weights if known else None}
    if case.mask is not None:
        more |= {"mask": case.mask, "num_counted": int(case.mask.sum())}
    return lambda: linear_logprob(case.hidden, case.weight, case.targets, **more)[0]


def our_loss(backward: str, case: Problem) -> Callable[[], Tensor]:
    more = ours(backward, case) | {"old_logprobs": case.old, "ref_logprobs": case.ref}
    more |= {"num_counted": int((case.weights != 0).sum()), "tempered": False}
    positional = (case.hidden, case.weight, case.targets, case.advantages, case.weights)
    return lambda: linear_grpo_loss(*positional, **more)[0]


def liger_logprobs(case: Problem) -> Callable[[], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: -liger_fused_linear_cross_entropy(case.tempered, case.weight, case.targets, reduction="none")


def liger_scaled_logprobs(case: Problem) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    call = LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda: -call(case.tempered, case.weight, case.targets, 1.0, -100, 1, True)[0]


def cut_logprobs(case: Problem) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: -linear_cross_entropy(case.tempered, case.weight, case.targets, reduction="none")


def liger_loss(case: Problem) -> Callable[[], Tensor]:
    """Its mean over the trained tokens, times their share: the weights of the others."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def batched(x: Tensor) -> Tensor:
        return x.view(NUM_SEQS, -1)

    module = LigerFusedLinearGRPOLoss(beta=0.001, use_ref_model=True, loss_type="bnpo", compiled=GPU)
    trained = case.weights != 0
    arguments = (batched(case.targets), batched(trained).int(), batched(case.advantages)[:, 0].contiguous())
    more = {"ref_per_token_logps": batched(case.ref), "old_per_token_logps": batched(case.old)}
    share = trained.float().mean()

    def loss() -> Tensor:
        hidden = case.hidden.view(NUM_SEQS, -1, case.hidden.shape[1])
        return module(hidden, case.weight, *arguments, **more)[0] * share

    return loss


Make = Callable[[Problem], Callable[[], Tensor]]
LOGPROBS: dict[str, Make] = {
    "torch": partial(torch_logprobs, plain),
    "torch.compile": lambda case: torch_logprobs(compiled(plain), case),
    "ours, known gradient": partial(our_logprobs, "recompute", known=True),
    "ours, recompute": partial(our_logprobs, "recompute"),
    "ours, kept tiles": partial(our_logprobs, "kept_tiles"),
    "liger": liger_logprobs,
    "liger, scaled": liger_scaled_logprobs,
    "cut-cross-entropy": cut_logprobs,
}
LOSSES: dict[str, Make] = {
    "torch": partial(torch_loss, plain_loss),
    "torch.compile": lambda case: torch_loss(compiled(plain_loss), case),
    "ours": partial(our_loss, "in_forward"),
    "ours, recompute": partial(our_loss, "recompute"),
    "liger": liger_loss,
}
LIGER = {"liger": "liger_kernel"}
PEERS = LIGER | {"liger, scaled": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
OURS = ("torch", "torch.compile", "ours, known gradient", "ours, recompute", "ours, kept tiles")
OUR_LOSSES = ("torch", "torch.compile", "ours", "ours, recompute")


def title(what: str, shape: Shape) -> str:
    rows, features, vocab, dtype, active = shape
    return f"{what}: {rows} x {features} x {vocab} {str(dtype)[6:]}, {active:.0%} trained"


def counted(shape: Shape, case: Problem, matmuls: int) -> dict[str, Any]:
    """Bytes: operands, and gradients where there are any, once; never what binds, but it says so."""
    rows, features, vocab, dtype, _ = shape
    trained = rows if case.mask is None else int(case.mask.sum())
    size = (rows + vocab) * features * dtype.itemsize
    return {"flops": 2 * matmuls * trained * features * vocab, "num_bytes": size * (1 + (matmuls > 1)), "dtype": dtype}


def forward_group(shape: Shape) -> Group:
    case = problem(*shape)
    names = contenders("torch", "torch.compile", "ours", **PEERS)
    makes = LOGPROBS | {"ours": LOGPROBS["ours, recompute"]}  # without a gradient they are the same
    return Group(
        title=title("linear_logprob forward", shape),
        names=names,
        build=lambda name: torch.no_grad()(makes[name](case)),
        **counted(shape, case, 1),
    )


def training_group(what: str, makes: dict[str, Make], names: list[str], shape: Shape) -> Group:
    case = problem(*shape)

    def step(result: Callable[[], Tensor]) -> None:
        case.hidden.grad = case.weight.grad = None
        out = result()
        (out if out.dim() == 0 else (case.weights * out).sum()).backward()

    return Group(
        title=title(f"{what} forward + backward", shape),
        names=names,
        build=lambda name: partial(step, makes[name](case)),
        training=True,
        **counted(shape, case, 3),
    )


@pytest.mark.parametrize("contender", contenders("torch", "torch.compile", "ours", **PEERS))
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[4] == 1], ids=str)
def test_linear_logprob(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: forward_group(shape), absent(**PEERS))


@pytest.mark.parametrize("contender", contenders(*OURS, **PEERS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logprob_backward(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    names = contenders(*OURS, **PEERS)
    compare(contender, lambda: training_group("linear_logprob", LOGPROBS, names, shape), absent(**PEERS))


@pytest.mark.parametrize("contender", contenders(*OUR_LOSSES, **LIGER))
@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_linear_grpo_loss(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    names = contenders(*OUR_LOSSES, **LIGER)
    compare(contender, lambda: training_group("linear_grpo_loss", LOSSES, names, shape), absent(**LIGER))
