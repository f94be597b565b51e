"""token_logprobs: against float64, and properties that need no reference; in torch, in C++ and in Triton."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_ref, token_logprobs_triton

# On a CPU the public op is the C++ for float32, and the reference for the other dtypes.
ROWS = pytest.mark.parametrize(
    "row_pass", [token_logprobs_ref, token_logprobs, token_logprobs_triton], ids=["ref", "native", "triton"]
)
RowPass = Callable[..., tuple[Tensor, Tensor]]


def problem(num_rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """logits, targets, and four temperatures, padding and bans."""
    logits = (torch.randn(num_rows, vocab, dtype=torch.float64) * 2).to(dtype)
    return (
        logits,
        torch.randint(3, vocab - 45, (num_rows,)),
        {
            "temperature": torch.tensor([1.0, 0.0, 1.6, 1.0, 0.7])[torch.arange(num_rows) % 5],
            "vocab_size": vocab - 40,
            "banned_ids": (2, vocab - 45),
        },
    )


def close(got: Tensor, exact: Tensor, what: str, tolerances: dict) -> None:
    atol, rtol = tolerances[what, got.dtype]
    torch.testing.assert_close(got.double(), exact, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ROWS
def test_token_logprobs_against_float64(row_pass: RowPass, dtype: torch.dtype, tolerances: dict) -> None:
    logits, targets, more = problem(9, 1000, dtype)
    logprob, entropy = row_pass(logits, targets, **more)
    exact_logprob, exact_entropy = token_logprobs_ref(logits.double(), targets, **more)
    for got, exact, what in ((logprob, exact_logprob, "logprob"), (entropy, exact_entropy, "entropy")):
        atol, rtol = tolerances[what, dtype]
        torch.testing.assert_close(got.double(), exact, atol=atol, rtol=rtol)


def test_gradcheck() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    more = {
        "temperature": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
        "mask": torch.tensor([True, True, True, True, False]),
        "vocab_size": 6,
        "banned_ids": (0,),
    }
    targets = torch.tensor([1, 5, 2, 3, 99])
    assert torch.autograd.gradcheck(lambda z: token_logprobs_ref(z, targets, **more), logits)


def test_sft_is_cross_entropy() -> None:
    logits = torch.randn(20, 50, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (20,))
    (ours,) = torch.autograd.grad(-token_logprobs_ref(logits, targets)[0].mean(), logits)
    (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), logits)
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-12)


@ROWS
def test_adding_a_constant_to_a_row_changes_nothing(row_pass: RowPass) -> None:
    """Bitwise where the sum is exact; this is what padding columns counted as zeros would break."""
    logits = (torch.randn(5, 163) * 4).round() / 4
    targets, temperature = torch.arange(5), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    grads = []
    for shift in (0.0, -512.0, 4096.0):
        z = (logits + shift).requires_grad_()
        logprob, entropy = row_pass(z, targets, temperature=temperature, vocab_size=150)
        (logprob.sum() + entropy.sum()).backward()
        grads.append((logprob.detach(), entropy.detach(), z.grad))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@ROWS
def test_minus_infinity_is_probability_zero(row_pass: RowPass) -> None:
    logits = torch.randn(4, 40)
    logits[:, ::3] = -torch.inf
    kept = logits[0] > -torch.inf
    z = logits.clone().requires_grad_()
    targets, temperature = torch.tensor([1, 2, 4, 5]), torch.tensor([1.0, 0.3, 3.0, 0.0])
    logprob, entropy = row_pass(z, targets, temperature=temperature)
    (logprob.sum() + entropy.sum()).backward()
    alone = logits[:, kept].clone().requires_grad_()
    at = torch.tensor([kept[:t].sum().item() for t in targets])
    logprob_alone, entropy_alone = token_logprobs_ref(alone, at, temperature=temperature)
    (logprob_alone.sum() + entropy_alone.sum()).backward()
    torch.testing.assert_close(logprob, logprob_alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy, entropy_alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(z.grad[:, kept], alone.grad, atol=2e-6, rtol=0)
    assert (z.grad[:, ~kept] == 0).all()
    assert row_pass(logits, torch.tensor([0, 2, 4, 5]), temperature=temperature)[0][0] == -torch.inf


@ROWS
def test_temperature_divides_the_logits(row_pass: RowPass) -> None:
    logits, targets = torch.randn(6, 90), torch.arange(6)
    temperature = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    divided = row_pass(logits / temperature[:, None], targets)[0]
    torch.testing.assert_close(row_pass(logits, targets, temperature=temperature)[0], divided, atol=2e-6, rtol=0)


@ROWS
def test_a_row_does_not_know_its_batch(row_pass: RowPass) -> None:
    logits, targets, more = problem(8, 700, torch.float32)

    def rows(at: slice) -> list[Tensor]:
        z = logits[at].clone().requires_grad_()
        outs = row_pass(z, targets[at], **more | {"temperature": more["temperature"][at]})
        sum(out.sum() for out in outs).backward()
        return [*(out.detach() for out in outs), z.grad]

    whole = rows(slice(None))
    for row in range(8):
        for a, b in zip(whole, rows(slice(row, row + 1)), strict=True):
            assert torch.equal(a[row], b[0])


@pytest.mark.parametrize("row_pass", [token_logprobs_ref, token_logprobs], ids=["ref", "native"])
def test_a_row_does_not_know_the_threads(row_pass: RowPass) -> None:
    """On one thread, on two, and alone on two, where torch would split the sum of the one row."""
    logits, targets = torch.randn(24, 40_000), torch.arange(24)

    def rows(at: slice) -> list[Tensor]:
        z = logits[at].clone().requires_grad_()
        outs = row_pass(z, targets[at], temperature=torch.full((24,), 0.7)[at])
        sum(out.sum() for out in outs).backward()
        return [*(out.detach() for out in outs), z.grad]

    one = rows(slice(None))
    torch.set_num_threads(2)
    try:
        two = rows(slice(None))
        alone = [rows(slice(row, row + 1)) for row in range(24)]
    finally:
        torch.set_num_threads(1)
    for figure, again, parts in zip(one, two, zip(*alone, strict=True), strict=True):
        assert torch.equal(figure, again)
        assert torch.equal(figure, torch.cat(parts))


@ROWS
def test_slices_of_the_logits_have_the_bits_of_a_copy(row_pass: RowPass) -> None:
    """Wherever they begin: on a GPU a block is read narrow where it cannot be read wide, and summed the same."""
    room = torch.randn(5, 2_400).bfloat16()
    for view in (room[1:, :2_399], room[:, 1:], room[2:, 3:2_200]):
        results = []
        for z in (view, view.contiguous()):
            z = z.detach().requires_grad_()
            logprob, entropy = row_pass(z, torch.arange(len(z)))
            (logprob.sum() + entropy.sum()).backward()
            results.append((logprob.detach(), entropy.detach(), z.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@ROWS
def test_no_logprob_exceeds_0(row_pass: RowPass) -> None:
    """Where one id has all of the mass: x is exactly 0 there, however large the logits are."""
    logits = torch.randn(6, 3_000)
    logits[:, 7] = torch.tensor([20.0, 21.3, 30.7, 1e4, 99.9, 3e4])
    temperature = torch.tensor([1.0, 0.3, 0.7, 1.0, 1.3, 0.1])
    logprob, entropy = row_pass(logits, torch.full((6,), 7), temperature=temperature)
    assert (logprob <= 0).all()
    assert (logprob[2:] > -1e-6).all()
    assert (entropy >= 0).all()


@ROWS
def test_masked_rows_have_no_gradient_whatever_is_asked(row_pass: RowPass) -> None:
    """The caller sums over all rows, masked ones too: those return 0.0 and are neither read nor trained."""
    logits = torch.randn(6, 50)
    mask = torch.tensor([True, False, True, True, False, True])
    logits[~mask] = torch.nan
    z = logits.requires_grad_()
    logprob, entropy = row_pass(z, torch.full((6,), 3), mask=mask)
    (logprob.sum() + 2 * entropy.sum()).backward()
    assert (logprob[~mask] == 0).all()
    assert (entropy[~mask] == 0).all()
    assert (z.grad[~mask] == 0).all()
    assert (z.grad[mask] != 0).any(-1).all()


@ROWS
def test_the_largest_logit_in_any_block(row_pass: RowPass, tolerances: dict) -> None:
    """Rising, falling and peaked rows over three blocks of 8192: what was summed so far is rescaled right."""
    ramp = torch.linspace(-6, 6, 20_000, dtype=torch.float64)
    logits = torch.stack([ramp, -ramp, 6 - ramp.abs() * 2]) + torch.randn(3, 20_000)
    targets, temperature = torch.tensor([19_999, 0, 10_000]), torch.tensor([1.0, 0.5, 2.0])
    results = []
    for run, z in ((row_pass, logits.float()), (token_logprobs_ref, logits.float().double())):
        z = z.requires_grad_()
        logprob, entropy = run(z, targets, temperature=temperature)
        (logprob.sum() + entropy.sum()).backward()
        results.append((logprob.detach(), entropy.detach(), z.grad))
    for got, exact, what in zip(*results, ("logprob", "entropy", "grad"), strict=True):
        close(got, exact, what, tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ROWS
def test_a_second_backward_gives_the_same(row_pass: RowPass, dtype: torch.dtype, tolerances: dict) -> None:
    """The first one may turn what the forward kept into the gradient; it must not hand that out twice."""
    logits, targets, more = problem(9, 150, dtype)
    logits.requires_grad_()
    logprob, entropy = row_pass(logits, targets, mask=torch.arange(9) % 4 != 3, **more)
    total = logprob.sum() + 0.1 * entropy.sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, kept)
    close(second, kept.double(), "grad", tolerances)


def test_the_native_pass_takes_rows_as_they_lie() -> None:
    """Strided along rows or columns, wherever in memory they begin, and none at all: bit for bit the dense ones."""
    logits, targets, more = problem(6, 163, torch.float32)

    def rows(z: Tensor) -> list[Tensor]:
        z = z.detach().requires_grad_()
        outs = token_logprobs(z, targets[: len(z)], **more | {"temperature": more["temperature"][: len(z)]})
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs[0].sum() - outs[1].sum(), z)]

    dense = rows(logits)
    room = torch.full((6, 500), torch.nan)
    for view in (room[:, 7 : 7 + 163], room[:, 1::3][:, :163], room.flatten()[5:].as_strided((6, 163), (163, 1))):
        view.copy_(logits)
        for a, b in zip(rows(view), dense, strict=True):
            assert torch.equal(a, b)
    assert [x.shape for x in rows(logits[:0])] == [(0,), (0,), (0, 163)]


def test_the_native_exponential_is_good_to_the_last_bits() -> None:
    """Its error shows in the gradient at -p: two ulp over all that float32 holds, 0 below it."""
    x = torch.linspace(-110.0, 0.0, 5000)
    z = x.clone()[None].requires_grad_()
    token_logprobs(z, torch.tensor([4999]))[0].backward()
    p = x.double().softmax(-1)
    assert z.grad is not None
    error = (z.grad[0, :-1].double() / -p[:-1] - 1).abs()
    # exp(x - log_total) has the rounding of that difference too, half an ulp of x.
    assert (error <= 3e-7 + x[:-1].abs().double() * 6e-8)[p[:-1] > 1e-37].all()
    assert (z.grad[0, x < -100] == 0).all()


@ROWS
def test_ids_that_do_not_count_have_no_gradient(row_pass: RowPass) -> None:
    logits, targets, more = problem(7, 90, torch.float32)
    logits[:, [2, 45]] = torch.nan
    logits[:, 50:] = torch.inf
    z = logits.requires_grad_()
    logprob, entropy = row_pass(z, targets, **more)
    (logprob.sum() + entropy.sum()).backward()
    assert z.grad is not None
    assert (z.grad[:, [2, 45, *range(50, 90)]] == 0).all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("row_pass", [token_logprobs_ref, token_logprobs], ids=["ref", "native"])
def test_nan_and_infinity_are_not_hidden(row_pass: RowPass) -> None:
    logits = torch.randn(4, 40)
    logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logprob, entropy = row_pass(logits, torch.zeros(4, dtype=torch.int64))
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [True, True, True, False]


ROW, VECTOR = np.zeros((3, 8), np.float32), np.zeros(3, np.float32)
FORWARD: dict[str, Any] = {"z": ROW, "tau": None, "banned": None, "counted": None}
FORWARD |= {"stats": np.zeros((4, 3), np.float32), "p": None, "num_threads": 1}
GRADIENT: dict[str, Any] = {name: FORWARD[name] for name in ("z", "tau", "banned", "stats", "num_threads")}
GRADIENT |= {"targets": np.zeros(3, np.int64), "g": VECTOR, "h": None, "dz": np.zeros((3, 9), np.float32)}


@pytest.mark.parametrize(
    ("call", "good", "change", "message"),
    [
        (_native.softmax_rows_f32, FORWARD, {"z": ROW[0]}, r"z must be \[rows, vocab_size\]"),
        (_native.softmax_rows_f32, FORWARD, {"z": ROW.T}, "the last dimension of z must be dense"),
        (_native.softmax_rows_f32, FORWARD, {"tau": VECTOR[:2]}, r"tau must have the shape \[3\], got \[2\]"),
        (_native.softmax_rows_f32, FORWARD, {"banned": np.array([8])}, r"banned\[0\] is 8, there are 8 ids"),
        (_native.softmax_rows_f32, FORWARD, {"p": ROW[:, :7]}, r"p must have the shape \[3, 8\], got \[3, 7\]"),
        (_native.softmax_rows_gradient_f32, GRADIENT, {"targets": np.array([0, -1, 0])}, r"targets\[1\] is -1, there"),
        (_native.softmax_rows_gradient_f32, GRADIENT, {"g": VECTOR[:1]}, r"g must have the shape \[3\], got \[1\]"),
        (_native.softmax_rows_gradient_f32, GRADIENT, {"dz": ROW[:, :7]}, "dz must have the rows of z, and no fewer"),
    ],
)
def test_bad_arguments_of_the_native_pass(
    call: Callable[..., None], good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**good | change)
