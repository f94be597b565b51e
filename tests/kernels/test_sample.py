"""sample: against a sort-and-loop oracle, between reference and Triton, and as a source of randomness."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme import _native
from thyme.kernels import row_stats, sample_blocks
from thyme.kernels import sample as sample_module
from thyme.kernels.grpo_loss import grpo_loss, grpo_loss_ref, grpo_loss_triton
from thyme.kernels.row_stats import Tile
from thyme.kernels.sample import SampleOutput, sample, sample_ref, sample_triton, uniform
from thyme.kernels.sample_blocks import draw_blocks
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_ref, token_logprobs_triton

# On a CPU the public op is the C++ for float32, and the reference for the other dtypes.
ALL = pytest.mark.parametrize("run", [sample_ref, sample, sample_triton], ids=["ref", "native", "triton"])
Run = Callable[..., SampleOutput]


def oracle(
    z: Sequence[float], tau: float, u: float, top_k: int, top_p: float, min_p: float
) -> tuple[int, set[int], Any]:
    """One row, plain Python: sort, cut, walk up the cdf. Returns token, kept ids and the four figures."""
    raw = [math.exp(value - max(z)) for value in z]
    e = raw if tau == 0 else [math.exp((value - max(z)) / tau) for value in z]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    kept = order[: top_k or len(z)]
    mass, prefix = sum(e[i] for i in kept), []
    for i in kept:
        if top_p < 1 and sum(e[j] for j in prefix) >= top_p * mass:
            break
        prefix.append(i)
    kept = sorted(i for i in prefix if e[i] >= min_p)
    token, walked = order[0], 0.0
    if tau > 0:
        for token in kept:
            walked += e[token]
            if walked > u * sum(e[i] for i in kept):
                break
    entropy = -sum(p / sum(raw) * math.log(p / sum(raw)) for p in raw if p > 0)
    logprob = 0.0 if tau == 0 else math.log(e[token] / sum(e))
    kept_mass = 1.0 if tau == 0 else sum(e[i] for i in kept) / sum(e)
    return token, set(kept), (logprob, math.log(raw[token] / sum(raw)), entropy, kept_mass)


def problem(rows: int, vocab: int, *, ties: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """logits, temperature, seed, position; with ties every value is one of about a dozen."""
    logits = torch.randn(rows, vocab, dtype=torch.float64) * 2
    logits = logits.mul(2).round().div(2) if ties else logits
    temperature = torch.tensor([1.0, 0.0, 0.4, 1.7])[torch.arange(rows) % 4]
    return logits.to(dtype), temperature, torch.randint(-(2**62), 2**62, (rows,)), torch.arange(rows)


def call(run: Run, args: tuple[Tensor, ...], **more: Any) -> SampleOutput:
    logits, temperature, seed, position = args
    return run(logits, temperature, seed=seed, position=position, **more)


LIMITS = {
    "none": {},
    "k": {"top_k": 5},
    "p": {"top_p": 0.7},
    "min": {"min_p": 0.15},
    "all": {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
    "k1": {"top_k": 1},
    "k past the end": {"top_k": 999},
}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_reference_is_the_sort_oracle(limits: dict[str, Any], ties: bool) -> None:
    args = problem(24, 37, ties=ties)
    out = call(sample_ref, args, **limits)
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    for row, (z, tau, u) in enumerate(
        zip(args[0].tolist(), args[1].double().tolist(), uniform(*args[2:]).tolist(), strict=True)
    ):
        token, _, figures = oracle(z, tau, u, **settings)
        assert out.token[row] == token
        assert [figure[row].item() for figure in out[1:]] == pytest.approx(figures, abs=1e-12)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_triton_keeps_the_same_ids_under_ties(limits: dict[str, Any], tolerances: dict) -> None:
    # Half-integer logits: the edge of every cut falls among ties, whose number shows in kept_mass.
    args = problem(8, 37, ties=True, dtype=torch.float32)
    ours, reference = call(sample_triton, args, **limits), call(sample_ref, args, **limits)
    assert ours.token.tolist() == reference.token.tolist()
    torch.testing.assert_close(ours.kept_mass, reference.kept_mass, atol=1e-6, rtol=0)


# One id; fewer ids than a tile; the toy vocabulary; two tiles, the second with one id; three ragged tiles.
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (70, 163), (5, 4097), (4, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ALL
def test_figures_against_float64(run: Run, rows: int, vocab: int, dtype: torch.dtype, tolerances: dict) -> None:
    args = problem(rows, vocab, dtype=dtype)
    out, exact = call(run, args), call(sample_ref, (args[0].double(), *args[1:]))
    assert out.token.tolist() == exact.token.tolist()
    for name in ("logprob", "logprob_raw", "entropy"):
        atol, rtol = tolerances["entropy" if name == "entropy" else "logprob", dtype]
        got = getattr(out, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), getattr(exact, name), atol=atol, rtol=rtol)
    assert out.kept_mass.tolist() == [1.0] * rows


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """tile(rows, block): what a program takes; a program costs the interpreter the same, however many rows it has.

    Blocks are not padded: that is for the compiler, and a small tile would be read one id of each block at a time. The
    tests of tiles as shipped pad."""

    def tile(rows: int, block: int) -> None:
        monkeypatch.setattr(sample_blocks, "row_tile", lambda size: Tile(rows, block, triton.cdiv(size, block)))
        monkeypatch.setattr(row_stats, "_LEAST_BLOCKS", 1)

    return tile


def test_same_token_from_reference_and_triton_on_4096_rows() -> None:
    args = problem(4096, 61, dtype=torch.float32)
    ours, reference = call(sample_triton, args), call(sample_ref, args)
    # A draw may differ only where u is within rounding of a step of the cdf.
    e = ((args[0] - args[0].amax(-1, keepdim=True)).double() / args[1].double().clamp_min(1e-9)[:, None]).exp()
    distance = (e.cumsum(-1) / e.sum(-1, keepdim=True) - uniform(*args[2:])[:, None]).abs().amin(-1)
    differs = ours.token != reference.token
    assert differs.sum() <= 2
    assert (distance[differs] < 1e-6).all()
    assert reference.token.unique().numel() == 61


@pytest.mark.parametrize("limits", [LIMITS["k"], LIMITS["p"], LIMITS["all"]], ids=["k", "p", "all"])
def test_same_token_truncated(limits: dict[str, Any]) -> None:
    args = problem(128, 61, dtype=torch.float32)
    assert torch.equal(call(sample_triton, args, **limits).token, call(sample_ref, args, **limits).token)


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "limits",
    [pytest.param(LIMITS["k"], marks=SOAK), pytest.param(LIMITS["p"], marks=SOAK), LIMITS["all"]],
    ids=["k", "p", "all"],
)
def test_same_token_truncated_on_4096_rows(limits: dict[str, Any], tile: Callable[[int, int], None]) -> None:
    tile(4096, 64)
    args = problem(4096, 61, dtype=torch.bfloat16)
    ours, reference = call(sample_triton, args, **limits), call(sample_ref, args, **limits)
    differs = (ours.token != reference.token).nonzero().flatten().tolist()
    assert len(differs) <= 2
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    for row in differs:  # only where u is within rounding of a step of the cdf: a little to either side draws both
        z, tau, u = args[0][row].tolist(), args[1].double()[row].item(), uniform(*args[2:])[row].item()
        around = {oracle(z, tau, u + step, **settings)[0] for step in (-1e-6, 1e-6)}
        assert {ours.token[row].item(), reference.token[row].item()} == around
    torch.testing.assert_close(ours.kept_mass, reference.kept_mass, atol=1e-6, rtol=0)


def rows_of_every_kind(vocab: int, dtype: torch.dtype) -> Tensor:
    """What the bins of truncation must not be wrong about, a row each."""
    z = torch.randn(10, vocab) * 3
    z[1] = (z[1] * 2).round() / 2  # ties
    z[2] *= 1e-4  # all in one bin
    z[3] *= 60  # most of it below the last bin
    z[4] = 1.25  # all equal
    z[5] = (z[5] > 1) * 2.0  # two values
    z[6, torch.rand(vocab) < 0.95] = -torch.inf
    z[7] = z[7].sign() * 0.0  # zeros of both signs
    z[8] = -30_000 + z[8] * 100
    z[9, : vocab // 2] = -torch.inf  # blocks without an id
    return z.to(dtype)


def same_kept_set(logits: Tensor, limits: dict[str, Any], tau: float, banned: Any = None) -> None:
    """u = 0 and u = 1 - 2^-53 draw the first and the last id that is kept, and kept_mass weighs all between them."""
    temperature, position = torch.full((len(logits),), tau), torch.zeros(len(logits), dtype=torch.int64)
    for word in (0, 2**53 - 1):
        args = (logits, temperature, torch.full_like(position, seed_for(word)), position)
        ours, reference = (call(run, args, banned_ids=banned, **limits) for run in (sample_triton, sample_ref))
        assert ours.token.tolist() == reference.token.tolist()
        torch.testing.assert_close(ours.kept_mass, reference.kept_mass, atol=2e-6, rtol=0)


CUTS = {
    "k": {"top_k": 50},
    "p": {"top_p": 0.9},
    "min": {"min_p": 0.05},
    "k and p": {"top_k": 90, "top_p": 0.7},
    "all": {"top_k": 120, "top_p": 0.99, "min_p": 0.01},
}


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(0, torch.bfloat16), (1, torch.bfloat16), (3, torch.bfloat16), (7, torch.float32), (8, torch.float32)],
    ids=str,
)
def test_cuts_across_blocks_are_those_of_the_sort(
    kind: int, dtype: torch.dtype, tile: Callable[[int, int], None]
) -> None:
    tile(1, 64)  # two blocks of a toy vocabulary, as 38 of a real one
    logits = rows_of_every_kind(100, dtype)[kind : kind + 1]
    same_kept_set(logits, {"top_k": 20, "top_p": 0.9} if kind not in (0, 8) else {"top_p": 0.7}, 0.8, (2, 64, 99))


EVERY_CUT = [(cut, 0.8, torch.float32) for cut in CUTS]
EVERY_CUT += [(cut, tau, torch.bfloat16) for cut in ("p", "all") for tau in (1e-3, 1e3)]
EVERY_CUT += [("k and p", 0.1, torch.float16)]


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.soak
@pytest.mark.parametrize(("cut", "tau", "dtype"), EVERY_CUT, ids=str)
def test_cuts_across_blocks_of_every_kind_of_row(
    cut: str, tau: float, dtype: torch.dtype, tile: Callable[[int, int], None]
) -> None:
    tile(1, 64)
    same_kept_set(rows_of_every_kind(200, dtype), CUTS[cut], tau, (2, 64, 162))


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.soak
@pytest.mark.parametrize("cut", ["p", "all"])
def test_cuts_across_blocks_as_shipped(cut: str) -> None:
    same_kept_set(rows_of_every_kind(9001, torch.float32), CUTS[cut], 1.0)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many candidates each row had, a list a call."""
    counted = []
    launch = sample_blocks._draw_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*args: Any, **options: Any) -> None:
                counted.append(args[launch.arg_names.index("num_candidates_ptr")].sum(-1).tolist())
                launch[grid](*args, **options)

            return run

    monkeypatch.setattr(sample_blocks, "_draw_kernel", Spy())
    return counted


def rows_as_of_a_model(vocab: int) -> Tensor:
    """A body of ids three nats wide, and a head of ten that stands out by 2 to 14: sure, less sure, torn."""
    body = torch.randn(3, vocab) * 3
    for row, height in enumerate((26.0, 19.0, 15.0)):
        body[row, torch.randperm(vocab)[:10]] = height - torch.arange(10) * (1.2, 0.6, 0.3)[row]
    return body.bfloat16()


def test_the_candidates_are_few(candidates: list[list[int]]) -> None:
    """Of rows as a model makes them: hardly more than are kept, at the shipped tile."""
    vocab = 6_000
    logits = rows_as_of_a_model(vocab)
    args = (logits, torch.ones(3), torch.arange(3), torch.arange(3))
    for limits, most in (
        ({"top_k": 50}, [90, 90, 90]),  # of 94 maxima
        ({"top_p": 0.9}, [2, 6, 12]),
        ({"min_p": 0.1}, [2, 4, 9]),
    ):
        call(sample_triton, args, **limits)
        assert all(number <= limit for number, limit in zip(candidates[-1], most, strict=True)), (limits, candidates)
        assert min(candidates[-1]) >= limits.get("top_k", 1)


def test_a_flat_row_has_all_ids_as_candidates_and_an_exact_cut(
    candidates: list[list[int]], tile: Callable[[int, int], None]
) -> None:
    tile(1, 64)
    args = (torch.zeros(1, 200), torch.ones(1), torch.tensor([seed_for(2**53 - 1)]), torch.zeros(1, dtype=torch.int64))
    out = call(sample_triton, args, top_p=0.25)
    assert candidates == [[200]]
    assert (out.token.item(), out.kept_mass.item()) == (49, 0.25)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(chi-square >= statistic), the regularized upper incomplete gamma function."""
    return torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double()).item()


def check_distribution(tokens: Tensor, p: Tensor, num_tests: int) -> None:
    """Fails with probability 1e-6 over all `num_tests` tests together (Bonferroni), if the sampler is right."""
    observed = torch.bincount(tokens, minlength=len(p)).double()
    expected = p.double() * len(tokens)
    assert (observed[p == 0] == 0).all()
    held = expected > 5
    assert held.sum() >= 3
    statistic = ((observed - expected)[held] ** 2 / expected[held]).sum().item()
    assert chi_square_tail(statistic, int(held.sum()) - 1) > 1e-6 / num_tests


def draws_are_distributed(run: Run, draws: int, limits: dict[str, Any], vary: str) -> None:
    z = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0, 1.4, -3.0, 1.4, 0.9, -0.2])
    tau = 0.8
    # Consecutive seeds at one position, and consecutive positions of one seed, must both look independent.
    moving, fixed = torch.arange(draws), torch.full((draws,), 7)
    seed, position = (moving, fixed) if vary == "seed" else (fixed, moving)
    out = run(z.expand(draws, -1).contiguous(), torch.full((draws,), tau), seed=seed, position=position, **limits)
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    kept = oracle(z.tolist(), tau, 0.0, **settings)[1]
    p = (z / tau).softmax(-1) * torch.tensor([float(i in kept) for i in range(len(z))])
    check_distribution(out.token, p / p.sum(), num_tests=9)


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("limits", [{}, {"top_k": 6, "min_p": 0.02}], ids=["plain", "truncated"])
def test_chi_square(limits: dict[str, Any], vary: str) -> None:
    draws_are_distributed(sample_ref, 1_000_000, limits, vary)


def test_chi_square_triton(tile: Callable[[int, int], None]) -> None:
    tile(4096, 16)
    draws_are_distributed(sample_triton, 10_000, {}, "seed")


@pytest.mark.soak
@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("limits", [{"top_k": 6, "min_p": 0.02}, {"top_p": 0.8}], ids=["top_k, min_p", "top_p"])
def test_chi_square_triton_truncated(limits: dict[str, Any], vary: str, tile: Callable[[int, int], None]) -> None:
    tile(4096, 16)
    draws_are_distributed(sample_triton, 10_000, limits, vary)


MASK = (1 << 64) - 1


def unmix(x: int) -> int:
    """The inverse of SplitMix64's finalizer."""
    x ^= (x >> 31) ^ (x >> 62)
    x = x * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    x ^= (x >> 27) ^ (x >> 54)
    x = x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return x ^ (x >> 30) ^ (x >> 60)


def seed_for(word: int) -> int:
    """The seed whose position 0 draws the 53-bit uniform word * 2^-53."""
    seed = (unmix(unmix(word << 11)) - 0x9E3779B97F4A7C15) & MASK
    return seed - (1 << 64) if seed >> 63 else seed


@ALL
def test_the_ends_of_the_unit_interval(run: Run) -> None:
    """u = 0 and u = 1 - 2^-53 draw the first and the last id of positive probability, whatever surrounds them."""
    ends = torch.tensor([seed_for(0), seed_for(2**53 - 1)])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert uniform(ends, zeros).tolist() == [0.0, 1 - 2.0**-53]
    for vocab, banned in ((9, (0, 8)), (300, (0, 1, 299)), (9001, (0, 4095, 9000))):
        logits = torch.randn(2, vocab)
        logits[:, 1] = logits[:, vocab - 2] = -torch.inf
        # 4-column ends: a banned id outside, a -inf beside it, and the first and last possible draw next to those.
        first = next(i for i in range(vocab) if i not in banned and logits[0, i] > -torch.inf)
        last = next(i for i in reversed(range(vocab)) if i not in banned and logits[0, i] > -torch.inf)
        out = run(logits, torch.ones(2), seed=ends, position=zeros, banned_ids=banned)
        assert out.token.tolist() == [first, last]


@ALL
def test_inverse_cdf_steps(run: Run) -> None:
    """Quarters, so the cdf is exact: the token changes exactly at u = 1/4, 1/2, 3/4, from below to above."""
    words = [2**51, 2**51 - 1, 2**52, 2**52 - 1, 3 * 2**51, 3 * 2**51 - 1, 2**53 - 1]
    seeds = torch.tensor([seed_for(word) for word in words])
    out = run(torch.zeros(7, 4), torch.ones(7), seed=seeds, position=torch.zeros(7, dtype=torch.int64))
    assert out.token.tolist() == [1, 0, 2, 1, 3, 2, 3]


@triton.jit
def _uniform_of(seed_ptr, position_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, sample_blocks._uniform_kernel(tl.load(seed_ptr + at), tl.load(position_ptr + at)))


def test_uniform_is_the_same_bits_in_triton() -> None:
    seed = torch.randint(-(2**63), 2**63 - 1, (256,))
    position = torch.cat([torch.arange(128), torch.randint(-(2**63), 2**63 - 1, (128,))])
    out = torch.empty(256, dtype=torch.float64)
    _uniform_of[(1,)](seed, position, out, BLOCK=256)
    assert torch.equal(out, uniform(seed, position))


def test_uniform_uses_every_bit_of_seed_and_position() -> None:
    flips = torch.tensor([1 << bit if bit < 63 else -(1 << 63) for bit in range(64)])
    base = torch.tensor([123456789])
    for moved in (uniform(base ^ flips, base.expand(64)), uniform(base.expand(64), base ^ flips)):
        assert moved.unique().numel() == 64
        assert (moved != uniform(base, base)).all()
        # Half of the bits flip on average: 53 * 64 coin tosses, six standard deviations wide.
        bits = (moved * 2**53).long() ^ (uniform(base, base) * 2**53).long()
        flipped = sum(bin(value).count("1") for value in bits.tolist())
        assert abs(flipped - 26.5 * 64) < 6 * 0.5 * math.sqrt(53 * 64)


def test_uniform_is_uniform_and_uncorrelated() -> None:
    n = 1 << 18
    counter, fixed = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    for u in (uniform(counter, fixed), uniform(fixed, counter), uniform(counter, counter)):
        check_distribution((u * 1024).long(), torch.full((1024,), 1 / 1024), num_tests=6)
        pairs = (u[:-1] * 32).long() * 32 + (u[1:] * 32).long()
        check_distribution(pairs[::2], torch.full((1024,), 1 / 1024), num_tests=6)


@ALL
def test_greedy_takes_the_lowest_of_equals(run: Run) -> None:
    logits = torch.zeros(3, 9001)
    logits[0, [17, 5000, 9000]] = 2.0
    logits[1, [4096, 8192]] = 1.0  # the first ids of the second and third tile
    out = run(logits, torch.zeros(3), seed=torch.arange(3), position=torch.arange(3))
    assert out.token.tolist() == [17, 4096, 0]
    assert out.logprob.tolist() == [0.0] * 3
    assert out.kept_mass.tolist() == [1.0] * 3
    assert (out.logprob_raw < -5).all()


@ALL
def test_truncation_tells_apart_what_the_distance_to_the_largest_does_not(run: Run) -> None:
    logits = torch.tensor([[1e-9, 2e-9, 16.0]])  # 1e-9 - 16 and 2e-9 - 16 are the same float32
    seeds = torch.tensor([seed_for(0), seed_for(2**53 - 1)])
    zeros = torch.zeros(2, dtype=torch.int64)
    out = run(logits.expand(2, -1).contiguous(), torch.full((2,), 10.0), seed=seeds, position=zeros, top_k=2)
    assert out.token.tolist() == [1, 2]


@ALL
def test_small_temperatures_approach_greedy(run: Run) -> None:
    logits = torch.randn(6, 50)
    temperature = torch.tensor([1e-2, 1e-4, 1e-10, 1e-30, 1e-38, 1e-45])
    out = run(logits, temperature, seed=torch.arange(6), position=torch.arange(6))
    assert out.token[1:].tolist() == logits.argmax(-1)[1:].tolist()
    assert torch.isfinite(torch.stack(out[1:])).all()


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9, "min_p": 0.01}], ids=["plain", "truncated"])
@ALL
def test_a_row_does_not_know_its_batch(run: Run, limits: dict[str, Any]) -> None:
    """Bitwise: alone, in the batch, and in the batch turned around."""
    args = problem(6, 300, dtype=torch.float32)
    whole = call(run, args, **limits)
    turned = call(run, tuple(x.flip(0) for x in args), **limits)
    for row in (2, 3):
        alone = call(run, tuple(x[row : row + 1] for x in args), **limits)
        for a, b, c in zip(whole, turned, alone, strict=True):
            assert a[row] == b[5 - row] == c[0]


def test_the_reference_takes_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(11, 300, ties=True, dtype=torch.bfloat16)
    more = {"top_p": torch.linspace(0.2, 1.0, 11), "vocab_size": 290, "banned_ids": (5, 77)}
    whole = call(sample_ref, args, **more)
    for at_once in (1, 290 * 2, 290 * 5):  # one row, two with one left over, five with one left over
        monkeypatch.setattr(sample_module, "_CPU_ELEMENTS", at_once)
        for figure, again in zip(whole, call(sample_ref, args, **more), strict=True):
            assert torch.equal(figure, again)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({}, [43, 22, 65, 30, 23, 40, 57, 10, 27, 127, 144, 33, 127, 79, 96, 118]),
        (
            {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
            [38, 22, 53, 37, 23, 40, 57, 10, 27, 120, 144, 33, 133, 79, 96, 120],
        ),
    ],
    ids=["plain", "truncated"],
)
@ALL
def test_the_draw_of_a_seed_and_position_never_changes(run: Run, limits: dict[str, Any], tokens: list[int]) -> None:
    """A recorded rollout is replayed from these: whoever changes a token here breaks every record there is."""
    row, column = torch.arange(16), torch.arange(163)
    logits = (column * 37 + row[:, None] * 11) % 64 / 8
    temperature = torch.tensor([1.0, 0.0, 0.6, 1.5])[row // 4]
    seed = torch.tensor([0, 1, 2, -1])[row % 4] * (2**61 + 12345) + row
    position = row * 1_000_003
    words = [2537880150861722, 1132597189581160, 3562920096683282, 1822269048363489]
    assert (uniform(seed, position) * 2**53).long()[:4].tolist() == words
    assert run(logits, temperature, seed=seed, position=position, **limits).token.tolist() == tokens


def test_a_lone_row_has_the_same_bits_under_several_threads() -> None:
    """Torch splits the sum of a lone long row over its threads, which half of the time shows; two rows it does not."""
    args = problem(24, 40_000, dtype=torch.float32)
    torch.set_num_threads(2)
    try:
        whole = call(sample_ref, args)
        alone = [call(sample_ref, tuple(x[row : row + 1] for x in args)) for row in range(24)]
    finally:
        torch.set_num_threads(1)
    for figure, parts in zip(whole, zip(*alone, strict=True), strict=True):
        assert torch.equal(figure, torch.cat(parts))


@ALL
def test_rows_without_a_limit_are_as_if_there_were_none(run: Run) -> None:
    """Off is top_k 0, top_p 1, min_p 0, per row: bitwise the untruncated row, beside rows that are truncated."""
    args = problem(8, 90, dtype=torch.float32)
    off = torch.arange(8) % 2 == 0
    limits = {
        "top_k": torch.where(off, 0, 4),
        "top_p": torch.where(off, 1.0, 0.6),
        "min_p": torch.where(off, 0.0, 0.05),
    }
    plain, limited = call(run, args), call(run, args, **limits)
    for a, b in zip(plain, limited, strict=True):
        assert torch.equal(a[off], b[off])
    assert (limited.kept_mass[~off & (args[1] > 0)] < 1).all()


@ALL
def test_adding_a_constant_to_a_row_changes_nothing(run: Run) -> None:
    args = problem(8, 163, ties=True, dtype=torch.float32)  # half-integers: the shifted logits are exact
    for a, b in zip(call(run, args), call(run, (args[0] - 4096, *args[1:])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["sequence", "ids", "mask"])
@ALL
def test_excluded_ids_are_as_if_absent(run: Run, form: str) -> None:
    """Banned ids and padding columns may hold anything: figures equal those of the row without these columns."""
    logits, *rest = problem(12, 90, dtype=torch.float32)
    banned = [0, 3, 63, 64, 77]
    counted = [i for i in range(80) if i not in banned]
    dirty = logits.clone()
    dirty[:, banned], dirty[:, 80:] = torch.nan, torch.inf
    mask = torch.zeros(90, dtype=torch.bool)
    mask[banned] = True
    argument = {"sequence": tuple(banned), "ids": torch.tensor(banned), "mask": mask}[form]
    out = call(run, (dirty, *rest), vocab_size=80, banned_ids=argument)
    expected = call(run, (logits[:, counted].contiguous(), *rest))
    assert out.token.tolist() == [counted[i] for i in expected.token.tolist()]
    for a, b in zip(out[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@ALL
def test_minus_infinity_is_probability_zero(run: Run) -> None:
    logits = torch.full((4, 20), -torch.inf)
    logits[:, [4, 11]] = torch.tensor([0.5, -0.25])
    out = run(logits, torch.tensor([1.0, 0.0, 1e6, 0.5]), seed=torch.arange(4), position=torch.arange(4))
    assert set(out.token.tolist()) <= {4, 11}
    p = torch.tensor([0.5, -0.25]).softmax(-1)
    torch.testing.assert_close(out.entropy, -(p * p.log()).sum().expand(4), atol=1e-6, rtol=0)


def test_float64_is_computed_in_float64() -> None:
    args = problem(8, 50)
    out = call(sample_ref, args)
    assert {figure.dtype for figure in out[1:]} == {torch.float64}
    exact = (args[0].softmax(-1) * args[0].log_softmax(-1)).sum(-1).neg()
    torch.testing.assert_close(out.entropy, exact, atol=1e-14, rtol=0)


def test_no_rows() -> None:
    for run in (sample_ref, sample_triton):
        out = call(run, problem(0, 9, dtype=torch.float32))
        assert [len(x) for x in out] == [0] * 5


GOOD = {"logits": torch.zeros(3, 8), "temperature": torch.ones(3), "seed": torch.arange(3), "position": torch.arange(3)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(8)}, r"logits must have shape \[any, any\], got \[8\]"),
    "integers": (
        {"logits": torch.zeros(3, 8, dtype=torch.int64)},
        "logits must be torch.float32 or .* got torch.int64",
    ),
    "rows": ({"temperature": torch.ones(2)}, r"temperature must have shape \[3\], got \[2\]"),
    "seed type": ({"seed": torch.zeros(3, dtype=torch.int32)}, "seed must be torch.int64, got torch.int32"),
    "device": ({"position": torch.zeros(3, dtype=torch.int64, device="meta")}, "position is on meta"),
    "negative": ({"temperature": torch.tensor([1.0, -0.5, 1.0])}, r"temperature must be in \[0.0, .* got -0.5"),
    "nan": ({"temperature": torch.tensor([1.0, torch.nan, 1.0])}, "temperature must be .* got nan"),
    "infinite": ({"temperature": torch.tensor([1.0, torch.inf, 1.0])}, "temperature must be .* got inf"),
    "no columns": ({"logits": torch.zeros(3, 0)}, r"vocab_size must be in \[1, 0\] \(the columns of logits\), got 0"),
    "vocab_size": ({"vocab_size": 9}, r"vocab_size must be in \[1, 8\].* got 9"),
    "banned": ({"banned_ids": (1, 8)}, r"banned_ids must be in \[0, 7\], got 8"),
    "banned tensor": ({"banned_ids": torch.tensor([-1])}, r"banned_ids must be in \[0, 7\], got -1"),
    "short mask": ({"banned_ids": torch.zeros(7, dtype=torch.bool)}, "must cover 8 ids, got 7"),
    "all banned": ({"banned_ids": range(8)}, "bans all 8 ids"),
    "top_k": ({"top_k": -1}, r"top_k must be in \[0, .* got -1"),
    "fractional top_k": ({"top_k": 2.5}, "top_k must be an integer .* got 2.5"),
    "top_p": ({"top_p": 1.5}, "top_p must be .* got 1.5"),
    "min_p": ({"min_p": torch.tensor([0.0, 2.0, 0.0])}, "min_p must be .* got 2.0"),
    "nan logits": ({"logits": torch.tensor([[0.0] * 8, [torch.nan] * 8, [0.0] * 8])}, r"logits: rows \[1\] hold NaN"),
    "empty row": (
        {"logits": torch.tensor([[0.0] * 8, [0.0] * 8, [-torch.inf] * 8])},
        r"logits: rows \[2\] .* no finite",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # numpy, in the interpreter
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    arguments = GOOD | change
    with pytest.raises(ValueError, match=message):
        run(arguments.pop("logits"), arguments.pop("temperature"), **arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("vocab", "size"), [(163, 160), (8192, 8192), (9001, 8999)])
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # numpy, in the interpreter
def test_rows_of_nan_draw_an_id_that_counts(vocab: int, size: int, temperature: float) -> None:
    """On a GPU nobody looks at the values: the engine would use the id as an index before anyone sees the entropy."""
    logits = torch.randn(4, vocab)
    logits[0] = torch.nan  # all of the row; all that counts of the last block; one id; nothing
    logits[1, size // 2 :] = torch.nan
    logits[2, 50] = torch.nan
    banned = torch.zeros(size, dtype=torch.bool)
    banned[:9] = banned[-30:] = True
    index = torch.arange(4)
    for cuts in (None, torch.tensor([[40.0], [0.9], [0.01]], dtype=torch.float64).expand(3, 4).contiguous()):
        token, _, _, entropy, _ = draw_blocks(logits, torch.full((4,), temperature), index, index, banned, size, cuts)
        assert ((token >= 0) & (token < size)).all()
        assert not banned[token].any()
        assert entropy.isnan().tolist() == [True, True, True, False]


def test_strided_rows_are_refused_by_triton_and_taken_by_the_reference() -> None:
    logits, *rest = problem(4, 10, dtype=torch.float32)
    strided = logits.repeat_interleave(2, -1)[:, ::2]
    assert torch.equal(call(sample_ref, (strided, *rest)).token, call(sample_ref, (logits, *rest)).token)
    with pytest.raises(ValueError, match="logits must be contiguous along its last dimension"):
        call(sample_triton, (strided, *rest))


# Each way to sample with the row pass and the loss that must agree with it.
BACKENDS: dict[str, tuple[Run, Callable[..., Any], Callable[..., Any]]] = {
    "ref": (sample_ref, token_logprobs_ref, grpo_loss_ref),
    "native": (sample, token_logprobs, grpo_loss),
    "triton": (partial(sample_triton, bitwise_logprobs=True), token_logprobs_triton, grpo_loss_triton),
}


@pytest.mark.parametrize("vocab", [163, 5000])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("ref", torch.float64), *product(BACKENDS, [torch.float32, torch.float16, torch.bfloat16])],
    ids=str,
)
def test_figures_are_those_of_training_bit_for_bit(backend: str, dtype: torch.dtype, vocab: int) -> None:
    """Whatever the training batch: these rows, one of them, all at temperature 1, beside masked ones full of NaN."""
    run, row_pass, _ = BACKENDS[backend]
    args = problem(9, vocab, dtype=dtype)
    logits, temperature, *_ = args
    greedy, among = temperature == 0, {"vocab_size": vocab - 3, "banned_ids": (0, vocab // 2)}
    out = call(run, args, **among)
    recorded = torch.where(greedy, out.logprob_raw, out.logprob)
    assert (out.logprob[greedy] == 0).all()
    logprob, entropy = row_pass(logits, out.token, temperature=temperature, **among)
    assert torch.equal(logprob, recorded)
    assert torch.equal(entropy, out.entropy)
    assert torch.equal(row_pass(logits, out.token, **among)[0], out.logprob_raw)
    for row in (1, 2):
        at = slice(row, row + 1)
        assert row_pass(logits[at], out.token[at], temperature=temperature[at], **among)[0] == recorded[row]
    masked = torch.arange(9) % 3 == 1
    dirty = logits.masked_fill(masked[:, None], torch.nan)
    logprob, entropy = row_pass(dirty, out.token, temperature=temperature, mask=~masked, **among)
    assert torch.equal(logprob[~masked], recorded[~masked])
    assert torch.equal(entropy[~masked], out.entropy[~masked])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_update_is_on_policy_bit_for_bit(backend: str) -> None:
    """With what the sampler recorded as old_logprobs every ratio is 1 and the KL 0, not nearly."""
    run, _, loss_of = BACKENDS[backend]
    args = problem(40, 163, dtype=torch.float32)
    out = call(run, args, banned_ids=(5,))
    recorded = torch.where(args[1] == 0, out.logprob_raw, out.logprob)
    weights = (torch.arange(40) % 5 != 0).float()
    _, metrics = loss_of(
        args[0],
        out.token,
        torch.ones(40),
        weights,
        old_logprobs=recorded,
        rollout_logprobs=recorded,
        temperature=args[1],
        banned_ids=(5,),
    )
    found = metrics.as_dict()
    assert found["ratio"] == found["ratio_max"] == 1.0
    assert found["kl_old"] == found["mismatch_kl"] == 0.0


def test_the_native_statistics_draw_the_references_tokens() -> None:
    args = problem(4096, 61, dtype=torch.float32)
    for limits in (LIMITS["none"], LIMITS["all"]):
        differs = call(sample, args, **limits).token != call(sample_ref, args, **limits).token
        assert differs.sum() <= 2  # where u is within rounding of a step of the cdf


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 17, 511, 512, 513, 4096, 9_000])
def test_cpp_draws_the_references_ids(vocab_size: int) -> None:
    """Without truncation: chunk by chunk, not by one cdf; log-probs to the bit of token_logprobs."""
    rows = 200
    logits = torch.randn(rows, vocab_size + 3) * 4
    temperature = torch.tensor([0.0, 1e-35, 0.01, 0.6, 1.0, 3.0, 1e3]).repeat(rows)[:rows]
    banned = torch.rand(vocab_size) < 0.4 if vocab_size > 15 else None
    options = dict(seed=torch.arange(rows), position=torch.arange(rows) * 7, vocab_size=vocab_size, banned_ids=banned)
    ours, theirs = sample(logits, temperature, **options), sample_ref(logits, temperature, **options)
    assert torch.equal(ours.token, theirs.token) and ours.token.dtype == torch.int64
    for name in ("logprob", "logprob_raw", "entropy", "kept_mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-5, atol=2e-5)
    warm = temperature >= 1e-30
    given = dict(vocab_size=vocab_size, banned_ids=banned)
    drawn, _ = token_logprobs(logits[warm], ours.token[warm], temperature=temperature[warm], **given)
    raw, entropy = token_logprobs(logits, ours.token, **given)
    assert torch.equal(ours.logprob[warm], drawn) and torch.equal(ours.logprob_raw, raw)
    assert torch.equal(ours.entropy, entropy)


def test_cpp_draws_at_the_edges() -> None:
    """The first and the last id that is possible, whatever is banned beside them; greedy, the first of equal ones."""
    z = np.full((4, 1300), -np.inf, np.float32)
    z[:, [3, 600, 1290]] = 0.0
    u, tau = np.array([0.0, 1 - 2.0**-53, 0.5, 0.5]), np.array([1.0, 1.0, 1.0, 0.0], np.float32)
    for banned, wanted in ((None, [3, 1290, 600, 3]), (np.array([3]), [600, 1290, 1290, 600])):
        tokens, drawn = np.zeros(4, np.int64), np.zeros((3, 4), np.float32)
        _native.draw_rows_f32(z, tau, banned, u, tokens, drawn, 2)
        assert tokens.tolist() == wanted
        possible = 3 if banned is None else 2
        np.testing.assert_allclose(np.exp(-drawn[2]), 1 / possible, rtol=1e-6)
        np.testing.assert_allclose(drawn[0], [-np.log(possible)] * 3 + [0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"u must have the shape \[4\], got \[3\]"):
        _native.draw_rows_f32(z, tau, None, u[:3], tokens, drawn, 1)
    with pytest.raises(ValueError, match=r"drawn must have the shape \[3, 4\]"):
        _native.draw_rows_f32(z, tau, None, u, tokens, drawn[:2].copy(), 1)
    with pytest.raises(ValueError, match="z has no ids"):
        _native.draw_rows_f32(z[:, :0], tau, None, u, tokens, drawn, 1)


@pytest.mark.parametrize("run", [sample_ref, sample], ids=["ref", "native"])
def test_what_a_draw_is_given_may_want_a_gradient(run: Run) -> None:
    logits, temperature, seed, position = problem(4, 20, dtype=torch.float32)
    wanted = run(logits, temperature, seed=seed, position=position)
    found = run(logits.requires_grad_(), temperature.requires_grad_(), seed=seed, position=position)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("run", [sample_ref, sample], ids=["ref", "native"])
def test_values_are_looked_at_only_where_that_costs_no_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which the reference may be asked on too."""
    logits = torch.full((2, 20), torch.nan)
    given = dict(seed=torch.zeros(2, dtype=torch.int64), position=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows \\[0, 1\\] hold NaN"):
        run(logits, torch.ones(2), **given)
    monkeypatch.setattr(sample_module, "values_visible", lambda tensor: False)
    assert not run(logits, torch.ones(2), **given).entropy.isfinite().any()
