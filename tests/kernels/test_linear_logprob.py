"""linear_logprob: a loop over tokens in float64, grpo_loss on stored logits, and properties that need no reference."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime._allocation import NullAllocator, _allocator
from triton.runtime.jit import create_function_from_signature

from tests.kernels.head_problem import IDS, Run, Watch, call, close, problem
from thyme.kernels import linear_gradient, linear_tiles
from thyme.kernels import linear_logprob as linear_logprob_module
from thyme.kernels.linear_logprob import (
    Backward,
    linear_logprob,
    linear_logprob_ref,
    linear_logprob_triton,
)
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_triton

ALL = pytest.mark.parametrize("run", [linear_logprob_ref, linear_logprob, linear_logprob_triton], ids=IDS)
BACKWARDS = pytest.mark.parametrize("backward", ["recompute", "kept_tiles"])


@pytest.fixture
def bulk_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles and the descriptors of Hopper, which the interpreter has too."""
    monkeypatch.setattr(linear_tiles, "_has_tma", lambda hidden, weight: True)


def test_reference_is_the_token_loop() -> None:
    args = problem()
    hidden, weight = (args[name].clone().requires_grad_() for name in ("hidden", "weight"))
    counted = torch.ones(300, dtype=torch.bool)
    counted[260:] = False
    counted[[2, 255]] = False
    logprob, entropy = torch.zeros(2, 12, dtype=torch.float64).unbind()
    for t in args["mask"].nonzero().flatten().tolist():
        z = (weight @ hidden[t]).masked_fill(~counted, -torch.inf)
        tau = args["temperature"][t].double()
        p = z.softmax(-1)[counted]
        logprob = logprob.index_add(0, torch.tensor([t]), (z / (tau or 1)).log_softmax(-1)[args["targets"][t], None])
        entropy = entropy.index_add(0, torch.tensor([t]), -(p * p.log()).sum()[None])
    (logprob @ torch.linspace(0.5, 1.5, 12, dtype=torch.float64) + 0.3 * entropy.sum()).backward()
    got = call(linear_logprob_ref, args)
    for a, b in zip(got, (logprob, entropy, hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-12, rtol=1e-10)
    assert (got[3][~counted] == 0).all()
    assert (got[2][~args["mask"]] == 0).all()


# One of each; odd sizes; more than one tile of rows and whole tiles of words; two splits, the second with one word.
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 131, 37), (70, 168, 40), (3, 2089, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"backward": "kept_tiles", "entropy": 0.0}], ids=["recompute", "kept_tiles"])
@ALL
def test_against_float64(run: Run, shape: tuple[int, int, int], options: dict[str, Any], tolerances: dict) -> None:
    args = problem(*shape, dtype=torch.float32)
    exact = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    close(call(run, args, **options), call(linear_logprob_ref, exact, **options), tolerances, scale=10)


@pytest.mark.parametrize("options", [{}, {"backward": "kept_tiles", "entropy": 0.0}], ids=["recompute", "kept_tiles"])
def test_the_tiles_of_hopper(options: dict[str, Any], bulk_copies: None, tolerances: dict) -> None:
    args = problem(5, 2300, 72, torch.float32)
    exact = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    close(
        call(linear_logprob_triton, args, **options), call(linear_logprob_ref, exact, **options), tolerances, scale=10
    )


class Operand:
    """What is asked about a matrix before it is copied in bulk."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, dtype: torch.dtype, features: int, address: int) -> None:
        self.dtype, self.shape, self.address = dtype, (7, features), address

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.address


def test_bulk_copies_only_on_hopper_and_only_of_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tiles do not fit other GPUs; rows and both addresses are multiples of 16 bytes, or the copy would fail."""

    def asked(capability: tuple[int, int], dtype: Any = torch.bfloat16, features: int = 64, *at: int) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        hidden, weight = (Operand(dtype, features, address) for address in (at or (256, 512)))
        return linear_tiles._has_tma(hidden, weight)

    assert asked((9, 0)) and asked((9, 0), torch.float16)
    assert not any(asked(other) for other in ((8, 0), (8, 9), (10, 0), (10, 3), (12, 0)))
    assert not asked((9, 0), torch.float32)
    assert not asked((9, 0), torch.bfloat16, 68)
    assert not asked((9, 0), torch.bfloat16, 64, 264, 512)
    assert not asked((9, 0), torch.bfloat16, 64, 256, 520)


def test_a_launch_leaves_the_callers_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    def check() -> None:
        found.append(_allocator.get())

    found: list[Any] = []
    triton.set_allocator(mine)
    try:
        linear_tiles.launch_tiles(True, check)
        check()
    finally:
        triton.set_allocator(NullAllocator())
    assert found == [linear_tiles._descriptor_memory, mine]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BACKWARDS
def test_sixteen_bits(backward: Backward, dtype: torch.dtype, tolerances: dict) -> None:
    """On a CPU computed in float32: log-probs are those of the rounded operands, not of rounded logits."""
    args = problem(9, 300, 64, dtype)
    exact = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    got = call(linear_logprob_ref, args, backward=backward)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, dtype, dtype]
    for name, a, b in zip(("logprob", "entropy"), got, call(linear_logprob_ref, exact), strict=False):
        torch.testing.assert_close(a.double(), b, atol=tolerances[name, dtype][0], rtol=0)
    for a, b in zip(got[2:], call(linear_logprob_ref, exact)[2:], strict=True):
        atol, rtol = tolerances["grad", dtype]
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "bulk copies"])
@BACKWARDS
def test_bfloat16_in_triton(backward: Backward, tma: bool, monkeypatch: pytest.MonkeyPatch, tolerances: dict) -> None:
    """dz is rounded to bfloat16 before its products, and they are again: four times the tolerance of one rounding."""
    monkeypatch.setattr(linear_tiles, "_has_tma", lambda hidden, weight: tma)
    args = problem(9, 300, 72, torch.bfloat16)
    entropy = 0.0 if backward == "kept_tiles" else 0.3
    exact = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    got = call(linear_logprob_triton, args, entropy=entropy, backward=backward)
    expected = call(linear_logprob_ref, exact, entropy=entropy)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for name, a, b in zip(("logprob", "entropy", "grad", "grad"), got, expected, strict=True):
        atol, rtol = tolerances[name, torch.bfloat16]
        torch.testing.assert_close(a.double(), b, atol=4 * atol if name == "grad" else atol, rtol=rtol)


@BACKWARDS
def test_gradcheck(backward: Backward) -> None:
    args = problem(5, 7, 3)
    names = ("targets", "temperature", "mask")
    more = {name: args[name] for name in names} | {"vocab_size": 6, "banned_ids": (0,), "backward": backward}
    more["targets"] = torch.tensor([1, 5, 2, 99, 3])
    targets = more.pop("targets")
    hidden, weight = args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob_ref(x, w, targets, **more), (hidden, weight))
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob_ref(x, w, targets, **more)[0], (hidden, weight))


@ALL
@BACKWARDS
def test_masked_rows_may_hold_anything(run: Run, backward: Backward) -> None:
    """Neither their values nor their number reach the matmuls: dweight would be NaN."""
    args = problem(9, 150, 20, torch.float32)
    mask = args["mask"]
    dirty = args | {"hidden": args["hidden"].clone(), "targets": args["targets"].clone()}
    dirty["hidden"][~mask] = torch.nan
    dirty["targets"][~mask] = -100
    clean = call(run, args, backward=backward)
    for a, b in zip(call(run, dirty, backward=backward), clean, strict=True):
        assert torch.equal(a, b)
    assert all((x[~mask] == 0).all() for x in clean[:3])
    kept = args | {name: args[name][mask] for name in ("hidden", "targets", "temperature")}
    for a, b in zip(call(run, kept, mask=None)[:2], clean, strict=False):
        assert torch.equal(a, b[mask])


@ALL
@BACKWARDS
def test_all_rows_masked(run: Run, backward: Backward) -> None:
    args = problem(6, 150, 20, torch.float32)
    args["hidden"].fill_(torch.nan)
    for x in call(run, args, mask=torch.zeros(6, dtype=torch.bool), backward=backward):
        assert (x == 0).all()


@ALL
def test_a_row_does_not_know_its_batch(run: Run) -> None:
    """Bitwise. The logits are sums of small integers, which torch and the interpreter's numpy have the same bits for in
    whatever order; what is tested is our own order over the words."""
    args = problem(21, 400, 72, torch.float32) | {"mask": None}
    args["hidden"], args["weight"] = (torch.randint(-4, 5, x.shape) / 8.0 for x in (args["hidden"], args["weight"]))
    if run is linear_logprob_triton:
        # Sums over the 32 features of one `tl.dot` stay exact; adding them up rounds, and that order is ours too.
        args["weight"] *= torch.tensor([1.0, 2.0**-19, 2.0**-18]).repeat_interleave(32)[:72]
    whole = call(run, args)[:2]
    rows = range(0, 21, 4) if run is linear_logprob_triton else range(21)
    for row in rows:
        at = slice(row, row + 1)
        alone = call(run, args | {name: args[name][at] for name in ("hidden", "targets", "temperature")})[:2]
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a[at], b)


@ALL
def test_adding_a_constant_to_the_logits_of_a_row_changes_nothing(run: Run) -> None:
    """Bitwise, the sums being exact; this is what padding words counted as logits of 0 would break."""
    hidden, weight = torch.randint(-4, 5, (5, 20)) / 4.0, torch.randint(-4, 5, (163, 20)) / 4.0
    hidden[:, 0] = torch.tensor([1.0, 1.0, -1.0, 2.0, -2.0])
    shift = torch.zeros(20)
    shift[0] = 512.0
    temperature = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    args = {"hidden": hidden, "targets": torch.arange(5), "temperature": temperature, "vocab_size": 150}
    one, other = (call(run, args | {"weight": weight + by})[:2] for by in (0.0, shift))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@ALL
def test_words_in_another_order(run: Run, tolerances: dict) -> None:
    args = problem(6, 150, 20, torch.float32) | {"vocab_size": None, "banned_ids": None}
    order = torch.randperm(150)
    permuted = {"weight": args["weight"][order], "targets": order.argsort()[args["targets"]]}
    one, other = call(run, args), call(run, args | permuted)
    other[3] = other[3][order.argsort()]
    close(one, [x.double() for x in other], tolerances, scale=10)


@ALL
def test_temperature_divides_the_hidden_state(run: Run) -> None:
    args = problem(5, 150, 20, torch.float32) | {"mask": None}
    temperature = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    divided = call(run, args | {"hidden": args["hidden"] / temperature[:, None], "temperature": None})[0]
    torch.testing.assert_close(call(run, args, temperature=temperature)[0], divided, atol=2e-6, rtol=0)


@BACKWARDS
def test_the_workspace_is_kept_to(backward: Backward) -> None:
    """Many chunks give what one gives, and nothing as wide as the vocabulary is larger than the workspace."""
    args = problem(200, 310, 8, torch.float32) | {"backward": backward, "mask": None}
    one = call(linear_logprob_ref, args, entropy=0.0)
    limit = 120 * 270 * 4
    with Watch() as watch:
        many = call(linear_logprob_ref, args, entropy=0.0, workspace_bytes=limit)
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    wide = [size for _, shape, size in watch.seen if len(shape) == 2 and shape[1] == 270]
    assert 0 < max(wide) <= limit
    assert max(shape[0] for _, shape, _ in watch.seen if len(shape) == 2 and shape[1] == 270) < 200


def test_chunks_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks, the first of kept tiles, the second recomputed; dweight adds up in slices of the vocabulary."""
    monkeypatch.setattr(linear_gradient._WeightGradient, "WORDS", 100)
    args = problem(100, 150, 12, torch.float32) | {"mask": None}
    tile_row = 128 * 4 + 2 * 4
    for options in ({"entropy": 0.3}, {"entropy": 0.0, "backward": "kept_tiles"}):
        one = call(linear_logprob_ref, args, **options)
        two = call(linear_logprob_triton, args, workspace_bytes=70 * tile_row, **options)
        for a, b in zip(two, one, strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("row_pass", ["linear", "logits", "logits, no ids"])
def test_scoring_in_inference_mode_does_not_spoil_training(row_pass: str) -> None:
    """The mask of banned ids is kept between calls, also that of none; ids and vocabulary of this test alone, so that
    it is made here."""
    banned = () if "no" in row_pass else (11, 17 if row_pass == "linear" else 18)
    hidden, weight, targets = torch.randn(3, 8), torch.randn(21, 8), torch.tensor([1, 2, 3])

    def loss() -> Tensor:
        if row_pass == "linear":
            return linear_logprob(hidden, weight, targets, banned_ids=banned)[0].sum()
        return token_logprobs_triton(hidden @ weight.T, targets, banned_ids=banned)[0].sum()

    with torch.inference_mode():
        scored = loss().item()
    hidden.requires_grad_()
    trained = loss()
    trained.backward()
    assert trained.item() == pytest.approx(scored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_matmuls_of_the_backward_sum_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over K = 152,064 words; cuBLAS may else add up the parts of a split sum in 16 bits. The user's choice is kept."""
    flags = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    matmul, seen = torch.mm, []

    def mm(*args: Any, out_dtype: Any = None, **more: Any) -> Tensor:  # on a CPU there is no float32 of 16 bits
        seen.extend(getattr(flags, name) for name in names)
        return matmul(*args, **more)

    before = [getattr(flags, name) for name in names]
    monkeypatch.setattr(torch, "mm", mm)
    args = problem(9, 150, 20, dtype) | {"mask": None}
    monkeypatch.setattr(linear_gradient, "adds_in_float32", lambda device, dtype: False)
    call(linear_logprob_triton, args)
    assert len(seen) == 4 and not any(seen)
    assert [getattr(flags, name) for name in names] == before and all(before)


def test_kept_tiles_spare_the_second_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(40, 150, 12, torch.float32)
    counts = {}
    for backward in ("recompute", "kept_tiles"):
        with Watch() as watch:
            call(linear_logprob_ref, args, entropy=0.0, backward=backward)
        counts[backward] = watch.matmuls(lambda size: size[-1] == 110)
    assert counts == {"recompute": 2, "kept_tiles": 1}
    monkeypatch.setattr(linear_gradient, "_dlogits_kernel", None)
    call(linear_logprob_triton, args, entropy=0.0, backward="kept_tiles")
    with pytest.raises(TypeError):
        call(linear_logprob_triton, args, entropy=0.0)


@ALL
def test_a_frozen_head_costs_no_matmul(run: Run) -> None:
    args = problem(9, 150, 20, torch.float32)
    hidden, weight, targets = (args.pop(name) for name in ("hidden", "weight", "targets"))
    expected = call(run, args | {"hidden": hidden, "weight": weight, "targets": targets}, entropy=0.0)
    for frozen in ("weight", "hidden"):
        x, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
        logprob, _ = run(x, w, targets, **args)
        with Watch() as watch:
            (logprob * torch.linspace(0.5, 1.5, 9)).sum().backward()
        assert (x if frozen == "hidden" else w).grad is None
        got, wanted = (x.grad, expected[2]) if frozen == "weight" else (w.grad, expected[3])
        assert torch.equal(got, wanted)
        assert watch.matmuls(lambda size: size[-1] == 20) == 1


@ALL
@BACKWARDS
def test_a_second_backward_gives_the_same(run: Run, backward: Backward) -> None:
    args = problem(9, 150, 20, torch.float32)
    weight, targets = args.pop("weight"), args.pop("targets")
    hidden = args.pop("hidden").requires_grad_()
    total = run(hidden, weight, targets, **args, backward=backward)[0].sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_the_bits_are_those_over_stored_logits() -> None:
    """On a CPU: what `token_logprobs` gives for the logits hidden weight^T, however many chunks they come in.

    The logits are sums of small integers: BLAS promises no bits for a matrix of another shape.
    """
    hidden, weight = (torch.randint(-4, 5, (rows, 24)) / 4.0 for rows in (700, 90))
    targets = torch.randint(0, 80, (700,))
    more = {"temperature": torch.rand(700) + 0.5, "vocab_size": 85, "banned_ids": (81,)}
    stored = token_logprobs(hidden @ weight.T, targets, **more)
    for backward in get_args(Backward):
        for a, b in zip(linear_logprob(hidden, weight, targets, backward=backward, **more), stored, strict=True):
            assert torch.equal(a, b)


class Recorder:
    """Stands for a kernel and asks Triton's binder under which key it would look the compiled one up."""

    def __init__(self, kernel: Any) -> None:
        compiled = triton.JITFunction(kernel.fn, do_not_specialize=["num_rows"])
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binder = create_function_from_signature(compiled.signature, compiled.params, backend)
        self.keys: set[str] = set()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            _, specialization, rest = self.binder(*args, **options)
            self.keys.add(str(specialization) + str(rest))

        return launch


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    homes = dict.fromkeys(("_forward_kernel", "_target_kernel", "_merge_kernel"), linear_tiles)
    homes |= dict.fromkeys(("_dlogits_kernel", "_kept_kernel"), linear_gradient)
    found = {name: Recorder(getattr(home, name)) for name, home in homes.items()}
    for name, recorder in found.items():
        monkeypatch.setattr(homes[name], name, recorder)
    yield found


@BACKWARDS
def test_nothing_recompiles_for_another_length(recorders: dict[str, Recorder], backward: Backward) -> None:
    weight = torch.randn(320, 16)
    for num_rows in (1, 2, 3, 16, 17, 64, 1000):
        for tau in (1.0, 0.7):
            hidden = torch.randn(num_rows, 16, requires_grad=True)
            logprob, _ = linear_logprob_triton(
                hidden,
                weight,
                torch.zeros(num_rows, dtype=torch.int64),
                temperature=torch.full((num_rows,), tau),
                backward=backward,
                workspace_bytes=1 << 30,
            )
            logprob.sum().backward()
    assert {name: len(recorder.keys) for name, recorder in recorders.items()} == {
        "_forward_kernel": 1,
        "_target_kernel": 1,
        "_merge_kernel": 1,
        "_dlogits_kernel": int(backward == "recompute"),
        "_kept_kernel": int(backward == "kept_tiles"),
    }


def known_gradient(run: Run, args: dict[str, Any], wanted: Tensor, **more: Any) -> tuple[Tensor, list[Tensor]]:
    """The log-probs' sum times `wanted`, to be differentiated, and the leaves."""
    args = args | more
    leaves = [args.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight")]
    logprob, _ = run(*leaves, args.pop("targets"), **args)
    return (logprob * wanted).sum(), leaves


@ALL
def test_a_gradient_that_is_known_is_made_with_the_forward(run: Run, tolerances: dict) -> None:
    """Of any scale, in several chunks, and made again by a second backward."""
    args = problem(70, 168, 40, dtype=torch.float32)
    wanted = torch.linspace(-0.5, 1.5, 70)
    exact, leaves = known_gradient(linear_logprob_ref, problem_in_double(args), wanted)
    expected = torch.autograd.grad(exact, leaves)
    loss, leaves = known_gradient(run, args, wanted, logprob_gradient=-2 * wanted, workspace_bytes=1 << 16)
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for got in (first, torch.autograd.grad(loss, leaves)):
        for a, b in zip(got, expected, strict=True):
            atol, rtol = tolerances["grad", torch.float32]
            torch.testing.assert_close(a.double(), b, atol=8 * atol, rtol=rtol)


def problem_in_double(args: dict[str, Any]) -> dict[str, Any]:
    return args | {name: args[name].double() for name in ("hidden", "weight")}


@ALL
def test_a_gradient_that_is_known_is_held_to_what_comes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    args, wanted = problem(dtype=torch.float32), torch.linspace(0.5, 1.5, 12)
    loss, leaves = known_gradient(run, args, wanted, logprob_gradient=torch.ones(12))
    with pytest.raises(ValueError, match="logprob_gradient is not proportional to the gradient that"):
        loss.backward()
    loss, leaves = known_gradient(run, args, wanted, logprob_gradient=torch.ones(12))
    monkeypatch.setattr(linear_logprob_module, "values_visible", lambda x: False)  # as on a GPU
    assert all(gradient.isnan().any() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("known", "products"), [(True, 3), (False, 4)])
def test_flops_of_a_gradient_that_is_known(known: bool, products: int) -> None:
    """6 N H V, where 8 are needed to recompute."""
    args = problem(200, 50, 96, dtype=torch.float32) | {"mask": None}
    wanted = torch.ones(200)
    with FlopCounterMode(display=False) as counter:
        loss, _ = known_gradient(linear_logprob_ref, args, wanted, logprob_gradient=wanted if known else None)
        loss.backward()
    assert counter.get_total_flops() == products * 2 * 200 * 96 * 50


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"hidden": torch.zeros(8)}, r"hidden must have shape \[any, any\], got \[8\]"),
    "dtype": ({"hidden": torch.zeros(12, 24, dtype=torch.complex64)}, "hidden must be torch.float32 or"),
    "features": ({"weight": torch.zeros(300, 25)}, r"weight must have shape \[any, 24\], got \[300, 25\]"),
    "weight dtype": ({"weight": torch.zeros(300, 24).half()}, "weight must be torch.float32, got torch.float16"),
    "device": ({"weight": torch.zeros(300, 24, device="meta")}, "weight is on meta, the other arguments on cpu"),
    "targets": ({"targets": torch.zeros(11, dtype=torch.int64)}, r"targets must have shape \[12\], got \[11\]"),
    "target range": ({"targets": torch.full((12,), 260)}, r"targets must be in \[0, 259\], got 260"),
    "banned target": ({"targets": torch.full((12,), 2)}, r"targets\[0\] is 2, a banned id"),
    "temperature": ({"temperature": torch.full((12,), torch.nan)}, r"temperature must be in \[0.0, .* got nan"),
    "mask": ({"mask": torch.ones(12)}, "mask must be torch.bool, got torch.float32"),
    "vocab_size": ({"vocab_size": 301}, r"vocab_size must be in \[1, 300\]"),
    "backward": ({"backward": "store"}, "backward must be one of recompute, kept_tiles, got 'store'"),
    "gradient": ({"logprob_gradient": torch.ones(11)}, r"logprob_gradient must have shape \[12\], got \[11\]"),
    "workspace": ({"workspace_bytes": 1000}, r"workspace_bytes must be >= \d+ \(\d+ rows of logits.*got 1000"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(run, problem(dtype=torch.float32) | change)
