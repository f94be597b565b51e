"""Sampling a token per row with its log-probs and entropy, with each truncation: plain torch, torch.compile of it,
FlashInfer where it is installed, the reference and sample.

    pytest bench/bench_sample.py

Bytes counted: one read of the logits, two with truncation. The rivals cannot replay a row by its seed; FlashInfer draws
the token alone, without log-probs or entropy.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thyme.kernels.sample import sample, sample_ref

GPU = torch.cuda.is_available()
SHAPES = [(128, 163, torch.float32), (8, 49_152, torch.float32)]
if GPU:
    SHAPES = [(rows, 152_064, torch.bfloat16) for rows in (1, 8, 64, 256)]
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
RIVALS = ["torch", "torch.compile", "reference", "ours"]
if GPU and importlib.util.find_spec("flashinfer"):
    RIVALS.append("flashinfer")


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


def rivals_call(
    rival: str, kind: str, logits: Tensor, temperature: Tensor, limits: dict[str, float]
) -> Callable[[], object]:
    if rival == "flashinfer":
        import flashinfer.sampling

        draw = getattr(flashinfer.sampling, FLASHINFER[kind])
        return lambda: draw(flashinfer.sampling.softmax(logits, temperature=temperature), *limits.values())
    if rival.startswith("torch"):
        run = torch.compile(plain) if rival == "torch.compile" else plain
        return lambda: run(logits, temperature, **limits)
    index = torch.arange(len(logits), device=logits.device)
    ours = sample if rival == "ours" else sample_ref
    return lambda: ours(logits, temperature, seed=index, position=index, **limits)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("kind", LIMITS, ids=lambda kind: kind or "all ids")
@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES, ids=str)
def test_sample(
    measure: Callable[..., None], device: torch.device, rows: int, vocab: int, dtype: torch.dtype, kind: str, rival: str
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator, device=device) * 3).to(dtype)
    limits = LIMITS[kind]
    call = rivals_call(rival, kind, logits, torch.ones(rows, device=device), limits)
    named = f" with {kind} {limits[kind]}" if kind else ""
    with torch.inference_mode():
        measure(call, logits.nbytes * (2 if kind else 1), f"sample{named}: {rows} x {vocab} {str(dtype)[6:]}")
