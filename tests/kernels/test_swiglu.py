"""swiglu: the reference against a loop and finite differences, C++ and Triton against it, fused and apart."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thyme.kernels import swiglu as swiglu_module
from thyme.kernels.swiglu import swiglu, swiglu_ref, swiglu_triton

# On a CPU the public op is C++ for float32, and the reference for other dtypes.
ALL = pytest.mark.parametrize("run", [swiglu_ref, swiglu, swiglu_triton], ids=["ref", "native", "triton"])
FAST = pytest.mark.parametrize("run", [swiglu, swiglu_triton], ids=["native", "triton"])
Run = Callable[..., Tensor]

# Rows of gate and up together: one number each, odd widths, more than one block, none.
SHAPES = [(1, 2), (5, 66), (2, 3, 14), (2, 2 * 1100), (0, 6)]


def oracle(gate_up: Tensor) -> Tensor:
    """Number by number."""
    rows, width = gate_up.reshape(-1, gate_up.shape[-1]).tolist(), gate_up.shape[-1] // 2
    out = [[row[i] / (1 + math.exp(-row[i])) * row[width + i] for i in range(width)] for row in rows]
    return torch.tensor(out, dtype=torch.float64).view(*gate_up.shape[:-1], width)


def with_grads(run: Run, *tensors: Tensor) -> list[Tensor]:
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = run(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(upstream)
    return [out.detach(), *(tensor.grad for tensor in tensors)]  # type: ignore[misc]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_against_the_loop(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64) * 4
    torch.testing.assert_close(swiglu_ref(x), oracle(x), atol=1e-13, rtol=1e-13)


def test_gradients_of_the_reference() -> None:
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_ref, x)
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(swiglu_ref, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FAST
def test_against_float64(run: Run, shape: tuple[int, ...], dtype: torch.dtype, tolerances: dict) -> None:
    x = (torch.randn(*shape) * 3).to(dtype)
    atol, rtol = tolerances["grad", dtype]
    exact = with_grads(swiglu_ref, x.double())
    got = with_grads(run, x)
    for one, wanted in zip(got, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), wanted, atol=max(atol, 2e-6), rtol=rtol)
    with torch.no_grad():
        assert torch.equal(run(x), got[0])


@FAST
def test_fused_or_apart_in_any_layout_the_bits_are_the_same(run: Run) -> None:
    x = torch.randn(2, 3, 20)
    out, grad = with_grads(run, x)
    wide = torch.zeros(2, 3, 50)
    wide[..., 4:24] = x
    layouts = (
        x.chunk(2, -1),
        wide[..., 4:24].chunk(2, -1),
        x.transpose(0, 2).contiguous().transpose(0, 2).chunk(2, -1),
    )
    for gate, up in layouts:
        apart, grad_gate, grad_up = with_grads(run, gate, up)
        assert torch.equal(apart, out)
        assert torch.equal(torch.cat((grad_gate, grad_up), -1), grad)
    assert all(torch.equal(a, b) for a, b in zip(with_grads(run, wide[..., 4:24]), (out, grad), strict=True))


def test_the_bits_of_the_reference_are_those_of_the_plain_expression() -> None:
    """Trained weights depend on them; in bfloat16 silu is rounded before it is multiplied, as transformers' MLPs do."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(40, 96).to(dtype)
        gate, up = x.chunk(2, -1)
        assert torch.equal(swiglu_ref(x), torch.nn.functional.silu(gate) * up)


def test_triton_rounds_silu_before_it_multiplies() -> None:
    x = (torch.randn(64, 256) * 3).half()
    gate, up = x.chunk(2, -1)
    once = (torch.nn.functional.silu(gate.float()) * up.float()).half()
    with torch.no_grad():
        ours, wanted = swiglu_triton(x), swiglu_ref(x)
    assert (ours != wanted).float().mean() < 1e-2  # the exponential may differ in the last bit of float32
    assert (once != wanted).float().mean() > 0.1


@FAST
def test_a_row_does_not_know_its_batch(run: Run) -> None:
    """Bitwise, result and gradient; and NaN stays in its row."""
    x, upstream = torch.randn(9, 60), torch.randn(9, 30)

    def both(x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = run(x)
        out.backward(upstream)
        assert x.grad is not None
        return out.detach(), x.grad

    whole = both(x, upstream)
    for row in (0, 4, 8):
        alone = both(x[row : row + 1], upstream[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
    x[3] = torch.nan
    poisoned = both(x, upstream)
    others = torch.arange(9) != 3
    assert all(torch.equal(a[others], b[others]) and a[3].isnan().all() for a, b in zip(poisoned, whole, strict=True))


@ALL
def test_extremes(run: Run) -> None:
    """Gates of +-80: silu is the gate or 0, its slope 1 or 0."""
    gate, up = torch.tensor([[80.0, -80.0, 0.0]]), torch.tensor([[2.0, 3.0, 5.0]])
    out, grad_gate, grad_up = with_grads(run, gate, up)
    upstream = torch.randn((1, 3), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(out, torch.tensor([[160.0, 0.0, 0.0]]))
    torch.testing.assert_close(grad_gate, upstream * torch.tensor([[2.0, 0.0, 2.5]]))
    torch.testing.assert_close(grad_up, upstream * torch.tensor([[80.0, 0.0, 0.0]]))


def test_in_cpp_threads_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(900, 260)
    one = with_grads(swiglu, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, with_grads(swiglu, x), strict=True))


def test_the_public_op_is_the_reference_in_bfloat16_on_a_cpu() -> None:
    x = torch.randn(3, 18).bfloat16()
    assert torch.equal(swiglu(x), swiglu_ref(x))
    assert torch.equal(swiglu(*x.chunk(2, -1)), swiglu_ref(x))


@ALL
def test_bad_arguments(run: Run) -> None:
    gate = torch.ones(2, 8)
    for args, message in (
        ((torch.ones(2, 7),), "gate holds gate and up side by side when up is None, but 7 columns are odd"),
        ((torch.tensor(1.0),), "gate must have at least one dimension, got a scalar"),
        ((gate.int(),), "gate must be torch.float32 or .*, got torch.int32"),
        ((gate, torch.ones(1, 8)), r"up must have shape \[2, 8\], got \[1, 8\]"),
        ((gate, gate.half()), "up must be torch.float32, got torch.float16"),
        ((gate, torch.ones(2, 8, device="meta")), "up is on meta, the other arguments on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*args)


def test_triton_takes_no_float64() -> None:
    with pytest.raises(ValueError, match=r"gate must be torch.float32 or .*, got torch.float64"):
        swiglu_triton(torch.ones(2, 8).double())


@pytest.mark.parametrize(
    ("width", "start", "dtype", "bytes"),
    [
        (18_944, 0, torch.bfloat16, 16),
        (3_420, 0, torch.bfloat16, 8),  # of the vision tower: its halves begin 6,840 bytes apart
        (3_420, 0, torch.float32, 16),
        (3_420, 2, torch.bfloat16, 4),
        (7, 0, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_what_may_be_loaded_at_once(width: int, start: int, dtype: torch.dtype, bytes: int) -> None:
    """On a GPU a load of more raises an error, and of less takes longer; the interpreter sees neither."""
    room = torch.empty(start + 6 * width, dtype=dtype)
    assert swiglu_module._alignment(*room[start:].view(3, 2 * width).chunk(2, -1)) == bytes
