"""Log-probs from hidden states, forward and backward to both operands: plain torch, torch.compile of it, ours.

    pytest bench/bench_linear_logprob.py

Flops counted: 6 N H V, N rows that are trained: the matmul and its two gradients, whatever a rival computes twice or in
vain. Per-token temperature throughout, as hidden / tau where a rival knows none. Liger-Kernel's fused linear cross
entropy and cut-cross-entropy join in on a GPU where they are installed. of_matmul: of the rate of hidden weight^T alone
in the same process.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from thyme.kernels.linear_logprob import linear_logprob

# rows, features, vocabulary, dtype, fraction of rows that are trained
SHAPES = [(2_000, 192, 163, torch.float32, 1.0), (256, 256, 16_384, torch.float32, 1.0)]
SHAPES += [(256, 256, 16_384, torch.float32, 0.4)]
RIVALS = ["torch", "torch.compile", "recompute", "exp_tiles"]
if torch.cuda.is_available():
    SHAPES = [(rows, 3_584, 152_064, torch.bfloat16, active) for rows in (2_048, 8_192) for active in (1.0, 0.4)]
    RIVALS += [name for name in ("liger_kernel", "cut_cross_entropy") if find_spec(name)]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float() / tau[:, None]
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(
        (hidden / tau[:, None]).to(hidden.dtype), weight, targets, reduction="none"
    )


def cut(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    tempered = (hidden / tau[:, None]).to(hidden.dtype)
    return -linear_cross_entropy(tempered, weight, targets, reduction="none")


@cache
def matmul_flops_per_s(rows: int, features: int, vocab: int, dtype: torch.dtype, device: torch.device) -> float:
    """On random numbers: a GPU multiplies zeros faster."""
    a, b = (torch.randn(size, features, device=device, dtype=dtype) for size in (rows, vocab))
    out = torch.empty(rows, vocab, device=device, dtype=dtype)
    names = {"torch": torch, "a": a, "b": b, "out": out}
    timer = Timer("torch.mm(a, b.T, out=out)", globals=names, num_threads=torch.get_num_threads())
    return 2 * rows * features * vocab / timer.blocked_autorange(min_run_time=0.3).median


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("rows", "features", "vocab", "dtype", "active"), SHAPES, ids=str)
def test_linear_logprob(
    measure: Callable[..., None], benchmark: Any, device: torch.device, rows: int, features: int, vocab: int,
    dtype: torch.dtype, active: float, rival: str,
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(rows, features).to(dtype).requires_grad_()
    weight = (3 * normal(vocab, features) / features**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    mask = torch.rand(rows, generator=generator, device=device) < active
    factors = normal(rows) * mask / rows
    tau = torch.where(torch.arange(rows, device=device) % 4 == 0, 0.7, 1.0)
    if rival in ("recompute", "exp_tiles"):
        gib = 4 << 30 if device.type == "cuda" else 1 << 30
        logprobs = lambda: linear_logprob(  # noqa: E731
            hidden, weight, targets, temperature=tau, mask=mask if active < 1 else None, backward=rival,
            workspace_bytes=gib,
        )[0]  # fmt: skip
    else:
        others = {"torch": plain, "liger_kernel": liger, "cut_cross_entropy": cut}
        run = torch.compile(plain) if rival == "torch.compile" else others[rival]
        logprobs = lambda: run(hidden, weight, targets, tau)  # noqa: E731

    def step() -> None:
        hidden.grad = weight.grad = None
        (factors * logprobs()).sum().backward()

    trained = int(mask.sum()) if active < 1 else rows
    flops = 6 * trained * features * vocab
    # Both operands and both gradients once: never what binds, but it says so.
    num_bytes = 2 * (rows + vocab) * features * weight.element_size()
    measure(
        step,
        num_bytes,
        f"linear_logprob forward + backward: {rows} x {features} x {vocab} {str(dtype)[6:]}, {active:.0%} trained",
        rounds=5,
    )
    rate = flops / benchmark.extra_info["device_ms"] * 1e3
    benchmark.extra_info |= {
        "of_matmul": f"{rate / matmul_flops_per_s(rows, features, vocab, dtype, device):.0%}",
        "gflop_per_s": round(rate / 1e9, 1),
        "counted_gflop": round(flops / 1e9, 2),
    }
