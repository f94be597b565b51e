"""The small layers in C++ in bfloat16 on a CPU: rounded where the references round, row by row; their gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.kv_cache import mrope_write_kv, mrope_write_kv_ref
from thyme.kernels.mrope import mrope, mrope_ref
from thyme.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref
from thyme.kernels.swiglu import swiglu, swiglu_ref

WIDTHS = [2, 48, 80, 512, 1408]
BF16 = torch.bfloat16


def assert_within_a_step(out: Tensor, expected: Tensor, share: float) -> None:
    """Neighbours in bfloat16 at most, and that in no more than this share: a sum in another order falls on the other
    side of a tie now and then."""
    assert out.dtype == expected.dtype == BF16
    torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-6)
    assert (out != expected).float().mean() <= share


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    turn = torch.rand(tokens, 1, half) * 6.3
    return turn.cos(), turn.sin()


@pytest.mark.parametrize("width", WIDTHS)
def test_as_the_references(width: int) -> None:
    x, residual = torch.randn(2, 37, width).to(BF16)
    weight = torch.randn(width).to(BF16)
    assert_within_a_step(rmsnorm(x, weight, 1e-6), rmsnorm_ref(x, weight, 1e-6), 0.02)
    for out, expected in zip(
        add_rmsnorm(x, residual, weight, 1e-6), add_rmsnorm_ref(x, residual, weight, 1e-6), strict=True
    ):
        assert_within_a_step(out, expected, 0.02)
    assert_within_a_step(swiglu(4 * x, residual), swiglu_ref(4 * x, residual), 0.02)
    assert_within_a_step(swiglu(4 * x), swiglu_ref(4 * x), 0.02)
    tables = angles(37, width // 2)
    heads = torch.randn(37, 5, width).to(BF16)[:, 1:4]
    assert_within_a_step(mrope(heads, *tables), mrope_ref(heads, *tables), 0.02)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: rmsnorm(x, torch.ones(512, dtype=BF16), 1e-6),
        lambda x: add_rmsnorm(x, x.flip(1), torch.ones(512, dtype=BF16), 1e-6)[0],
        swiglu,
        lambda x: mrope(x.view(-1, 4, 128), torch.ones(len(x), 1, 64), torch.ones(len(x), 1, 64) / 3),
    ],
    ids=["rmsnorm", "add_rmsnorm", "swiglu", "mrope"],
)
def test_a_row_does_not_know_its_neighbours(run: Callable[[Tensor], Tensor]) -> None:
    """Nor the threads, nor whether a gradient will be asked for."""
    x = torch.randn(400, 512).to(BF16)
    with torch.no_grad():
        whole = run(x)
        for first, last in ((0, 1), (7, 8), (3, 300)):
            assert torch.equal(run(x[first:last]), whole[first:last])
        torch.set_num_threads(2)
        try:
            assert torch.equal(run(x), whole)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(run(x.clone().requires_grad_()).detach(), whole)


def test_gradients_are_those_of_the_references() -> None:
    x, residual = torch.randn(2, 9, 64).to(BF16)
    weight = torch.randn(64).to(BF16)
    tables = angles(9, 16)

    def gradients(
        norm: Callable[..., Tensor], gate: Callable[..., Tensor], turn: Callable[..., Tensor]
    ) -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in (x, residual, weight)]
        a, b, w = leaves
        y, stream = norm(a, b, w, 1e-6)
        (gate(y).sum() + turn(stream.view(9, 2, 32), *tables).sum()).backward()
        return [leaf.grad.float() for leaf in leaves]

    ours = gradients(add_rmsnorm, swiglu, mrope)
    theirs = gradients(add_rmsnorm_ref, swiglu_ref, mrope_ref)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
def test_keys_and_values_are_written_where_they_belong(dtype: torch.dtype) -> None:
    qkv = torch.randn(6, 8, 12).to(dtype)
    cos, sin = angles(6, 6)
    slots = torch.tensor([5, -1, 0, 7, 3, -1])
    caches = [torch.full((2, 4, 2, 12), 9.0, dtype=dtype) for _ in range(4)]
    q = mrope_write_kv(qkv, cos, sin, *caches[:2], slots)
    expected = mrope_write_kv_ref(qkv, cos, sin, *caches[2:], slots)
    torch.testing.assert_close(q, expected)
    for written, wanted in zip(caches[:2], caches[2:], strict=True):
        torch.testing.assert_close(written, wanted)
        assert (written.flatten(0, 1)[[1, 2, 4, 6]] == 9.0).all()


@pytest.mark.parametrize(
    ("rows", "slots", "message"),
    [
        (np.zeros((2, 3), np.int16), [0, 4], r"slots\[1\] is 4, there are 4"),
        (np.zeros((2, 3), np.int16), [-2, 0], r"slots\[0\] is -2"),
        (np.zeros((2, 2), np.int16), [0, 1], "table must have the shape"),
        (np.zeros((2, 3), np.int16), [0], "slots must have the shape"),
        (np.zeros((2, 6), np.int16)[:, ::2], [0, 1], "must be dense"),
        (np.zeros(3, np.int16), [0], "rows and table"),
    ],
)
def test_slots_that_do_not_fit(rows: np.ndarray, slots: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.write_slots(rows, np.array(slots), np.zeros((4, 3), np.int16))
