"""What only a GPU can show: compiled kernels in every dtype at real sizes, bits that repeat, also from a graph and in
poisoned memory, offsets beyond 32 bits, no wait, no recompile."""

from typing import Any

import every_kernel
import pytest
import torch
from torch import Tensor

from thyme.kernels import row_stats, sample_blocks, sample_cut
from thyme.kernels import token_logprobs as row_module
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss, grpo_loss_ref
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref
from thyme.kernels.sample import sample, sample_ref
from thyme.kernels.token_logprobs import token_logprobs

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def rows_of(num_rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logits = (torch.randn(num_rows, vocab, device="cuda") * 3).to(dtype)
    temperature = torch.tensor([1.0, 0.0, 0.6, 1.5], device="cuda")[torch.arange(num_rows, device="cuda") % 4]
    return logits, temperature, torch.randint(-(2**62), 2**62, (num_rows,), device="cuda")


LIMITS = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}]


@DTYPES
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 163), (200, 163), (7, 9001), (33, 152_064)])
def test_sample(num_rows: int, vocab: int, limits: dict[str, Any], dtype: torch.dtype, tolerances: dict) -> None:
    logits, temperature, seed = rows_of(num_rows, vocab, dtype)
    more = {"seed": seed, "position": torch.arange(num_rows, device="cuda"), **limits, "banned_ids": (0, 5, vocab - 1)}
    out = sample(logits, temperature, **more)
    exact = sample_ref(logits.double(), temperature, **more)
    same = out.token == exact.token
    # u falls within float32 rounding of a cdf step about once in ten thousand rows of this width.
    assert (~same).sum() <= max(1, num_rows // 20)
    for name in ("logprob", "logprob_raw", "entropy"):
        atol, rtol = tolerances["entropy" if name == "entropy" else "logprob", dtype]
        got, wanted = getattr(out, name)[same].double(), getattr(exact, name)[same]
        torch.testing.assert_close(got, wanted, atol=max(atol, 5e-5), rtol=rtol)
    torch.testing.assert_close(out.kept_mass.double(), exact.kept_mass.double(), atol=1e-4, rtol=0)
    again = sample(logits, temperature, **more)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    for row in range(0, num_rows, 11):
        at = slice(row, row + 1)
        alone = sample(logits[at], temperature[at], **more | {"seed": seed[at], "position": more["position"][at]})
        assert all(a[row] == b[0] for a, b in zip(out, alone, strict=True))


@DTYPES
@pytest.mark.parametrize("vocab", [163, 9001, 152_064])
def test_recorded_figures_are_those_of_training(vocab: int, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the two batches: the sampler's lone row, the loss's masked one at temperature 1."""
    logits, temperature, seed = rows_of(33, vocab, dtype)
    among = {"banned_ids": (0, vocab - 1)}
    out = sample(logits, temperature, seed=seed, position=seed, bitwise_logprobs=True, **among)
    recorded = torch.where(temperature == 0, out.logprob_raw, out.logprob)
    for more in ({"temperature": temperature}, {"temperature": temperature, "mask": temperature > 0}):
        logprob, entropy = token_logprobs(logits, out.token, **more, **among)
        counted = more.get("mask", temperature >= 0)
        assert torch.equal(logprob[counted], recorded[counted])
        assert torch.equal(entropy[counted], out.entropy[counted])
    assert torch.equal(token_logprobs(logits, out.token, **among)[0], out.logprob_raw)
    for row in range(0, 33, 8):
        at = slice(row, row + 1)
        figures = {"seed": seed[at], "position": seed[at], "bitwise_logprobs": True}
        alone = sample(logits[at], temperature[at], **figures, **among)
        assert all(a[row] == b[0] for a, b in zip(out, alone, strict=True))


@DTYPES
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (17, 163), (5, 8193), (64, 152_064)])
def test_grpo_loss(num_rows: int, vocab: int, dtype: torch.dtype, tolerances: dict) -> None:
    logits, temperature, _ = rows_of(num_rows, vocab, dtype)
    targets = torch.randint(0, vocab, (num_rows,), device="cuda")
    weights = torch.rand(num_rows, device="cuda") * (torch.arange(num_rows, device="cuda") % 3 != 1)
    logits[weights == 0] = torch.nan
    more = {"ref_logprobs": torch.randn(num_rows, device="cuda") - 12, "temperature": temperature}
    config = GrpoLossConfig(entropy_coef=0.1)
    results = []
    for run, z in ((grpo_loss, logits), (grpo_loss, logits), (grpo_loss_ref, logits.double())):
        z = z.clone().requires_grad_()
        loss, _ = run(z, targets, temperature + 0.5, weights, config=config, **more)
        loss.backward()
        results.append((loss.detach(), z.grad))
    (loss, grad), (loss_again, grad_again), (exact_loss, exact_grad) = results
    assert torch.equal(loss, loss_again)
    assert torch.equal(grad, grad_again)
    atol, rtol = tolerances["loss", torch.float32]
    torch.testing.assert_close(loss.double(), exact_loss, atol=max(atol, 1e-4), rtol=rtol)
    atol, rtol = tolerances["grad", dtype]
    torch.testing.assert_close(grad.double(), exact_grad, atol=atol, rtol=rtol)
    assert (grad[weights == 0] == 0).all()


@DTYPES
@pytest.mark.parametrize(
    ("queries", "contexts"), [([1] * 4, [1, 17, 300, 2049]), ([64, 1, 200], [64, 90, 513])], ids=["decode", "prefill"]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (8, 8, 64), (14, 2, 80)])
def test_paged_attention(
    queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, tolerances: dict
) -> None:
    needed = [-(-context // 16) for context in contexts]
    caches = torch.full((2, sum(needed), 16, kv_heads, dim), torch.nan, dtype=dtype, device="cuda")
    order = torch.randperm(sum(needed)).to(torch.int32)
    tables = torch.full((len(contexts), max(needed)), -1, dtype=torch.int32)
    for row, own in enumerate(order.split(needed)):
        tables[row, : len(own)] = own
        kv = torch.randn(2, contexts[row], kv_heads, dim, device="cuda").to(dtype)
        slots = (own.long()[:, None] * 16 + torch.arange(16)).flatten()[: contexts[row]]
        caches.flatten(1, 2)[:, slots.cuda()] = kv
    q = torch.randn(sum(queries), heads, dim, device="cuda").to(dtype)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    more = (tables.cuda(), lengths.cuda(), cu.cuda())
    out = paged_attention(q, *caches, *more, scale=dim**-0.5)
    exact = paged_attention_ref(q.cpu().double(), *caches.cpu().double(), tables, lengths, cu, scale=dim**-0.5)
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.cpu().double(), exact, atol=atol, rtol=rtol)


EVERY = pytest.mark.parametrize("op", every_kernel.OPS)


@DTYPES
@EVERY
def test_a_graph_replays_the_eager_bits(op: str, dtype: torch.dtype) -> None:
    call = every_kernel.call(op, "cuda", dtype)
    eager = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.fill_(123)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    assert all(x.isfinite().all() for x in eager)


@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
@DTYPES
@EVERY
def test_what_memory_held_does_not_matter(op: str, dtype: torch.dtype, poisoned: Any) -> None:
    call = every_kernel.call(op, "cuda", dtype)
    plain = call()
    with poisoned():
        again = call()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """The last rows of 2.2e9 logits are worth what they are worth alone."""
    num_rows, vocab, last = 14_500, 152_064, slice(-3, None)
    logits = torch.zeros(num_rows, vocab, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[last] = (3 * torch.randn(3, vocab, device="cuda")).to(logits.dtype)
    index = torch.arange(num_rows, device="cuda")
    more = {"seed": index, "position": index, "top_p": 0.9}
    drawn = sample(logits, torch.ones(num_rows, device="cuda"), **more)
    more |= {"seed": index[last], "position": index[last]}
    alone = sample(logits[last], torch.ones(3, device="cuda"), **more)
    assert all(torch.equal(a[last], b) for a, b in zip(drawn, alone, strict=True))
    weights = (index >= num_rows - 3).float()
    losses, grads = [], []
    for at in (slice(None), last):
        z = logits[at].detach().requires_grad_()
        loss, _ = grpo_loss(z, index[at] % vocab, weights[at], weights[at])
        loss.backward()
        losses.append(loss.detach())
        grads.append(z.grad[last])
    torch.testing.assert_close(*losses)  # sums of more and of fewer zeros
    assert torch.equal(*grads)


def test_nothing_waits_for_the_device(no_sync: Any) -> None:
    logits, temperature, seed = rows_of(8, 1000, torch.bfloat16)
    banned = torch.zeros(1000, dtype=torch.bool, device="cuda")
    targets = torch.zeros(8, dtype=torch.int64, device="cuda")
    cu = torch.arange(0, 9, 4, dtype=torch.int32, device="cuda")
    more = {"temperature": temperature, "cu_seqlens": cu, "config": GrpoLossConfig(loss="gspo")}
    with no_sync():
        sample(logits, temperature, seed=seed, position=seed, top_k=5, banned_ids=banned)
        loss, _ = grpo_loss(logits.requires_grad_(), targets, temperature, temperature, **more)
        loss.backward()


def test_nothing_recompiles_for_another_length() -> None:
    counts = []
    for num_rows in (2, 3, 16, 100):
        logits, temperature, seed = rows_of(num_rows, 8192, torch.bfloat16)
        sample(logits, temperature, seed=seed, position=seed)
        sample(logits, temperature, seed=seed, position=seed, top_k=num_rows, top_p=1 / num_rows)
        z = logits.requires_grad_()
        ones = torch.ones(num_rows, device="cuda")
        loss, _ = grpo_loss(z, torch.zeros_like(seed), ones, ones, temperature=ones * 0.5)
        loss.backward()
        kernels = (row_stats._partial_kernel, row_stats._totals_kernel, sample_blocks._draw_kernel)
        kernels += (sample_cut._bounds_kernel, sample_cut._candidates_kernel, row_module._backward_kernel)
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(count == counts[0] for count in counts), counts
