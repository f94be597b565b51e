"""linear_grpo_loss: grpo_loss on stored logits, and what its gradients in the forward cost, save and fall back to."""

import weakref
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.head_problem import IDS, Products, Run, Watch, problem
from thyme.kernels import linear_gradient, linear_rows, linear_tiles, policy_tokens
from thyme.kernels.grpo_loss import grpo_loss_ref
from thyme.kernels.linear_grpo_loss import (
    LossBackward,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_grpo_loss_triton,
)
from thyme.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_triton
from thyme.kernels.policy_loss import GrpoLossConfig

LOSSES = pytest.mark.parametrize("run", [linear_grpo_loss_ref, linear_grpo_loss, linear_grpo_loss_triton], ids=IDS)
BACKWARDS = pytest.mark.parametrize("backward", get_args(LossBackward))
CONFIGS = {
    "default": GrpoLossConfig(),
    "gspo, k1": GrpoLossConfig(loss="gspo", clip_eps_low=0.05, clip_eps_high=0.05, kl="k1", kl_coef=0.3),
    "entropy, greedy excluded": GrpoLossConfig(entropy_coef=0.2, greedy_tokens="exclude"),
    "cispo, is_pi, truncated": GrpoLossConfig(loss="cispo", greedy_tokens="is_pi", rollout_ratio_cap=1.1),
}


def loss_arguments(args: dict[str, Any]) -> dict[str, Any]:
    num_rows = len(args["hidden"])
    tokens = {name: torch.randn(num_rows, dtype=torch.float64) - 5 for name in ("old", "ref", "rollout")}
    return {name: value for name, value in args.items() if name not in ("mask",)} | {
        "advantages": torch.randn(num_rows, dtype=torch.float64),
        "weights": torch.rand(num_rows, dtype=torch.float64) * args["mask"],
        "cu_seqlens": torch.tensor([0, num_rows // 2, num_rows], dtype=torch.int32),
        "segments": (torch.arange(num_rows) % 2).to(torch.uint8),
        **{f"{name}_logprobs": value for name, value in tokens.items()},
    }


def call_loss(run: Run, args: dict[str, Any], **more: Any) -> tuple[list[Tensor], dict[str, float]]:
    args = args | more
    hidden, weight = (args.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight"))
    loss, metrics = run(hidden, weight, args.pop("targets"), args.pop("advantages"), args.pop("weights"), **args)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad], metrics.as_dict()


def stored(hidden: Tensor, weight: Tensor, *args: Tensor, backward: str, **more: Any) -> tuple[Tensor, Any]:
    return grpo_loss_ref(hidden @ weight.T, *args, **more)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@BACKWARDS
def test_the_loss_is_grpo_loss_of_stored_logits(config: GrpoLossConfig, backward: LossBackward) -> None:
    args = loss_arguments(problem()) | {"config": config, "backward": backward}
    (got, metrics), (exact, exact_metrics) = (call_loss(run, args) for run in (linear_grpo_loss_ref, stored))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert metrics == pytest.approx(exact_metrics, abs=1e-6, rel=1e-6)


@BACKWARDS
def test_the_loss_in_triton(backward: LossBackward, tolerances: dict) -> None:
    args = loss_arguments(problem(9, 150, 20, torch.float32)) | {"backward": backward}
    exact_args = args | {"hidden": args["hidden"].double(), "weight": args["weight"].double()}
    (got, _), (exact, _) = call_loss(linear_grpo_loss_triton, args), call_loss(stored, exact_args)
    for name, a, b in zip(("loss", "grad", "grad"), got, exact, strict=True):
        atol, rtol = tolerances[name, torch.float32]
        torch.testing.assert_close(a.double(), b, atol=10 * atol, rtol=rtol)


@LOSSES
def test_on_policy_the_ratio_is_one(run: Run) -> None:
    args = loss_arguments(problem(9, 150, 20, torch.float32))
    passes: dict[Run, Run] = {
        linear_grpo_loss_ref: linear_logprob_ref,
        linear_grpo_loss: linear_logprob,
        linear_grpo_loss_triton: linear_logprob_triton,
    }
    names = ("temperature", "vocab_size", "banned_ids")
    more = {name: args[name] for name in names} | {"mask": args["weights"] != 0}
    old = passes[run](args["hidden"], args["weight"], args["targets"], **more)[0]
    results = [call_loss(run, args, old_logprobs=same, rollout_logprobs=None) for same in (None, old)]
    for _, metrics in results:
        assert metrics["ratio"] == metrics["ratio_max"] == metrics["ess"] == 1.0
        assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == metrics["kl_old"] == 0.0
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)


def test_tokens_in_parts_add_up() -> None:
    args = loss_arguments(problem()) | {"cu_seqlens": None}
    tokens = [name for name, value in args.items() if isinstance(value, Tensor) and name != "weight"]
    whole, _ = call_loss(linear_grpo_loss_ref, args)
    parts = [
        call_loss(linear_grpo_loss_ref, args | {name: args[name][at] for name in tokens})[0]
        for at in torch.arange(12).split(5)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2], atol=1e-12, rtol=0)


def test_bad_arguments_of_the_loss() -> None:
    args = loss_arguments(problem(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"weights must have shape \[12\], got \[11\]"):
        call_loss(linear_grpo_loss_ref, args, weights=torch.ones(11))
    with pytest.raises(ValueError, match="weights must be finite"):
        call_loss(linear_grpo_loss_ref, args, weights=torch.full((12,), torch.inf))
    transposed = torch.randn(24, 300).T
    with pytest.raises(ValueError, match=r"weight must be contiguous, got strides \(1, 300\)"):
        call_loss(linear_grpo_loss_triton, args, weight=transposed)


def case(num_rows: int = 100, vocab: int = 150, features: int = 12, **more: Any) -> dict[str, Any]:
    """Rows that all count, at temperatures of 0 and 1."""
    args = problem(num_rows, vocab, features, more.pop("dtype", torch.float32)) | {"mask": torch.ones(num_rows)}
    args["temperature"] = (torch.arange(num_rows) % 3 != 0).float()
    return loss_arguments(args) | more


def two_chunks_of_triton(args: dict[str, Any], rows: int = 70) -> dict[str, Any]:
    width = -(-args["vocab_size"] // 64) * 64
    return args | {"workspace_bytes": rows * (width * args["hidden"].element_size() + width // 64 * 4)}


OF_TOKENS = {
    "default": GrpoLossConfig(),
    "entropy, greedy excluded": GrpoLossConfig(entropy_coef=0.2, greedy_tokens="exclude"),
    "cispo, is_pi, truncated": GrpoLossConfig(loss="cispo", greedy_tokens="is_pi", rollout_ratio_cap=1.1),
}


@pytest.mark.parametrize("config", OF_TOKENS.values(), ids=OF_TOKENS)
@LOSSES
def test_chunks_in_the_forward_are_what_a_backward_gives(run: Run, config: GrpoLossConfig) -> None:
    """Two chunks, and rows that do not count among them."""
    args = loss_arguments(problem(100, 150, 12, torch.float32)) | {"config": config}
    if run is linear_grpo_loss_triton:
        args = two_chunks_of_triton(args, rows=64)
    else:
        args["workspace_bytes"] = 48 * 110 * 4
    (got, metrics), (exact, exact_metrics) = (
        call_loss(run, args, backward=backward) for backward in ("in_forward", "recompute")
    )
    assert torch.equal(got[0], exact[0]) and metrics == exact_metrics
    for a, b in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 * exact[1].abs().max().item(), rtol=1e-5)


def products_of(counter: FlopCounterMode, num_rows: int, features: int, words: int = 110) -> int:
    """How many times 2 N H V they are, but for the metrics, whose sums are a small product too."""
    times = counter.get_total_flops() / (2 * num_rows * features * words)
    assert times % 1 < 0.02
    return int(times)


@pytest.mark.parametrize("num_rows", [100, 1000])
@pytest.mark.parametrize(
    ("config", "backward", "matmuls"),
    [
        (GrpoLossConfig(), "in_forward", 3),
        (GrpoLossConfig(entropy_coef=0.1), "in_forward", 3),
        (GrpoLossConfig(), "recompute", 4),
        (GrpoLossConfig(loss="gspo"), "in_forward", 4),
    ],
    ids=str,
)
def test_flops(num_rows: int, config: GrpoLossConfig, backward: LossBackward, matmuls: int) -> None:
    """6 N H V at any N, however many chunks; 8 of what hangs on other rows."""
    args = case(num_rows, features=96, config=config, backward=backward, workspace_bytes=64 * 110 * 4)
    with FlopCounterMode(display=False) as counter:
        call_loss(linear_grpo_loss_ref, args)
    assert products_of(counter, num_rows, 96) == matmuls


class Launches:
    """Stands for a kernel, and counts the rows times words of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.logits = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            names = dict(zip(self.kernel.arg_names, args, strict=False))
            self.logits += names["num_rows"] * names["vocab_size"]
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("num_rows", [60, 200])
def test_flops_of_the_tiles(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit is made once, in the forward kernel, and both products go over every dz once, in whole tiles."""
    forward, again = Launches(linear_tiles._forward_kernel), Launches(linear_gradient._dlogits_kernel)
    monkeypatch.setattr(linear_tiles, "_forward_kernel", forward)
    monkeypatch.setattr(linear_gradient, "_dlogits_kernel", again)
    with FlopCounterMode(display=False) as counter:
        call_loss(linear_grpo_loss_triton, two_chunks_of_triton(case(num_rows, features=96)))
    assert (forward.logits, again.logits) == (num_rows * 110, 0)
    assert products_of(counter, num_rows, 96, words=128) == 2


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "bulk copies"])
def test_bfloat16_in_two_chunks(tma: bool, monkeypatch: pytest.MonkeyPatch, tolerances: dict) -> None:
    """The weight's gradient is summed where it is: no other float32 of words times features, and one rounding."""
    monkeypatch.setattr(linear_tiles, "_has_tma", lambda hidden, weight: tma)
    args = case(200, 310, 72, dtype=torch.bfloat16)
    width = 512 if tma else 320
    args["workspace_bytes"] = 128 * (width * 2 + width // 64 * 4)
    linear_gradient.adds_in_float32.cache_clear()
    try:
        with Products() as watch:
            got, _ = call_loss(linear_grpo_loss_triton, args)
    finally:
        linear_gradient.adds_in_float32.cache_clear()
    exact, _ = call_loss(linear_grpo_loss_ref, args | {name: args[name].double() for name in ("hidden", "weight")})
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() <= 4e-3 * b.norm()
    made = [name for name, shape, size in watch.seen if shape[1:] == (72,) and size >= 270 * 72 * 4]
    assert made.count("empty_like") == made.count("mm") == made.count("addmm") == 1
    assert set(made) <= {"empty_like", "mm", "addmm", "slice", "fill_", "permute"}


def test_an_older_torch_sums_products() -> None:
    """Where torch does not multiply into a float32 sum: 16,384 words at a time, the same within rounding."""
    rows = linear_rows.HeadRows(
        torch.randn(6, 8), torch.randn(50, 8).bfloat16(), torch.zeros(6, dtype=torch.int64), None, None, 45, True, 1
    )
    parts = [(torch.randn(3, 45).bfloat16(), torch.randn(3, 8).bfloat16()) for _ in range(2)]
    results = []
    for adds in (True, False):
        with Products(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_gradient, "adds_in_float32", lambda device, dtype, adds=adds: adds)
            patch.setattr(linear_gradient._WeightGradient, "WORDS", 20)
            gradient = linear_gradient._WeightGradient(rows, in_float32=True)
            for dz, hidden in parts:
                gradient.add(dz, hidden)
            results.append(gradient.result(None))
    assert torch.equal(*results) and (results[0][45:] == 0).all()
    exact = sum(dz.double().T @ hidden.double() for dz, hidden in parts)
    torch.testing.assert_close(results[0][:45].double(), exact, atol=1e-2, rtol=8e-3)


class Unlaunched:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[ModuleType] = [linear_tiles, linear_gradient, policy_tokens]
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Unlaunched())


def test_memory_at_the_headline_shape(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 rows of the 7B head, on tensors without memory: beside operands, gradients and their float32 sum, which is
    one, what is alive at any time stays below 1.3 GB; and all of it below what it replaces."""
    monkeypatch.setattr(linear_tiles, "_has_tma", lambda hidden, weight: True)
    monkeypatch.setattr(linear_gradient, "adds_in_float32", lambda device, dtype: True)
    num_rows, features, vocab = 8_192, 3_584, 152_064
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, features, dtype=torch.bfloat16) for n in (num_rows, vocab))
        vectors = [torch.empty(num_rows) for _ in range(4)]
        targets = torch.empty(num_rows, dtype=torch.int64)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Alive() as alive:
        loss, _ = linear_grpo_loss_triton(
            hidden,
            weight,
            targets,
            *vectors[:2],
            old_logprobs=vectors[2],
            temperature=vectors[3],
            num_counted=num_rows,
            tempered=False,
            vocab_size=151_665,
            banned_ids=torch.empty(151_665, device="meta").bool(),
        )
        loss.backward()
    dhidden, dweight = 2 * num_rows * features, 2 * vocab * features
    assert 0.8e9 < alive.most(dhidden, dweight, 2 * dweight) < 1.3e9
    assert alive.most() < 2 * dweight + dhidden + 1.1e9


class Alive(TorchDispatchMode):
    """The sizes of the storages that were made inside and are still there, after each op."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.seen: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known | self.sizes.keys():
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.seen.append(list(self.sizes.values()))
        return out

    def most(self, *left_out: int) -> int:
        """Bytes; storages of the sizes `left_out` do not count."""
        return max(sum(size for size in sizes if size not in left_out) for sizes in self.seen)


@LOSSES
def test_only_what_is_trained_gets_a_product(run: Run) -> None:
    args = case(30)
    whole, _ = call_loss(run, args)
    for frozen, counted in (("weight", 0), ("hidden", 1)):
        leaves = {name: args[name].clone().requires_grad_(name != frozen) for name in ("hidden", "weight")}
        more = {name: value for name, value in args.items() if name not in leaves}
        first = (more.pop(name) for name in ("targets", "advantages", "weights"))
        with Watch() as watch:
            loss, _ = run(*leaves.values(), *first, **more)
            loss.backward()
        trained = leaves["weight" if counted else "hidden"]
        assert leaves[frozen].grad is None and torch.equal(trained.grad, whole[2 if counted else 1])
        assert watch.matmuls(lambda size: size[-1] == 12) == 1


@LOSSES
def test_without_a_gradient_nothing_is_kept_and_no_product_made(run: Run) -> None:
    args = case(30)
    first = [args.pop(name) for name in ("hidden", "weight", "targets", "advantages", "weights")]
    wanted = run(first[0].clone().requires_grad_(), *first[1:], **args)
    with Watch() as watch, torch.no_grad():
        loss, metrics = run(*first, **args)
    assert torch.equal(loss, wanted[0]) and torch.equal(metrics.values, wanted[1].values)
    assert watch.matmuls(lambda size: size[-1] == 12) == 0


@LOSSES
def test_a_scaled_loss_and_a_second_backward(run: Run) -> None:
    """The gradients are there before backward() says what they are multiplied by, and are made again for another."""
    args = case(30)
    once, _ = call_loss(run, args)
    hidden, weight = (args.pop(name).requires_grad_() for name in ("hidden", "weight"))
    loss, _ = run(hidden, weight, *(args.pop(name) for name in ("targets", "advantages", "weights")), **args)
    scaled = [x.clone() for x in torch.autograd.grad(3.0 * loss, (hidden, weight), retain_graph=True)]
    again = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(scaled, again, once[1:], strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, 3 * c, atol=0, rtol=1e-6)


@LOSSES
def test_all_rows_masked_or_none_there(run: Run) -> None:
    for num_rows in (5, 0):
        args = case(num_rows)
        args["weights"] = torch.zeros(num_rows, dtype=torch.float64)
        args["hidden"].fill_(torch.nan)
        args["cu_seqlens"] = torch.tensor([0, num_rows], dtype=torch.int32)
        got, metrics = call_loss(run, args)
        assert all((x == 0).all() for x in got) and metrics["tokens"] == 0


@LOSSES
@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
def test_no_temperature_other_than_one(run: Run, backward: LossBackward) -> None:
    """Bitwise: telling so spares an exponential a logit, and greedy tokens are still told apart."""
    args = case(30, backward=backward, config=GrpoLossConfig(greedy_tokens="exclude"))
    results = [call_loss(run, args, tempered=tempered) for tempered in (True, False)]
    assert results[0][1] == results[1][1] and results[0][1]["greedy_frac"] > 0
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    with pytest.raises(ValueError, match=r"tempered=False, but temperature\[2\] is 0.5: neither 0 nor 1"):
        call_loss(
            run, args | {"temperature": args["temperature"].index_fill(0, torch.tensor([2]), 0.5)}, tempered=False
        )


@LOSSES
@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
def test_the_host_says_how_many_rows_count(run: Run, backward: LossBackward) -> None:
    """Then no op asks the device, and the result is the same."""
    args = loss_arguments(problem(30, 150, 20, torch.float32)) | {"backward": backward}
    count = int((args["weights"] != 0).sum())
    asked, asked_metrics = call_loss(run, args)
    told, metrics = call_loss(run, args, num_counted=count)
    assert metrics == asked_metrics and all(torch.equal(a, b) for a, b in zip(told, asked, strict=True))
    with pytest.raises(ValueError, match=f"num_counted is {count - 1}, but {count} rows count"):
        call_loss(run, args, num_counted=count - 1)
    with pytest.raises(ValueError, match=r"num_counted must be in \[0, 30\] \(the rows\), got 31"):
        call_loss(run, args, num_counted=31)


@pytest.mark.parametrize("num_counted", [None, 4, 6])
@pytest.mark.parametrize("backward", get_args(LossBackward))
def test_nothing_waits_for_a_count_that_is_known(
    backward: LossBackward, num_counted: int | None, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tensor without values a look raises; of the ops that run none is a nonzero."""
    monkeypatch.delenv("THYME_VALIDATE", raising=False)

    def step() -> None:
        with torch.device("meta"):
            hidden, weight = torch.zeros(6, 8, requires_grad=True), torch.zeros(50, 8, requires_grad=True)
            loss, _ = linear_grpo_loss_triton(
                hidden,
                weight,
                torch.zeros(6, dtype=torch.int64),
                torch.ones(6),
                torch.ones(6),
                temperature=torch.ones(6),
                num_counted=num_counted,
                backward=backward,
            )
            loss.backward()

    if num_counted is None:
        with pytest.raises((RuntimeError, NotImplementedError)):
            step()
        return
    with Watch() as watch:
        step()
    names = {name for name, _, _ in watch.seen}
    assert not names & {"nonzero", "item", "_local_scalar_dense", "masked_select"}
    assert ("index_select" in names) == (num_counted == 4)
