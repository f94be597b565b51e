"""Sampling a token per row with its log-probs and entropy: plain torch, torch.compile of it, and sample.

    pytest bench/bench_sample.py

Bytes counted: one read of the logits. The rivals draw with torch.multinomial and cannot replay a row by its seed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.sample import sample, sample_ref

SHAPES = [(64, 163, torch.float32), (8, 49_152, torch.float32)]
if torch.cuda.is_available():
    SHAPES = [(rows, 152_064, torch.bfloat16) for rows in (1, 8, 64, 256)]


def plain(logits: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    logits = logits.float()
    raw = logits.log_softmax(-1)
    tempered = (logits / temperature[:, None]).log_softmax(-1)
    token = torch.multinomial(tempered.exp(), 1)
    entropy = -(raw.exp() * raw).sum(-1)
    return token, tempered.gather(-1, token), raw.gather(-1, token), entropy


# Torch has no truncated sampling to compare with, and on a CPU `sample` is the reference.
TRUNCATED = {"top_k": 50, "top_p": 0.9}
OURS = ["reference", "ours"] if torch.cuda.is_available() else ["ours"]
CASES = [(rival, {}) for rival in ["torch", "torch.compile", *OURS]] + [(rival, TRUNCATED) for rival in OURS]


@pytest.mark.parametrize(("rival", "limits"), CASES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES, ids=str)
def test_sample(
    measure: Callable[..., None], device: torch.device, rows: int, vocab: int, dtype: torch.dtype, rival: str,
    limits: dict[str, Any],
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator, device=device) * 3).to(dtype)
    temperature = torch.ones(rows, device=device)
    index = torch.arange(rows, device=device)
    if rival.startswith("torch"):
        run = torch.compile(plain) if rival == "torch.compile" else plain
        call = lambda: run(logits, temperature)  # noqa: E731
    else:
        draw = sample if rival == "ours" else sample_ref
        call = lambda: draw(logits, temperature, seed=index, position=index, **limits)  # noqa: E731
    group = f"sample{' with top_k 50, top_p 0.9' if limits else ''}: {rows} x {vocab} {str(dtype)[6:]}"
    with torch.inference_mode():
        measure(call, logits.nbytes, group)
