"""Sampling a token per row with its log-probs and entropy, with each truncation: plain torch, torch.compile of it,
FlashInfer, the reference and sample.

    pytest bench/bench_sample.py

Bytes counted: one read of the logits, two with truncation. The others cannot replay a row by its seed; FlashInfer draws
the token alone, without log-probs or entropy.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, absent, compiled, contenders, greedy_or_one, ids_that_count
from selection import shapes
from torch import Tensor

from thyme.kernels.sample import sample, sample_ref

GPU_SHAPES = [(rows, 152_064, torch.bfloat16) for rows in (1, 8, 64, 256)]
CPU_SHAPES = [(128, 163, torch.float32), (8, 49_152, torch.float32)]
Shape = tuple[int, int, torch.dtype]
LIMITS: dict[str, dict[str, float]] = {
    "": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}
FLASHINFER = {
    "": "sampling_from_probs",
    "top_k": "top_k_sampling_from_probs",
    "top_p": "top_p_sampling_from_probs",
    "min_p": "min_p_sampling_from_probs",
}
PEERS = {"flashinfer": "flashinfer"}


def plain(logits: Tensor, temperature: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[Tensor]:
    logits = logits.float()
    raw = logits.log_softmax(-1)
    tempered = (logits / temperature[:, None]).log_softmax(-1)
    p = tempered.exp()
    if top_k:
        p = torch.where(p >= p.topk(top_k, -1).values[:, -1:], p, 0.0)
    if top_p < 1:
        down, order = p.sort(-1, descending=True)
        p = p.masked_fill(
            torch.empty_like(p, dtype=torch.bool).scatter_(-1, order, down.cumsum(-1) - down >= top_p), 0.0
        )
    if min_p:
        p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0.0)
    token = torch.multinomial(p, 1)
    return [token, tempered.gather(-1, token), raw.gather(-1, token), -(raw.exp() * raw).sum(-1), p.sum(-1)]


def call(name: str, kind: str, logits: Tensor, temperature: Tensor, limits: dict[str, float]) -> Callable[[], object]:
    if name == "flashinfer":
        import flashinfer.sampling

        draw = getattr(flashinfer.sampling, FLASHINFER[kind])
        return lambda: draw(flashinfer.sampling.softmax(logits, temperature=temperature), *limits.values())
    if name.startswith("torch"):
        run = compiled(plain) if name == "torch.compile" else plain
        return lambda: run(logits, temperature, **limits)
    index = torch.arange(len(logits), device=logits.device)
    ours = sample if name == "ours" else sample_ref
    mixed = greedy_or_one(len(logits))
    among = ids_that_count(logits.shape[1])
    return lambda: ours(logits, mixed, seed=index, position=index, **among, **limits)


def title(shape: Shape, kind: str) -> str:
    rows, vocab, dtype = shape
    return f"sample{f' with {kind} {LIMITS[kind][kind]}' if kind else ''}: {rows} x {vocab} {str(dtype)[6:]}"


def group(shape: Shape, kind: str, names: list[str]) -> Group:
    rows, vocab, dtype = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator, device=DEVICE) * 3).to(dtype)
    temperature = torch.ones(rows, device=DEVICE)
    return Group(
        title=title(shape, kind),
        num_bytes=logits.nbytes * (2 if kind else 1),
        dtype=dtype,
        names=names,
        build=lambda name: torch.inference_mode()(call(name, kind, logits, temperature, LIMITS[kind])),
    )


def cases() -> list[Any]:
    return [
        pytest.param(shape, kind, name, id=f"{shape}-{kind or 'all ids'}-{name}")
        for shape in shapes(GPU_SHAPES if GPU else CPU_SHAPES)
        for kind in LIMITS
        if not kind or not GPU or shape[0] in (8, 256)
        for name in names_for(shape, kind)
    ]


def names_for(shape: Shape, kind: str) -> list[str]:
    """torch.compile where it takes least of the time: each kind and size is compiled anew."""
    worthwhile = ["torch.compile"] * (not GPU or shape[0] == 256 or not kind)
    return contenders("torch", *worthwhile, "reference", "ours", **PEERS)


@pytest.mark.parametrize(("shape", "kind", "contender"), cases())
def test_sample(compare: Callable[..., None], shape: Shape, kind: str, contender: str) -> None:
    compare(contender, lambda: group(shape, kind, names_for(shape, kind)), absent(**PEERS))
