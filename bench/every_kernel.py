"""Every kernel that is launched, at least once, on small odd shapes: what compute-sanitizer watches, what the tests
capture into graphs and run in poisoned memory.

    compute-sanitizer --tool memcheck python bench/every_kernel.py [float32 float16 bfloat16]

Each call makes its outputs anew from inputs made once, never makes the host wait, and returns all that it computed.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thyme.kernels.fp8 import FP8, quantize_heads, quantize_weight
from thyme.kernels.fp8_linear import fp8_linear_triton
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss_triton
from thyme.kernels.kv_cache import mrope_write_kv_triton
from thyme.kernels.linear_grpo_loss import linear_grpo_loss_triton
from thyme.kernels.linear_logprob import linear_logprob_triton
from thyme.kernels.mrope import mrope_tables, mrope_triton
from thyme.kernels.paged_attention import paged_attention_triton
from thyme.kernels.rmsnorm import add_rmsnorm_triton, rmsnorm_triton
from thyme.kernels.sample import sample_triton
from thyme.kernels.shared_prefix import SharedPrefix
from thyme.kernels.swiglu import swiglu_triton
from thyme.kernels.token_logprobs import token_logprobs_triton

Call = Callable[[], list[Tensor]]
OPS = (
    "sample",
    "sample, truncated",
    "sample, toy vocabulary",
    "grpo_loss",
    "grpo_loss, sequences",
    "token_logprobs",
    "linear_logprob",
    "linear_logprob, kept tiles",
    "linear_logprob, known gradient",
    "linear_grpo_loss",
    "linear_grpo_loss, entropy",
    "paged_attention, decode",
    "paged_attention, mixed",
    "paged_attention, any batch",
    "paged_attention, shared prefix",
    "paged_attention, fp8",
    "mrope_write_kv",
    "mrope_write_kv, fp8",
    "mrope",
    "rmsnorm",
    "add_rmsnorm",
    "swiglu",
    "fp8_linear",
)
EPS = 1e-6


def call(op: str, device: torch.device | str, dtype: torch.dtype) -> Call:
    """The call of one of OPS, its inputs made from a fixed seed."""
    random = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    name, _, form = op.partition(", ")
    make = {
        "sample": _sample,
        "grpo_loss": _loss,
        "token_logprobs": _loss,
        "linear_logprob": _linear,
        "linear_grpo_loss": _linear,
        "paged_attention": _attention,
        "mrope_write_kv": _write,
    }.get(name, _small)
    return make(name, form, random, dtype)


def _differentiated(run: Callable[..., Any], *tensors: Tensor) -> Call:
    """Results and gradients, of a sum that weighs no two entries of them alike."""

    def both() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = run(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        weights = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outs]
        return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, weights)]

    return both


def _sample(_: str, form: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    rows, vocab = (5, 163) if form == "toy vocabulary" else (3, 9_001)
    logits = (3 * random(rows, vocab)).to(dtype)
    index = torch.arange(rows, device=logits.device)
    banned = torch.arange(vocab, device=logits.device) % 50 == 7
    temperature = torch.where(index % 3 == 0, 0.0, 0.8)
    limits: dict[str, Any] = {} if form == "" else {"top_k": 40, "top_p": 0.9, "min_p": 0.01}
    more = {"seed": index * 977, "position": index, "banned_ids": banned, **limits}
    return lambda: list(sample_triton(logits, temperature, **more))


def _loss(name: str, form: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    rows, vocab = 7, 9_001
    logits = (3 * random(rows, vocab)).to(dtype)
    index = torch.arange(rows, device=logits.device)
    if name == "token_logprobs":
        return _differentiated(lambda z: token_logprobs_triton(z, index * 100), logits)
    weights = (index % 3 != 1).float() / rows
    logits[weights == 0] = torch.nan
    more: dict[str, Any] = {"temperature": 0.5 + index / rows, "config": GrpoLossConfig(entropy_coef=0.1)}
    advantages, ref = random(rows), random(rows) - 12
    if form == "sequences":
        more |= {"old_logprobs": ref + 0.1, "rollout_logprobs": ref, "segments": (index % 2).to(torch.uint8)}
        more["cu_seqlens"] = torch.tensor([0, 2, 2, rows], dtype=torch.int32).to(index.device)
        more["config"] = GrpoLossConfig(loss="gspo", rollout_ratio_cap=1.1, entropy_coef=0.1)

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        value, metrics = grpo_loss_triton(z, index * 100, advantages, weights, ref_logprobs=ref, **more)
        return value, value + 0 * metrics.values.sum()

    return _differentiated(loss, logits)


def _linear(name: str, form: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    rows, features, vocab = 19, 64, 2_300
    hidden, weight = random(rows, features).to(dtype), (random(vocab, features) / 8).to(dtype)
    index = torch.arange(rows, device=hidden.device)
    more = {"temperature": 0.5 + index / rows, "backward": "kept_tiles" if form == "kept tiles" else "recompute"}
    if form == "known gradient":
        more["logprob_gradient"] = torch.linspace(0.5, 1.5, rows, device=hidden.device)
    if name == "linear_logprob":
        return _differentiated(lambda h, w: linear_logprob_triton(h, w, index * 50, **more)[0], hidden, weight)
    more |= {"num_counted": rows, "tempered": True}
    advantages, ones = random(rows), torch.full((rows,), 1 / rows, device=hidden.device)
    if form == "entropy":
        more["config"] = GrpoLossConfig(entropy_coef=0.1)
    else:
        more["backward"] = "in_forward"
    return _differentiated(
        lambda h, w: linear_grpo_loss_triton(h, w, index * 50, advantages, ones, **more)[0], hidden, weight
    )


def _attention(_: str, form: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    queries, contexts = ([1] * 3, [550, 530, 17])
    if form in ("mixed", "any batch", "fp8"):
        queries, contexts = ([1, 20, 3], [600, 33, 17]) if form != "any batch" else ([1, 3, 2], [600, 520, 17])
    heads, kv_heads, dim, block = 14, 2, 64, 16
    needed = [-(-context // block) for context in contexts]
    caches = tuple(random(2, sum(needed), block, kv_heads, dim).to(dtype))
    tables = torch.full((len(needed), max(needed)), -1, dtype=torch.int32)
    for row, own in enumerate(torch.arange(sum(needed), dtype=torch.int32).flip(0).split(needed)):
        tables[row, : len(own)] = own
    if form == "shared prefix":
        tables[1, :32] = tables[0, :32]
    q = random(sum(queries), heads, dim).to(dtype)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=q.device)
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    arguments = (q, *caches, tables.to(q.device), lengths, cu)
    more: dict[str, Any] = {"scale": dim**-0.5, "max_query_len": max(queries), "batch_invariant": form == "any batch"}
    if form == "shared prefix":
        groups, blocks = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, 2, 3], [32, 0]))
        more["shared"] = SharedPrefix(groups, blocks)
    if form == "fp8":
        caches, scales = zip(*map(quantize_heads, caches), strict=True)
        more |= dict(zip(("k_scales", "v_scales"), scales, strict=True))
        arguments = (q, *caches, *arguments[3:])
    return lambda: [paged_attention_triton(*arguments, **more)]


def _write(name: str, form: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    tokens, queries, keys, dim = 9, 5, 2, 48
    qkv = random(tokens, queries + 2 * keys, dim).to(dtype)
    slots = torch.arange(tokens, device=qkv.device) * 7
    slots[3] = -1
    cos, sin = mrope_tables(slots[None], 0.9 ** torch.arange(dim // 2, device=qkv.device))
    bias = random(qkv[0].numel()).to(dtype)

    def write() -> list[Tensor]:
        caches = torch.zeros(2, 4, 16, keys, dim, dtype=FP8 if form == "fp8" else dtype, device=qkv.device)
        scales = torch.zeros(2, 4, 16, keys, dtype=torch.uint8, device=qkv.device)
        more = {"k_scales": scales[0], "v_scales": scales[1]} if form == "fp8" else {}
        with torch.no_grad():
            q = mrope_write_kv_triton(qkv, cos, sin, *caches, slots, bias=bias, **more)
        return [q, caches.float(), scales]

    return write


def _small(name: str, _: str, random: Callable[..., Tensor], dtype: torch.dtype) -> Call:
    if name == "mrope":
        heads = random(7, 3, 40).to(dtype)
        cos, sin = mrope_tables(torch.arange(7, device=heads.device)[None], random(20).abs())
        return _differentiated(lambda x: mrope_triton(x, cos, sin), heads)
    if name == "swiglu":
        return _differentiated(swiglu_triton, random(9, 2 * 1_100).to(dtype))
    if name == "fp8_linear":
        wide, bias, codes = random(9, 1_030).to(dtype), random(150).to(dtype), quantize_weight(random(150, 1_030))
        return lambda: [fp8_linear_triton(wide, *codes, bias)]
    x, residual, weight = (random(*shape).to(dtype) for shape in ((9, 3, 130), (9, 3, 130), (130,)))
    if name == "rmsnorm":
        return _differentiated(lambda x, w: rmsnorm_triton(x, w, EPS), x, weight)
    return _differentiated(lambda x, r, w: add_rmsnorm_triton(x, r, w, EPS), x, residual, weight)


def main() -> Iterator[str]:
    for name in sys.argv[1:] or ["float32", "float16", "bfloat16"]:
        for op in OPS:
            call(op, "cuda", getattr(torch, name))()
            torch.cuda.synchronize()
            yield f"{op} {name}"


if __name__ == "__main__":
    for done in main():
        print(done, flush=True)
