"""Paged attention on the CPU: C++ beside torch's gather and scaled_dot_product_attention, for decode and prefill.

    pytest bench/bench_native_attention.py

Decode is 64 sequences with contexts of 16 to 256 tokens; prefill a chunk of 256 tokens after 0 or 256 others. 8 query
heads, 4 key heads of 64, blocks of 16, float32. Each extra_info holds gib_per_s, keys and values read once, and
gflop_per_s of the two matrix products.
"""

import numpy as np
import pytest
import torch

from thyme import _native

Q_HEADS, KV_HEADS, DIM, BLOCK = 8, 4, 64, 16


class Problem:
    def __init__(self, queries: list[int], contexts: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = [-(-context // BLOCK) for context in contexts]
        order = torch.randperm(sum(pages), generator=generator).int()
        self.tables = torch.zeros(len(queries), max(pages), dtype=torch.int32)
        for b, own in enumerate(order.split(pages)):
            self.tables[b, : pages[b]] = own
        self.q = torch.randn(sum(queries), Q_HEADS, DIM, generator=generator)
        self.k, self.v = torch.randn(2, sum(pages), BLOCK, KV_HEADS, DIM, generator=generator)
        self.queries, self.contexts = queries, torch.tensor(contexts, dtype=torch.int32)
        self.starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.out = torch.empty_like(self.q)
        self.bytes = sum(contexts) * KV_HEADS * DIM * 2 * 4
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in zip(queries, contexts, strict=True))
        self.flops = 4 * pairs * Q_HEADS * DIM

    def native(self, threads: int) -> None:
        tensors = (self.q, self.k, self.v, self.tables, self.contexts, self.starts)
        _native.paged_attention_f32(*(t.numpy() for t in tensors), DIM**-0.5, self.out.numpy(), threads)

    def gather(self) -> None:
        """One query per sequence: gather every block, mask what lies past the context."""
        k = self.k[self.tables].flatten(1, 2).transpose(1, 2)
        v = self.v[self.tables].flatten(1, 2).transpose(1, 2)
        seen = torch.arange(k.shape[2]) < self.contexts[:, None]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        self.out[:] = sdpa(self.q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=True)[:, :, 0]

    def gather_each(self) -> None:
        """Any number of queries: sequence by sequence."""
        start = 0
        sdpa = torch.nn.functional.scaled_dot_product_attention
        for b, (n, context) in enumerate(zip(self.queries, self.contexts.tolist(), strict=True)):
            k = self.k[self.tables[b]].flatten(0, 1)[:context].transpose(0, 1)
            v = self.v[self.tables[b]].flatten(0, 1)[:context].transpose(0, 1)
            q = self.q[start : start + n].transpose(0, 1)
            seen = torch.arange(context) <= torch.arange(context - n, context)[:, None]
            self.out[start : start + n] = sdpa(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0].transpose(
                0, 1
            )
            start += n


def measure(benchmark, problem: Problem, run, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    problem.native(threads)
    expected = problem.out.clone()
    run()
    torch.testing.assert_close(problem.out, expected, rtol=1e-4, atol=1e-5)
    benchmark.pedantic(run, rounds=100, warmup_rounds=5)
    torch.set_num_threads(before)
    median = benchmark.stats.stats.median
    benchmark.extra_info["gib_per_s"] = round(problem.bytes / median / 2**30, 2)
    benchmark.extra_info["gflop_per_s"] = round(problem.flops / median / 1e9, 1)


@pytest.mark.benchmark(group="paged attention: decode, 64 sequences, contexts 16..256")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("who", ["thyme", "torch gather"])
def test_decode(benchmark, who: str, threads: int) -> None:
    contexts = np.random.default_rng(0).integers(16, 257, size=64).tolist()
    problem = Problem([1] * 64, contexts)
    measure(benchmark, problem, problem.gather if who != "thyme" else lambda: problem.native(threads), threads)


@pytest.mark.benchmark(group="paged attention: prefill of 256 tokens")
@pytest.mark.parametrize("context", [256, 512])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("who", ["thyme", "torch gather"])
def test_prefill(benchmark, who: str, threads: int, context: int) -> None:
    problem = Problem([256], [context])
    measure(benchmark, problem, problem.gather_each if who != "thyme" else lambda: problem.native(threads), threads)
