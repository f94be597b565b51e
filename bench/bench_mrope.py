"""M-RoPE of query and key heads, forward and backward: torch, torch.compile of it, Liger-Kernel, and ours.

    pytest bench/bench_mrope.py

Bytes counted: the heads read and written once, tables read once. The tables are made outside of what is timed, as a
model does once for all layers; Liger-Kernel, where installed, gets its own layout of heads and tables.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels.mrope import mrope, mrope_ref, mrope_tables

# tokens, query heads, key heads, D, sections, dtype
SHAPES = [(2_000, 8, 4, 64, (8, 12, 12), torch.float32)]
if torch.cuda.is_available():
    SHAPES = [(tokens, 28, 4, 128, (16, 24, 24), torch.bfloat16) for tokens in (64, 8_192)]


def plain(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = heads.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(heads.dtype)


RIVALS: dict[str, Any] = {"torch": plain, "torch.compile": plain, "ours": mrope}
if torch.cuda.is_available():
    RIVALS["reference"] = mrope_ref
    if find_spec("liger_kernel"):
        RIVALS["liger"] = None


def call(
    rival: str, heads: Tensor, positions: Tensor, sections: tuple[int, ...], queries: int
) -> tuple[list[Tensor], Callable[..., Any]]:
    """The tensors to differentiate, and the function of them."""
    half = heads.shape[2] // 2
    frequencies = 1e6 ** -(torch.arange(half, device=heads.device) / half)
    if rival != "liger":
        tables = mrope_tables(positions, frequencies, sections)
        run = torch.compile(plain) if rival == "torch.compile" else RIVALS[rival]
        return [heads], lambda x: run(x, *tables)
    function = importlib.import_module("liger_kernel.ops.qwen2vl_mrope").LigerQwen2VLMRopeFunction
    angles = positions[:, None, :, None].float() * torch.cat((frequencies, frequencies))
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    q, k = (part.transpose(0, 1)[None].contiguous() for part in heads.split((queries, heads.shape[1] - queries), 1))
    return [q, k], lambda q, k: function.apply(q, k, cos, sin, list(sections))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("tokens", "queries", "keys", "dim", "sections", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward + backward"])
def test_mrope(
    measure: Callable[..., None], device: torch.device, tokens: int, queries: int, keys: int, dim: int,
    sections: tuple[int, ...], dtype: torch.dtype, rival: str, training: bool,
) -> None:  # fmt: skip
    heads = torch.randn(tokens, queries + keys, dim, device=device).to(dtype)
    positions = torch.randint(0, 4_096, (3, tokens), device=device)
    inputs, turn = call(rival, heads, positions, sections, queries)

    def step() -> None:
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        out = turn(*tensors)
        torch.autograd.backward(out, inputs if isinstance(out, tuple) else inputs[0])

    def forward() -> None:
        with torch.no_grad():
            turn(*inputs)

    num_bytes = (1 + training) * (2 * heads.nbytes + tokens * dim * 4)
    what = f"mrope{' forward + backward' * training}: {tokens} tokens, {queries}/{keys} heads of {dim}"
    measure(step if training else forward, num_bytes, f"{what} {str(dtype)[6:]}")
