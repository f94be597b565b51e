"""truncated_logprobs: against an explicit masked softmax in float64, and against the sampler, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss, grpo_loss_ref, grpo_loss_triton
from thyme.kernels.sample import sample, sample_triton
from thyme.kernels.token_logprobs import token_logprobs
from thyme.kernels.truncated_logprobs import truncated_logprobs, truncated_logprobs_ref, truncated_logprobs_triton

RUNS = [truncated_logprobs_ref, truncated_logprobs, truncated_logprobs_triton]
ALL = pytest.mark.parametrize("run", RUNS, ids=["ref", "native", "triton"])
Run = Callable[..., tuple[Tensor, Tensor]]
CUTS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all three": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "one a row": {"top_k": torch.tensor([0, 3, 0, 50, 1, 0, 7, 0]), "top_p": torch.linspace(0.3, 1.0, 8)},
    "none that cuts": {"top_k": 10_000, "top_p": 1.0, "min_p": 0.0},
}
EVERY_CUT = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
AMONG: dict[str, Any] = {"vocab_size": 180, "banned_ids": (3, 100)}


def problem(ties: bool = False) -> tuple[Tensor, Tensor]:
    """8 rows of logits and temperatures, one greedy; with ties, of few values."""
    logits = torch.randn(8, 200) * 3
    logits = (logits / 2).round() if ties else logits
    return logits, torch.tensor([1.0, 0.7, 0.0, 1.3, 1.0, 0.5, 2.0, 1.0])


def drawn(logits: Tensor, temperature: Tensor, cuts: dict[str, Any]) -> Any:
    index = torch.arange(len(logits))
    return sample(logits, temperature, seed=index * 7, position=index, **AMONG, **cuts)


def kept_by_sorting(row: Tensor, tau: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The kept ids of a float64 row, one by one: top_k, then top_p on what it left, then min_p."""
    allowed = [i for i in range(AMONG["vocab_size"]) if i not in AMONG["banned_ids"]]
    order = sorted(allowed, key=lambda i: (-row[i].item(), i))
    p = dict(zip(allowed, (row[allowed] / tau).softmax(-1).tolist(), strict=True))
    order = order[:top_k] if top_k else order
    mass, before, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if top_p < 1 and before >= top_p * mass:
            break
        kept.append(i)
        before += p[i]
    return [i for i in kept if p[i] >= min_p * max(p.values())]


def oracle(logits: Tensor, targets: Tensor, temperature: Tensor, cuts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) by an explicit mask, differentiable."""

    def cut(name: str, row: int, off: Any) -> Any:
        value = cuts.get(name, off)
        return value[row].item() if isinstance(value, Tensor) else value

    allowed = [i for i in range(AMONG["vocab_size"]) if i not in AMONG["banned_ids"]]
    logprobs, entropies = [], []
    for row, z in enumerate(logits):
        tau, kept = temperature[row].item() or 1.0, allowed
        if temperature[row] > 0:
            kept = kept_by_sorting(
                z.detach(), tau, cut("top_k", row, 0), cut("top_p", row, 1.0), cut("min_p", row, 0.0)
            )
        mask = torch.full_like(z, -torch.inf)
        mask[[*kept, int(targets[row])]] = 0.0
        logprobs.append((z / tau + mask).log_softmax(-1)[targets[row]])
        raw = z[allowed].log_softmax(-1)
        entropies.append(-(raw.exp() * raw).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@EVERY_CUT
@pytest.mark.parametrize("ties", [False, True], ids=["plain", "ties"])
@ALL
def test_against_an_explicit_masked_softmax(run: Run, ties: bool, cuts: dict[str, Any], tolerances: dict) -> None:
    logits, temperature = problem(ties)
    targets = drawn(logits, temperature, cuts).token
    targets[4] = 57  # likely not kept: a policy that has moved on
    upstream = torch.randn(2, 8, dtype=torch.float64)
    results = []
    for of, dtype in ((run, torch.float32), (truncated_logprobs_ref, torch.float64), (None, torch.float64)):
        z = logits.to(dtype).requires_grad_()
        outs = (
            oracle(z, targets, temperature, cuts)
            if of is None
            else of(z, targets, temperature=temperature, **AMONG, **cuts)
        )
        (grad,) = torch.autograd.grad(sum((u.to(dtype) * out).sum() for u, out in zip(upstream, outs, strict=True)), z)
        results.append((*(out.detach().double() for out in outs), grad.double()))
    for got, exact in zip(results[1], results[2], strict=True):
        torch.testing.assert_close(got, exact, atol=1e-12, rtol=1e-10)
    for got, exact, what in zip(results[0], results[2], ("logprob", "entropy", "grad"), strict=True):
        atol, rtol = tolerances[what, torch.float32]
        torch.testing.assert_close(got, exact, atol=max(atol, 2e-6), rtol=rtol)


@EVERY_CUT
def test_it_is_what_the_sampler_drew_from(cuts: dict[str, Any]) -> None:
    """Bit for bit logprob - log(kept_mass), in any batch; and the ids that get a gradient hold the kept mass."""
    logits, temperature = problem()
    out = drawn(logits, temperature, cuts)
    counted = temperature > 0
    more = {"temperature": temperature, **AMONG}
    z = logits.clone().requires_grad_()
    logprob, entropy = truncated_logprobs(z, out.token, **more, **cuts)
    assert torch.equal(logprob[counted], (out.logprob - out.kept_mass.log())[counted])
    assert torch.equal(entropy, out.entropy)
    assert torch.equal(logprob[~counted], token_logprobs(logits, out.token, **more)[0][~counted])
    logprob.sum().backward()
    for row in range(8):
        at = slice(row, row + 1)
        alone = {name: cut[at] if isinstance(cut, Tensor) else cut for name, cut in cuts.items()}
        some = more | {"temperature": temperature[at]}
        assert torch.equal(truncated_logprobs(logits[at], out.token[at], **some, **alone)[0], logprob[at])
        if counted[row] and out.kept_mass[row] < 1:
            among = logits[row, :180].double().index_fill(0, torch.tensor(AMONG["banned_ids"]), -torch.inf)
            moved = z.grad[row, :180] != 0
            moved[out.token[row]] = True  # alone its gradient is 0
            mass = (among / temperature[row]).softmax(-1)[moved].sum()
            assert mass.item() == pytest.approx(out.kept_mass[row].item(), abs=1e-6)


@EVERY_CUT
def test_the_triton_sampler_keeps_the_same_mass(cuts: dict[str, Any]) -> None:
    logits, temperature = problem()
    index = torch.arange(8)
    out = sample_triton(logits, temperature, seed=index * 7, position=index, **AMONG, **cuts)
    more = {"temperature": temperature, **AMONG, **cuts}
    counted = temperature > 0
    got = truncated_logprobs_triton(logits, out.token, **more)[0]
    torch.testing.assert_close(got[counted], (out.logprob - out.kept_mass.log())[counted], atol=2e-5, rtol=0)


@pytest.mark.gpu
@EVERY_CUT
def test_a_gpu_computes_what_a_cpu_does(cuts: dict[str, Any]) -> None:
    logits, temperature = problem()
    targets = drawn(logits, temperature, cuts).token
    results = []
    for device in ("cpu", "cuda"):
        z = logits.to(device).requires_grad_()
        some = {name: cut.to(device) if isinstance(cut, Tensor) else cut for name, cut in cuts.items()}
        outs = truncated_logprobs(z, targets.to(device), temperature=temperature.to(device), **AMONG, **some)
        (outs[0].sum() + outs[1].sum()).backward()
        results.append([x.detach().cpu() for x in (*outs, z.grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [grpo_loss_ref, grpo_loss, grpo_loss_triton], ids=["ref", "native", "triton"])
def test_the_loss_of_truncated_rollouts(run: Run) -> None:
    """On-policy every ratio to the recorded log-prob is 1; the gradient is the policy gradient over the kept ids."""
    logits, _ = problem()
    temperature, cuts = torch.tensor([1.0, 0.7, 0.5, 1.3, 1.0, 0.5, 2.0, 1.0]), {"top_k": 9, "top_p": 0.8}
    out = drawn(logits, temperature, cuts)
    recorded = out.logprob - out.kept_mass.log()
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    advantages = torch.tensor([1.0, -1.0, 2.0, 5.0, 0.0, 1.0, -2.0, 1.0])
    dirty = logits.clone()
    dirty[3] = torch.nan  # weight 0
    z = dirty.requires_grad_()
    more = {"temperature": temperature, "rollout_logprobs": recorded, "config": GrpoLossConfig(), **AMONG, **cuts}
    loss, metrics = run(z, out.token, advantages, weights, old_logprobs=recorded, **more)
    loss.backward()
    found = metrics.as_dict()
    assert found["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    if run is grpo_loss:
        assert found["ratio"] == found["ratio_max"] == found["ess"] == 1.0
        assert found["mismatch_kl"] == 0.0
    exact = logits.double().requires_grad_()
    (-(weights * advantages) * oracle(exact, out.token, temperature, cuts)[0]).sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=2e-6, rtol=1e-5)
    assert (z.grad[3] == 0).all()


def test_bfloat16_is_taken_by_the_reference() -> None:
    logits, temperature = problem()
    targets = drawn(logits, temperature, {"top_k": 5}).token
    narrow = logits.bfloat16().requires_grad_()
    got = truncated_logprobs(narrow, targets, temperature=temperature, top_k=5, **AMONG)[0]
    got.sum().backward()
    exact = truncated_logprobs(logits.bfloat16().double(), targets, temperature=temperature, top_k=5, **AMONG)[0]
    torch.testing.assert_close(got.double(), exact, atol=5e-5, rtol=0)
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16


def test_bad_arguments() -> None:
    logits, targets = torch.randn(4, 20), torch.zeros(4, dtype=torch.int64)
    for change, message in (
        ({}, "top_k, top_p and min_p are all None"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"min_p": torch.ones(3)}, r"min_p must have shape \[4\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            truncated_logprobs(logits, targets, **change)
