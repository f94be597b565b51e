"""linear_logprob on a GPU: every dtype at larger sizes, its memory, bits that repeat, no wait, no recompile."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from thyme.kernels import linear_gradient, linear_tiles
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss
from thyme.kernels.linear_grpo_loss import LossBackward, linear_grpo_loss, linear_grpo_loss_ref
from thyme.kernels.linear_logprob import Backward, linear_logprob, linear_logprob_ref

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BACKWARDS = pytest.mark.parametrize("backward", ["recompute", "kept_tiles"])


def problem(num_rows: int, features: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    index = torch.arange(num_rows, device="cuda")
    return {
        "hidden": torch.randn(num_rows, features, device="cuda").to(dtype),
        "weight": (torch.randn(vocab, features, device="cuda") * 3 / features**0.5).to(dtype),
        "targets": torch.randint(0, vocab, (num_rows,), device="cuda"),
        "temperature": torch.tensor([1.0, 0.0, 0.6, 1.5], device="cuda")[index % 4],
    }


def call(args: dict[str, Any], entropy: float = 0.0, run: Any = linear_logprob, **more: Any) -> list[Tensor]:
    args = args | more
    hidden, weight = (args.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight"))
    logprob, entropies = run(hidden, weight, args.pop("targets"), **args)
    total = (logprob * torch.linspace(0.5, 1.5, len(logprob), device="cuda")).sum() / len(logprob)
    (total + entropy * entropies.sum() if entropy else total).backward()
    return [logprob.detach(), entropies.detach(), hidden.grad, weight.grad]


# Widths that bulk copies take and one they do not; more than one tile of rows, of words and of splits.
@pytest.mark.parametrize("shape", [(1, 64, 300), (200, 896, 5_001), (130, 50, 2_049)], ids=str)
@pytest.mark.parametrize("entropy", [0.0, 0.01])
@BACKWARDS
@DTYPES
def test_linear_logprob(
    shape: tuple[int, int, int], entropy: float, backward: Backward, dtype: torch.dtype, tolerances: dict
) -> None:
    args = problem(*shape, dtype)
    got = call(args, entropy, backward=backward)
    exact = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    expected = call(exact, entropy, run=linear_logprob_ref)
    for name, a, b in zip(("logprob", "entropy"), got, expected, strict=False):
        torch.testing.assert_close(a.double(), b, atol=max(tolerances[name, dtype][0], 5e-5), rtol=1e-5)
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()


@BACKWARDS
def test_linear_logprob_of_the_7b_head(backward: Backward, tolerances: dict) -> None:
    args = problem(300, 3_584, 152_064, torch.bfloat16)
    got = call(args, backward=backward)
    expected = call(args | {name: args[name].double() for name in ("hidden", "weight")}, run=linear_logprob_ref)
    for name, a, b in zip(("logprob", "entropy"), got, expected, strict=False):
        torch.testing.assert_close(a.double(), b, atol=max(tolerances[name, torch.bfloat16][0], 5e-5), rtol=1e-5)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


@BACKWARDS
def test_bits_repeat_and_do_not_know_the_batch(backward: Backward) -> None:
    args = problem(300, 896, 5_000, torch.bfloat16)
    first, second = call(args, backward=backward), call(args, backward=backward)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for row in (0, 127, 128, 299):
        at = slice(row, row + 1)
        alone = {name: args[name][at] for name in ("hidden", "targets", "temperature")}
        for a, b in zip(first[:2], call(args | alone, backward=backward)[:2], strict=True):
            assert torch.equal(a[at], b)


@BACKWARDS
def test_memory_is_the_workspace_and_the_gradients(backward: Backward) -> None:
    args = problem(4_096, 512, 65_536, torch.bfloat16)
    limit = 64 << 20
    hidden, weight = (args.pop(name).requires_grad_() for name in ("hidden", "weight"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprob, _ = linear_logprob(hidden, weight, **args, backward=backward, workspace_bytes=limit)
    logprob.sum().backward()
    gradients = weight.numel() * (4 + 2) + hidden.numel() * 2  # dweight: the sum in float32, and the 16-bit result
    partials = 4 * 4 * len(hidden) * (65_536 // 2_048)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= limit + gradients + 2 * partials + (8 << 20), (peak, limit, gradients, partials)
    assert peak < len(hidden) * 65_536 * 2


@BACKWARDS
def test_chunks_add_up(backward: Backward) -> None:
    args = problem(1_000, 512, 8_192, torch.bfloat16)
    one = call(args, backward=backward)
    many = call(args, backward=backward, workspace_bytes=300 * 8_192 * 2)
    assert torch.equal(one[0], many[0]) or backward == "kept_tiles"
    for a, b in zip(many, one, strict=True):
        assert (a.float() - b.float()).norm() <= 4e-3 * b.float().norm()


@BACKWARDS
def test_masked_rows_are_neither_read_nor_paid_for(backward: Backward) -> None:
    args = problem(600, 256, 4_096, torch.bfloat16)
    mask = torch.arange(600, device="cuda") % 5 < 2
    args["hidden"][~mask] = torch.nan
    got = call(args, mask=mask, backward=backward)
    assert all(x.isfinite().all() for x in got)
    assert all((x[~mask] == 0).all() for x in got[:3])


@pytest.mark.parametrize("backward", get_args(LossBackward))
def test_the_loss_is_grpo_loss_of_stored_logits(backward: LossBackward) -> None:
    args = problem(300, 256, 4_096, torch.float32)
    advantages, weights = torch.randn(2, 300, device="cuda").unbind()
    more = {"ref_logprobs": torch.randn(300, device="cuda") - 8, "temperature": args["temperature"]}
    config = GrpoLossConfig(entropy_coef=0.01)
    ours, metrics = linear_grpo_loss(
        args["hidden"].requires_grad_(),
        args["weight"],
        args["targets"],
        advantages,
        weights,
        config=config,
        backward=backward,
        **more,
    )
    logits = (args["hidden"].double() @ args["weight"].double().T).float()
    stored, stored_metrics = grpo_loss(logits, args["targets"], advantages, weights, config=config, **more)
    torch.testing.assert_close(ours, stored, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(metrics.values, stored_metrics.values, atol=1e-4, rtol=1e-3)


def loss_and_gradients(args: dict[str, Any], weights: Tensor, **more: Any) -> list[Tensor]:
    hidden, weight = (args[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    advantages = torch.linspace(-1, 1, len(hidden), device="cuda")
    loss, _ = linear_grpo_loss(
        hidden, weight, args["targets"], advantages, weights, temperature=args["temperature"], **more
    )
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("bonus", [0.0, 0.01])
@DTYPES
def test_gradients_in_the_forward(dtype: torch.dtype, bonus: float) -> None:
    """Three chunks of two tiles and one of the whole, against float64; float16 takes the other way, by rule."""
    args, weights = problem(700, 512, 8_200, dtype), torch.rand(700, device="cuda") / 700
    config = GrpoLossConfig(entropy_coef=bonus)
    exact = args | {name: args[name].double() for name in ("hidden", "weight")}
    hidden, weight = (exact[name].requires_grad_() for name in ("hidden", "weight"))
    advantages = torch.linspace(-1, 1, 700, device="cuda")
    more = {"temperature": args["temperature"], "config": config}
    linear_grpo_loss_ref(hidden, weight, args["targets"], advantages, weights, **more)[0].backward()
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for workspace in (1 << 30, 256 * 8_448 * 2 * (1 + (dtype == torch.float32))):
        got = loss_and_gradients(args, weights, config=config, workspace_bytes=workspace)
        for a, b in zip(got[1:], (hidden.grad, weight.grad), strict=True):
            assert (a.double() - b).norm() <= limit * b.norm()


def test_a_sum_in_float32_is_added_to_in_place() -> None:
    """Where it is not, a product in float32 is made beside it: torch is too old, or refuses."""
    assert linear_gradient.adds_in_float32(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)


def test_a_known_count_waits_for_nobody(no_sync: Any) -> None:
    args = problem(300, 256, 4_096, torch.bfloat16)
    weights = (torch.arange(300, device="cuda") % 3 != 1).float()
    with no_sync():
        loss_and_gradients(args, weights, num_counted=200)


def test_the_targets_logit_has_the_bits_of_its_tile() -> None:
    """It is a product of its own: log-probs of a sure token are 0 and none is above, so the two agree."""
    args = problem(300, 3_584, 4_096, torch.bfloat16)
    args["weight"] *= 100
    logits = args["hidden"].float() @ args["weight"].float().T
    logprob, _ = linear_logprob(args["hidden"], args["weight"], logits.argmax(-1))
    sure = logits.softmax(-1).amax(-1) == 1
    assert sure.sum() > 100 and (logprob[sure] == 0).all() and (logprob <= 0).all()


@BACKWARDS
def test_nothing_waits_for_the_device(backward: Backward, no_sync: Any) -> None:
    args = problem(300, 256, 4_096, torch.bfloat16)
    args["banned_ids"] = torch.zeros(4_096, dtype=torch.bool, device="cuda")
    with no_sync():
        call(args, backward=backward)


def test_nothing_recompiles_for_another_length() -> None:
    kernels = (linear_tiles._forward_kernel, linear_tiles._merge_kernel, linear_gradient._dlogits_kernel)
    counts = []
    for num_rows in (2, 3, 16, 100, 500):
        call(problem(num_rows, 256, 4_096, torch.bfloat16))
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(count == counts[0] for count in counts), counts
