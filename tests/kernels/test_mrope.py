"""mrope: against a loop over complex numbers, finite differences, and the properties of a rotation."""

import cmath
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.mrope import mrope, mrope_ref, mrope_tables, mrope_triton

# On a CPU the public op is C++ for float32, and the reference for other dtypes.
ALL = pytest.mark.parametrize("run", [mrope_ref, mrope, mrope_triton], ids=["ref", "native", "triton"])
FAST = pytest.mark.parametrize("run", [mrope, mrope_triton], ids=["native", "triton"])
Run = Callable[..., Tensor]

# tokens, heads, D: one pair; a half that is no power of two; more heads than a program takes; many tokens; none.
SHAPES = [(1, 1, 2), (5, 3, 24), (3, 21, 128), (11, 2, 8), (0, 2, 4)]


def frequencies(dim: int) -> Tensor:
    return 1e4 ** -(torch.arange(dim // 2) / (dim // 2))


def oracle(heads: Tensor, positions: Tensor, sections: tuple[int, ...]) -> Tensor:
    """Pair by pair: (a + ib) e^(i p f), p the position of the section the pair is in."""
    out = torch.empty(heads.shape, dtype=torch.float64)
    half = heads.shape[2] // 2
    rows = [row for row, count in enumerate(sections) for _ in range(count)]
    for token in range(len(heads)):
        for pair, frequency in enumerate(frequencies(2 * half).tolist()):
            turn = cmath.exp(1j * positions[rows[pair], token].item() * frequency)
            for head in range(heads.shape[1]):
                turned = complex(heads[token, head, pair], heads[token, head, pair + half]) * turn
                out[token, head, pair], out[token, head, pair + half] = turned.real, turned.imag
    return out


def problem(
    tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """(heads, positions, sections)."""
    time = dim // 8
    rows = (dim // 2 - time) // 2
    return (
        torch.randn(tokens, heads, dim).to(dtype),
        torch.randint(0, 300, (3, tokens)),
        (time, rows, dim // 2 - time - rows),
    )


def with_grad(run: Run, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    heads = heads.detach().requires_grad_()
    out = run(heads, cos, sin)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(upstream)
    assert heads.grad is not None
    return out.detach(), heads.grad


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:], ids=str)
def test_the_reference_against_the_loop(shape: tuple[int, int, int]) -> None:
    heads, positions, sections = problem(*shape, dtype=torch.float64)
    tables = mrope_tables(positions, frequencies(shape[2]).double(), sections)
    torch.testing.assert_close(mrope_ref(heads, *tables), oracle(heads, positions, sections), atol=1e-12, rtol=1e-12)


def test_gradient_of_the_reference() -> None:
    heads, positions, sections = problem(3, 2, 8, torch.float64)
    tables = mrope_tables(positions, frequencies(8).double(), sections)
    assert torch.autograd.gradcheck(lambda x: mrope_ref(x, *tables), heads.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FAST
def test_against_float64(run: Run, shape: tuple[int, int, int], dtype: torch.dtype, tolerances: dict) -> None:
    heads, positions, sections = problem(*shape, dtype=dtype)
    tables = mrope_tables(positions, frequencies(shape[2]), sections)
    exact = with_grad(mrope_ref, heads.double(), *(table.double() for table in tables))
    got = with_grad(run, heads, *tables)
    atol, rtol = tolerances["grad", dtype]
    atol = max(atol, 2e-3) if dtype == torch.float16 else atol  # half a unit in the last place of numbers up to 4
    for one, wanted in zip(got, exact, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        torch.testing.assert_close(one.double(), wanted, atol=atol, rtol=rtol)
    with torch.no_grad():
        assert torch.equal(run(heads, *tables), got[0])


def test_the_bits_of_the_reference_are_those_of_the_plain_expression() -> None:
    """Trained weights depend on them."""
    heads, positions, sections = problem(30, 8, 32)
    cos, sin = mrope_tables(positions, frequencies(32), sections)
    a, b = heads.chunk(2, -1)
    plain = torch.cat(((a * cos).addcmul(b, sin, value=-1), (b * cos).addcmul(a, sin)), -1)
    assert torch.equal(mrope_ref(heads, cos, sin), plain)


@ALL
def test_half_precision_is_rounded_once(run: Run) -> None:
    """Turned in float32 and then rounded; the interpreter cannot round to bfloat16."""
    dtype = torch.float16 if run is mrope_triton else torch.bfloat16
    heads, positions, sections = problem(20, 3, 16, dtype)
    tables = mrope_tables(positions, frequencies(16), sections)
    out, grad = with_grad(run, heads, *tables)
    assert out.dtype == grad.dtype == dtype
    assert torch.equal(out, run(heads.float(), *tables).to(dtype))


def test_float64_heads_are_not_narrowed_by_float32_tables() -> None:
    heads, positions, sections = problem(4, 2, 8, torch.float64)
    cos, sin = mrope_tables(positions, frequencies(8), sections)
    assert torch.equal(mrope_ref(heads, cos, sin), mrope_ref(heads, cos.double(), sin.double()))


@ALL
def test_heads_are_read_where_they_lie(run: Run) -> None:
    """Queries and keys in front of the values, every other token, heads last: no layout changes a bit."""
    fused, positions, sections = problem(8, 6, 12)
    cos, sin = mrope_tables(positions, frequencies(12), sections)
    every_other = fused[::2], cos[::2], sin[::2]
    for heads, *tables in (
        (fused[:, :4], cos, sin),
        every_other,
        (fused.transpose(1, 2).contiguous().transpose(1, 2), cos, sin),
    ):
        got, wanted = with_grad(run, heads, *tables), with_grad(run, heads.contiguous(), *tables)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@ALL
def test_it_is_a_rotation(run: Run) -> None:
    """Turning back gives the heads again; q k^T depends on the difference of positions alone."""
    heads, positions, sections = problem(6, 4, 32, torch.float32)
    cos, sin = mrope_tables(positions, frequencies(32), sections)
    torch.testing.assert_close(run(run(heads, cos, sin), cos, -sin), heads, atol=2e-6, rtol=1e-5)
    later = mrope_tables(positions + 100, frequencies(32), sections)
    scores = [
        torch.einsum("qnd,knd->nqk", turned[:, :2], turned[:, 2:])
        for turned in (run(heads, cos, sin), run(heads, *later))
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=2e-3, rtol=1e-4)  # angles of 400 rad are good to 3e-5


def test_one_section_and_equal_positions_are_plain_rope() -> None:
    positions = torch.randint(0, 10_000, (1, 9))
    plain = mrope_tables(positions, frequencies(16))
    one = mrope_tables(positions, frequencies(16), (8,))
    text = mrope_tables(positions.expand(3, -1), frequencies(16), (2, 3, 3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, one, text, strict=True))


@FAST
def test_a_token_does_not_know_its_batch(run: Run) -> None:
    """Bitwise, result and gradient; and NaN stays in its token."""
    heads, positions, sections = problem(7, 5, 24)
    cos, sin = mrope_tables(positions, frequencies(24), sections)
    upstream = torch.randn(7, 5, 24)

    def both(at: slice) -> tuple[Tensor, Tensor]:
        x = heads[at].clone().requires_grad_()
        out = run(x, cos[at], sin[at])
        out.backward(upstream[at])
        assert x.grad is not None
        return out.detach(), x.grad

    whole = both(slice(None))
    for token in (0, 3, 6):
        alone = both(slice(token, token + 1))
        assert all(torch.equal(a[0], b[token]) for a, b in zip(alone, whole, strict=True))
    heads[2] = torch.nan
    others = torch.arange(7) != 2
    assert torch.equal(both(slice(None))[0][others], whole[0][others])


def test_in_cpp_threads_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, positions, sections = problem(900, 3, 64)
    tables = mrope_tables(positions, frequencies(64), sections)
    one = with_grad(mrope, heads, *tables)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, with_grad(mrope, heads, *tables), strict=True))


def test_the_public_op_is_the_reference_in_bfloat16_on_a_cpu() -> None:
    heads, positions, sections = problem(3, 2, 8, torch.bfloat16)
    tables = mrope_tables(positions, frequencies(8), sections)
    assert torch.equal(mrope(heads, *tables), mrope_ref(heads, *tables))


GOOD = {"heads": torch.ones(3, 2, 8), "cos": torch.ones(3, 1, 4), "sin": torch.ones(3, 1, 4)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"heads": torch.ones(3, 8)}, r"heads must have shape \[any, any, any\], got \[3, 8\]"),
    "odd": ({"heads": torch.ones(3, 2, 7)}, r"heads must have an even last dimension, .* got \[3, 2, 7\]"),
    "type": ({"heads": torch.ones(3, 2, 8).int()}, "heads must be torch.float32 or .*, got torch.int32"),
    "cos shape": ({"cos": torch.ones(3, 4)}, r"cos must have shape \[3, 1, 4\], got \[3, 4\]"),
    "cos type": ({"cos": torch.ones(3, 1, 4).half()}, "cos must be torch.float32.*, got torch.float16"),
    "sin shape": ({"sin": torch.ones(2, 1, 4)}, r"sin must have shape \[3, 1, 4\], got \[2, 1, 4\]"),
    "sin type": ({"sin": torch.ones(3, 1, 4).double()}, "sin must be torch.float32, got torch.float64"),
    "device": ({"cos": torch.ones(3, 1, 4, device="meta")}, "cos is on meta, the other arguments on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**(GOOD | change))


def test_triton_takes_no_float64() -> None:
    with pytest.raises(ValueError, match=r"heads must be torch.float32 or .*, got torch.float64"):
        mrope_triton(**(GOOD | {"heads": GOOD["heads"].double()}))
    with pytest.raises(ValueError, match=r"cos must be torch\.float32, got torch\.float64"):
        mrope_triton(**{name: tensor.double() if name != "heads" else tensor for name, tensor in GOOD.items()})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(3, 5), torch.ones(4), None), "positions must be torch.int64, got torch.float32"),
        ((torch.ones(5).long(), torch.ones(4), None), r"positions must have shape \[any, any\], got \[5\]"),
        ((torch.ones(0, 5).long(), torch.ones(4), None), "positions must have at least one row"),
        ((torch.ones(3, 5).long(), torch.ones(4).half(), None), "frequencies must be torch.float32"),
        ((torch.ones(3, 5).long(), torch.ones(4), (1, 1, 1)), r"add up to the 4 frequencies, got \(1, 1, 1\)"),
        ((torch.ones(3, 5).long(), torch.ones(4), (2, 2)), "one count for each of the 3 rows of positions"),
        ((torch.ones(3, 5).long(), torch.ones(4), (5, 0, -1)), r"got \(5, 0, -1\)"),
    ],
)
def test_bad_tables(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_tables(*args)
