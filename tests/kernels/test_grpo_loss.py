"""grpo_loss: values and gradients against a loop over tokens in float64, and properties that need no reference."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thyme.kernels import policy_loss as stage
from thyme.kernels import policy_tokens
from thyme.kernels.grpo_loss import (
    GrpoLossConfig,
    GrpoMetrics,
    grpo_loss,
    grpo_loss_ref,
    grpo_loss_triton,
    policy_loss,
)
from thyme.kernels.token_logprobs import token_logprobs, token_logprobs_ref, token_logprobs_triton

# On a CPU the public op's row pass is the C++ for float32, and the reference for the other dtypes.
ALL = pytest.mark.parametrize("run", [grpo_loss_ref, grpo_loss, grpo_loss_triton], ids=["ref", "native", "triton"])
Run = Callable[..., tuple[Tensor, GrpoMetrics]]


def problem(num_rows: int = 12, vocab: int = 300, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A packed batch of three sequences that uses everything: masked rows, four temperatures, bans, three policies."""
    excluded = {"vocab_size": vocab - 40, "banned_ids": (2, vocab - 45)} if vocab > 60 else {}
    logits = (torch.randn(num_rows, vocab, dtype=torch.float64) * 2).to(dtype)
    targets = torch.randint(3, vocab - 45, (num_rows,)) if excluded else torch.randint(0, vocab, (num_rows,))
    weights = torch.rand(num_rows) + 0.1
    weights[3::4] = 0.0
    temperature = torch.tensor([1.0, 0.0, 1.6, 1.0, 0.7])[torch.arange(num_rows) % 5]
    logprob = token_logprobs_ref(logits.double(), targets, temperature=temperature, **excluded)[0]
    bounds = sorted({0, num_rows // 3, num_rows // 2, num_rows})
    return {
        "logits": logits,
        "targets": targets,
        "advantages": torch.randn(num_rows, dtype=torch.float64),
        "weights": weights.double(),
        "old_logprobs": logprob + 0.3 * torch.randn(num_rows, dtype=torch.float64),
        "ref_logprobs": logprob + 0.3 * torch.randn(num_rows, dtype=torch.float64),
        "rollout_logprobs": logprob + 0.2 * torch.randn(num_rows, dtype=torch.float64),
        "temperature": temperature,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "segments": (torch.arange(num_rows) % 2).to(torch.uint8),
        **excluded,
    }


def call(run: Run, args: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """loss, d loss / d logits, metrics."""
    args = args | more
    logits = args.pop("logits").detach().clone().requires_grad_()
    loss, metrics = run(logits, args.pop("targets"), args.pop("advantages"), args.pop("weights"), **args)
    loss.backward()
    return loss.detach(), logits.grad, metrics.as_dict()


def oracle(args: dict[str, Any], config: GrpoLossConfig) -> tuple[Tensor, Tensor]:
    """The loss written out token by token on torch.log_softmax, gradients by autograd."""
    z = args["logits"].double().clone().requires_grad_()
    counted = torch.ones(z.shape[1], dtype=torch.bool)
    counted[args.get("vocab_size", z.shape[1]) :] = False
    counted[list(args.get("banned_ids", ()))] = False
    active = [t for t in range(len(z)) if args["weights"][t] != 0]
    greedy = {t: args["temperature"][t] == 0 for t in active}
    logprob, entropy = {}, {}
    for t in active:
        row = z[t].masked_fill(~counted, -torch.inf)
        tau = 1.0 if greedy[t] else args["temperature"][t].double()
        logprob[t] = (row / tau).log_softmax(-1)[args["targets"][t]]
        raw = z[t][counted].log_softmax(-1)
        entropy[t] = -(raw.exp() * raw).sum()
    log_ratio = {t: logprob[t] - args["old_logprobs"][t] for t in active}
    token_ratio = {t: log_ratio[t].exp() for t in active}
    ratio = dict(token_ratio)
    if config.loss.startswith("gspo"):
        bounds = args["cu_seqlens"].tolist()
        for first, last in pairwise(bounds):
            tokens = [t for t in active if first <= t < last]
            for t in tokens:
                mean = torch.stack([log_ratio[u] for u in tokens]).mean()
                own = logprob[t] - logprob[t].detach()
                ratio[t] = (mean if config.loss == "gspo" else mean.detach() + own).exp()
    loss = torch.zeros((), dtype=torch.float64)
    for t in active:
        a, r = args["advantages"][t], ratio[t]
        clipped = r.clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)
        capped = r if config.ratio_cap is None else r.clamp(max=config.ratio_cap)
        policy = -clipped.detach() * a * logprob[t] if config.loss == "cispo" else -torch.min(capped * a, clipped * a)
        if config.greedy_tokens == "is_pi" and greedy[t]:
            policy = policy * logprob[t].detach().exp()
        if config.rollout_ratio_cap is not None:
            policy = policy * (args["old_logprobs"][t] - args["rollout_logprobs"][t]).exp().clamp(
                max=config.rollout_ratio_cap
            )
        d = args["ref_logprobs"][t] - logprob[t]
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[config.kl]
        kl = kl * token_ratio[t] if config.kl_times_ratio else kl
        per_token = policy + config.kl_coef * kl - config.entropy_coef * entropy[t]
        if not (config.greedy_tokens == "exclude" and greedy[t]):
            loss = loss + args["weights"][t] * per_token
    loss.backward()
    return loss.detach(), z.grad


CONFIGS = {
    "default": GrpoLossConfig(),
    "clip bounds": GrpoLossConfig(clip_eps_low=0.1, clip_eps_high=0.28, kl_coef=0.0),
    "two-sided": GrpoLossConfig(clip_eps_high=0.1, ratio_cap=1.15),
    "k1": GrpoLossConfig(kl="k1", kl_coef=0.3),
    "k2": GrpoLossConfig(kl="k2", kl_coef=0.3),
    "k3 times ratio": GrpoLossConfig(kl_coef=0.3, kl_times_ratio=True),
    "entropy bonus": GrpoLossConfig(entropy_coef=0.2),
    "gspo": GrpoLossConfig(loss="gspo", clip_eps_low=0.05, clip_eps_high=0.05),
    "gspo per token": GrpoLossConfig(loss="gspo_token", clip_eps_low=0.05, clip_eps_high=0.05),
    "cispo": GrpoLossConfig(loss="cispo"),
    "truncated importance": GrpoLossConfig(rollout_ratio_cap=1.1),
    "greedy excluded": GrpoLossConfig(greedy_tokens="exclude", entropy_coef=0.1, kl_coef=0.3),
    "greedy is_pi": GrpoLossConfig(greedy_tokens="is_pi", kl_coef=0.3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reference_is_the_token_loop(config: GrpoLossConfig) -> None:
    args = problem()
    loss, grad, _ = call(grpo_loss_ref, args, config=config)
    expected_loss, expected_grad = oracle(args, config)
    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-10)
    assert (grad[args["weights"] == 0] == 0).all()


def close(got: Tensor, exact: Tensor, what: str, tolerances: dict) -> None:
    atol, rtol = tolerances[what, got.dtype]
    torch.testing.assert_close(got.double(), exact, atol=atol, rtol=rtol)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_triton_against_float64(config: GrpoLossConfig, tolerances: dict) -> None:
    args = problem()
    loss, grad, metrics = call(grpo_loss_triton, args | {"logits": args["logits"].float()}, config=config)
    args["logits"] = args["logits"].float().double()
    exact_loss, exact_grad, exact_metrics = call(grpo_loss_ref, args, config=config)
    close(loss, exact_loss, "loss", tolerances)
    close(grad, exact_grad, "grad", tolerances)
    assert metrics == pytest.approx(exact_metrics, abs=2e-5, rel=1e-5)


# One row, one column; odd sizes; two blocks of 8192, the second with one column; more rows than one CPU chunk holds.
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (1, 257), (7, 131), (2, 8193), (150, 8009)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@ALL
def test_shapes_and_dtypes(run: Run, num_rows: int, vocab: int, dtype: torch.dtype, tolerances: dict) -> None:
    if run is grpo_loss_triton and num_rows > 100:
        num_rows = 5  # a program a row: the chunks are the reference's
    config = GrpoLossConfig(entropy_coef=0.1)
    args = problem(num_rows, vocab, dtype)
    loss, grad, _ = call(run, args, config=config)
    exact_loss, exact_grad, _ = call(grpo_loss_ref, args | {"logits": args["logits"].double()}, config=config)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    close(loss, exact_loss, "loss", tolerances)
    close(grad, exact_grad, "grad", tolerances)


@ALL
def test_rows_of_weight_zero_may_hold_anything(run: Run) -> None:
    args = problem(dtype=torch.float32)
    clean = call(run, args)
    masked = args["weights"] == 0
    dirty = {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}
    for name in ("logits", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "temperature"):
        dirty[name][masked] = torch.nan
    dirty["targets"][masked] = -100
    loss, grad, metrics = call(run, dirty)
    assert loss == clean[0]
    assert torch.equal(grad, clean[1])
    assert (grad[masked] == 0).all()
    assert metrics == clean[2]


@ALL
def test_all_rows_masked(run: Run) -> None:
    args = problem(dtype=torch.float32)
    args["logits"].fill_(torch.nan)
    loss, grad, metrics = call(run, args, weights=torch.zeros(12))
    assert loss == 0
    assert (grad == 0).all()
    assert set(metrics.values()) == {0.0}


@ALL
def test_on_policy_the_ratio_is_one(run: Run) -> None:
    """Without old_logprobs, and with old_logprobs from the same row pass, bit for bit."""
    args = problem(dtype=torch.float32)
    passes = {grpo_loss_ref: token_logprobs_ref, grpo_loss: token_logprobs, grpo_loss_triton: token_logprobs_triton}
    more = {name: args[name] for name in ("temperature", "vocab_size", "banned_ids")}
    same = passes[run](args["logits"], args["targets"], mask=args["weights"] != 0, **more)[0].detach()
    results = [call(run, args, old_logprobs=old, rollout_logprobs=None) for old in (None, same)]
    for _, _, metrics in results:
        assert metrics["ratio"] == metrics["ratio_max"] == metrics["ess"] == 1.0
        assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == metrics["kl_old"] == 0.0
    assert torch.equal(results[0][1], results[1][1])


@ALL
def test_tokens_in_another_order_in_parts_and_doubled(run: Run) -> None:
    args = {name: value for name, value in problem(dtype=torch.float32).items() if name not in ("cu_seqlens",)}
    tokens = [name for name, value in args.items() if isinstance(value, Tensor)]

    def pick(at: Tensor) -> dict[str, Any]:
        return args | {name: args[name][at] for name in tokens}

    loss, grad, _ = call(run, args)
    order = torch.randperm(12)
    permuted = call(run, pick(order))
    assert torch.equal(permuted[1], grad[order])
    torch.testing.assert_close(permuted[0], loss, atol=1e-6, rtol=0)
    parts = [call(run, pick(part)) for part in torch.arange(12).split(5)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([part[1] for part in parts]), grad)
    twice = pick(torch.arange(12).repeat(2))
    doubled = call(run, twice | {"weights": twice["weights"] / 2})
    torch.testing.assert_close(doubled[0], loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(doubled[1][:12] + doubled[1][12:], grad, atol=1e-9, rtol=1e-6)


@ALL
def test_a_zero_coefficient_is_no_term(run: Run) -> None:
    args = problem(dtype=torch.float32)
    without = call(run, args, ref_logprobs=None)
    zero = call(run, args, config=GrpoLossConfig(kl_coef=0.0))
    assert without[0] == zero[0]
    assert torch.equal(without[1], zero[1])
    assert "kl_ref" in zero[2]
    assert "kl_ref" not in without[2]
    for held in (float("-inf"), float("inf"), float("nan")):  # not even where 0 times it is no number
        spoilt = args | {"ref_logprobs": torch.full_like(args["ref_logprobs"], held)}
        ignored = call(run, spoilt, config=GrpoLossConfig(kl_coef=0.0))
        assert without[0] == ignored[0]
        assert torch.equal(without[1], ignored[1])


class Watch(TorchDispatchMode):
    """Lists the operators that torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_gspo_adds_in_a_fixed_order() -> None:
    """On a GPU adding to an index goes by atomics: loss and gradient would change from run to run."""
    with Watch() as watch:
        stage_of("ref", tokens(), GrpoLossConfig(loss="gspo"))
    assert "segment_reduce" in watch.seen
    assert not {name for name in watch.seen if name.startswith(("index_add", "scatter_add"))}
    assert "atomic" not in Path(policy_tokens.__file__).read_text().replace("atomics", "")


@ALL
def test_clipped_tokens_have_no_gradient(run: Run) -> None:
    """Beyond the clip in the advantage's direction the gradient is exactly 0, on the other side it is not."""
    args = problem(8, 60, torch.float32)
    args["weights"] = torch.ones(8)
    logprob = token_logprobs_ref(args["logits"], args["targets"], temperature=args["temperature"])[0]
    up = torch.arange(8) % 2 == 0
    good = torch.arange(8) < 4
    more = {
        "old_logprobs": logprob - torch.where(up, 0.5, -0.5),
        "advantages": torch.where(good, 1.0, -1.0),
        "ref_logprobs": None,
    }
    _, grad, metrics = call(run, args, **more)
    assert ((grad == 0).all(-1) == (up == good)).all()
    assert metrics["clip_frac_high"] == metrics["clip_frac_low"] == 0.25


def test_backward_does_not_read_rows_without_gradient() -> None:
    args = problem(6, 60, torch.float32)
    logits = args["logits"].clone().requires_grad_()
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0, 0.0])
    loss, _ = grpo_loss_triton(logits, args["targets"], advantages, torch.ones(6), config=GrpoLossConfig(kl_coef=0.0))
    with torch.no_grad():
        logits.data[advantages == 0] = torch.nan  # .data: autograd must not notice
    loss.backward()
    assert (logits.grad[advantages == 0] == 0).all()
    assert logits.grad[advantages != 0].isfinite().all()


@ALL
def test_greedy_modes(run: Run) -> None:
    """What each mode does to the gradient of greedy rows; other rows never change."""
    args = problem(10, 60, torch.float32)
    args |= {"weights": torch.ones(10), "ref_logprobs": None, "old_logprobs": None}
    greedy = args["temperature"] == 0
    raw, excluded, is_pi = (
        call(run, args, config=GrpoLossConfig(greedy_tokens=mode))[1] for mode in ("raw", "exclude", "is_pi")
    )
    as_one = call(run, args, temperature=args["temperature"].masked_fill(greedy, 1.0))[1]
    assert torch.equal(raw, as_one)
    assert (excluded[greedy] == 0).all()
    p = args["logits"].softmax(-1).gather(-1, args["targets"][:, None])
    torch.testing.assert_close(is_pi[greedy], (raw * p)[greedy], atol=1e-7, rtol=1e-5)
    for other in (excluded, is_pi):
        assert torch.equal(other[~greedy], raw[~greedy])
    with pytest.raises(ValueError, match=r"temperature\[1\] is 0 under greedy_tokens='soft'"):
        call(run, args, config=GrpoLossConfig(greedy_tokens="soft"))
    soft = args["temperature"].masked_fill(greedy, 0.2)
    tempered = call(run, args, temperature=soft, config=GrpoLossConfig(greedy_tokens="soft"))[1]
    exact = call(grpo_loss_ref, args | {"logits": args["logits"].double()}, temperature=soft)[1]
    torch.testing.assert_close(tempered.double(), exact, atol=2e-6, rtol=1e-5)


@ALL
def test_metrics(run: Run) -> None:
    args = problem(40, 60, torch.float32)
    args["advantages"][::5] = 0.0  # neither side of the clip
    _, _, metrics = call(run, args)
    exact = {name: args[name].double() for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    more = {name: args[name] for name in ("temperature",)}
    logprob, entropy = token_logprobs_ref(args["logits"].double(), args["targets"], **more)
    ratio = (logprob - exact["old_logprobs"]).exp()
    d = exact["ref_logprobs"] - logprob
    mismatch = exact["old_logprobs"] - exact["rollout_logprobs"]
    importance = (logprob - exact["rollout_logprobs"]).exp()
    for suffix, code in (("", (0, 1)), ("_text", (0,)), ("_code", (1,))):
        at = (args["weights"] != 0) & torch.isin(args["segments"], torch.tensor(code))
        expected = {
            "tokens": at.sum(),
            "entropy": entropy[at].mean(),
            "logprob": logprob[at].mean(),
            "ratio": ratio[at].mean(),
            "ratio_max": ratio[at].max(),
            "kl_old": (exact["old_logprobs"] - logprob)[at].mean(),
            "kl_ref": (d.exp() - d - 1)[at].mean(),
            "mismatch_kl": (mismatch.exp() - mismatch - 1)[at].mean(),
            "clip_frac_low": ((ratio < 0.8) & (args["advantages"] < 0))[at].double().mean(),
            "clip_frac_high": ((ratio > 1.2) & (args["advantages"] > 0))[at].double().mean(),
            "greedy_frac": (args["temperature"] == 0)[at].double().mean(),
            "clamp_frac": torch.zeros(()),
            "ess": importance[at].sum() ** 2 / importance[at].square().sum() / at.sum(),
        }
        assert {name + suffix for name in expected} <= set(metrics)
        for name, value in expected.items():
            assert metrics[name + suffix] == pytest.approx(value.item(), abs=1e-5), name + suffix
    assert len(metrics) == 3 * len(expected)


def test_far_off_ratios_are_clamped_and_counted() -> None:
    """exp(100) would be infinite and inf * 0 NaN; the clamp keeps loss and gradient finite and says how often."""
    logprob = torch.tensor([-1.0, -200.0, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.5, -1.0, -400.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    loss, metrics = policy_loss(logprob, ones, -ones, ones, old_logprobs=old, ref_logprobs=-old)
    loss.backward()
    assert loss.isfinite()
    assert logprob.grad is not None
    assert logprob.grad.isfinite().all()
    assert metrics.as_dict()["clamp_frac"] == pytest.approx(2 / 3)
    assert metrics.as_dict()["ratio_max"] == pytest.approx(math.exp(20), rel=1e-6)


def tokens(size: int = 300) -> dict[str, Any]:
    """Per-token arguments of `policy_loss` that use everything: ratios and differences on both sides of every bound."""
    random = partial(torch.randn, dtype=torch.float64)
    logprob, weights = -random(size).abs(), torch.rand(size, dtype=torch.float64) + 0.1
    weights[3::4] = 0.0
    more = {name: logprob + 0.4 * random(size) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    more["old_logprobs"][5], more["ref_logprobs"][6], more["rollout_logprobs"][8] = -40.0, 30.0, -50.0
    return more | {
        "logprob": logprob,
        "entropy": random(size).abs(),
        "advantages": random(size),
        "weights": weights,
        "temperature": (torch.arange(size) % 5 != 0).double(),
        "cu_seqlens": torch.tensor([0, 100, 100, 101, size], dtype=torch.int32),
        "segments": (torch.arange(size) % 3 == 0).to(torch.uint8),
    }


def stage_of(backend: Any, args: dict[str, Any], config: GrpoLossConfig) -> tuple[Tensor, list[Tensor], dict]:
    """Loss, gradients by logprob and entropy of 3 times the loss, metrics."""
    dtype = torch.float64 if backend == "ref" else torch.float32
    args = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    leaves = [args.pop(name).requires_grad_() for name in ("logprob", "entropy")]
    loss, metrics = policy_loss(
        *leaves, args.pop("advantages"), args.pop("weights"), **args, config=config, backend=backend
    )
    grads = torch.autograd.grad(3 * loss, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(leaves[0]) if g is None else g for g in grads], metrics.as_dict()


ABSENT = ((), ("segments",), ("old_logprobs",), ("ref_logprobs", "rollout_logprobs", "segments", "temperature"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_one_pass_is_the_definition(backend: str, config: GrpoLossConfig, tolerances: dict) -> None:
    """Every variant over several blocks of tokens, with and without each input; far off, masked and greedy tokens."""
    atol, rtol = tolerances["loss", torch.float32]
    for absent in ABSENT:
        needs_temperature = config.greedy_tokens != "raw" and "temperature" in absent
        if needs_temperature or (config.rollout_ratio_cap is not None and "rollout_logprobs" in absent):
            continue
        args = {name: None if name in absent else value for name, value in tokens().items()}
        exact_loss, exact_grads, exact_metrics = stage_of("ref", args, config)
        loss, grads, metrics = stage_of(backend, args, config)
        torch.testing.assert_close(loss.double(), exact_loss, atol=atol, rtol=rtol)
        for got, exact in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(got.double(), exact, atol=2e-6, rtol=1e-5)
            assert (got[args["weights"] == 0] == 0).all()
        assert list(metrics) == list(exact_metrics)
        assert metrics == pytest.approx(exact_metrics, abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_token_does_not_know_its_place(backend: str) -> None:
    """Bitwise, in another order and among fewer."""
    args = {name: value for name, value in tokens().items() if name != "cu_seqlens"}
    config = GrpoLossConfig(entropy_coef=0.1, kl_coef=0.2, rollout_ratio_cap=1.1)
    _, whole, _ = stage_of(backend, args, config)
    for at in (torch.randperm(300), torch.arange(299, 37, -3)):
        _, part, _ = stage_of(backend, {name: value[at] for name, value in args.items()}, config)
        assert all(torch.equal(got, all_of[at]) for got, all_of in zip(part, whole, strict=True))


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_the_one_pass_is_two_launches_and_a_product(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in torch it is some ninety small kernels each time."""
    launched = []

    class Launches:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: launched.append(self.name)

    for name in ("_sequences_kernel", "_tokens_kernel", "_finish_kernel"):
        monkeypatch.setattr(policy_tokens, name, Launches(name))
    args = {name: x.float() if x.is_floating_point() else x for name, x in tokens().items()}
    leaf = args["logprob"].clone().requires_grad_()
    order = ("entropy", "advantages", "weights", "old_logprobs", "ref_logprobs", "rollout_logprobs", "temperature")
    inputs = stage.TokenInputs(leaf, *(args[name] for name in (*order, "cu_seqlens", "segments")))
    with Watch() as watch:
        stage._one_pass(inputs, GrpoLossConfig(loss=loss), in_triton=True)[0].backward()
    assert launched == ["_sequences_kernel"] * (loss == "gspo") + ["_tokens_kernel", "_finish_kernel"]
    harmless = {"alias", "detach", "empty", "new_empty", "ones_like", "select", "slice", "unbind", "view"}
    assert [name for name in watch.seen if name not in harmless] == ["mul"]


def test_no_tokens(tolerances: dict) -> None:
    none = {name: value[:0] for name, value in tokens().items()} | {"cu_seqlens": torch.tensor([0], dtype=torch.int32)}
    for backend in ("ref", "native", "triton"):
        for loss in ("ppo", "gspo"):
            value, _, metrics = stage_of(backend, none, GrpoLossConfig(loss=loss))
            assert value == 0
            assert set(metrics.values()) == {0.0}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(8)}, r"logits must have shape \[any, any\], got \[8\]"),
    "rows": ({"advantages": torch.ones(5)}, r"advantages must have shape \[12\], got \[5\]"),
    "target type": ({"targets": torch.zeros(12, dtype=torch.int32)}, "targets must be torch.int64, got torch.int32"),
    "target range": ({"targets": torch.full((12,), 260)}, r"targets must be in \[0, 259\], got 260"),
    "banned target": ({"targets": torch.full((12,), 2)}, r"targets\[0\] is 2, a banned id"),
    "temperature": ({"temperature": torch.full((12,), -1.0)}, r"temperature must be in \[0.0, .* got -1.0"),
    "weights": ({"weights": torch.full((12,), torch.nan)}, "weights must be finite"),
    "device": ({"ref_logprobs": torch.ones(12, device="meta")}, "ref_logprobs is on meta"),
    "segments": ({"segments": torch.full((12,), 2, dtype=torch.uint8)}, r"segments must be in \[0, 1\], got 2"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, r"cu_seqlens must rise from 0 to 12"),
    "gspo alone": ({"cu_seqlens": None, "config": GrpoLossConfig(loss="gspo")}, "loss='gspo' needs cu_seqlens"),
    "cap alone": (
        {"rollout_logprobs": None, "config": GrpoLossConfig(rollout_ratio_cap=2.0)},
        "rollout_ratio_cap needs rollout_logprobs",
    ),
    "exclude alone": (
        {"temperature": None, "config": GrpoLossConfig(greedy_tokens="exclude")},
        "greedy_tokens='exclude' needs temperature",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(run, problem(dtype=torch.float32) | change)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "reinforce", "loss must be one of ppo, gspo"),
        ("kl", "k4", "kl must be one of k1, k2, k3, got 'k4'"),
        ("greedy_tokens", "no", "greedy_tokens must be one of raw"),
        ("clip_eps_low", -0.1, "clip_eps_low must be finite and >= 0, got -0.1"),
        ("kl_coef", math.nan, "kl_coef must be finite"),
        ("ratio_cap", 1.1, r"ratio_cap must be >= 1 \+ clip_eps_high = 1.2, got 1.1"),
        ("rollout_ratio_cap", 0.0, "rollout_ratio_cap must be finite and > 0"),
    ],
)
def test_bad_config(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrpoLossConfig(**{field: value})
