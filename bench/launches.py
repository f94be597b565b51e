"""What ops would launch on Hopper, recorded instead of launched, on tensors of a CPU: no GPU, and nothing is computed.

    python bench/launches.py       one launch a line, of the ops as Qwen2.5-VL-7B calls them, in bfloat16 and float32

A launch is described by what Triton compiles for: each argument's type, whether it is a multiple of 16, constants,
warps and stages. What bench/shipped lists is written by hand: this exits with 1 when a launch is not among it.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled functions, or there is nothing to ask

import configurations
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from thyme.kernels import (
    grpo_loss,
    kv_cache,
    linear_logprob,
    linear_tiles,
    mrope,
    paged_attention,
    rmsnorm,
    sample,
    swiglu,
    token_logprobs,
)


class Recorder:
    """Stands for a kernel; `launches` are the descriptions under which Triton would look the compiled ones up."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.launches: set[str] = set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            _, specialization, options = self.binder(*args, **options)
            arguments = {
                name: f"={extra}" if kind == "constexpr" else f":{kind}{'/16' * (extra == 'D')}"
                for name, (kind, extra) in zip(self.kernel.arg_names, specialization, strict=True)
            }
            self.launches.add(_described(arguments, options))

        return launch


def _described(arguments: dict[str, str], options: dict[str, Any]) -> str:
    parts = [f"{name}{value}" for name, value in arguments.items()]
    parts += [f"{name}={options[name]}" for name in ("num_warps", "num_stages") if name in options]
    return " ".join(part.replace(" ", "") for part in parts)


def compiled(configuration: configurations.Configuration) -> str:
    """The same description of what the gate compiles."""
    kernel = getattr(sys.modules[f"thyme.kernels.{configuration.module}"], configuration.kernel)
    kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
    arguments = {}
    for name in kernel.arg_names:
        kind = configuration.types.get(name)
        if kind is None:
            arguments[name] = f"={configuration.constants[name]}"
        else:
            arguments[name] = f":{kind}{'/16' * configurations.is_aligned(configuration, kernel, name)}"
    return _described(arguments, configuration.options)


def record() -> dict[str, Recorder]:
    """Puts a recorder in place of every kernel that is launched, for the rest of the process; by module.kernel."""
    recorders = {}
    for path in sorted((configurations.ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"thyme.kernels.{path.stem}")
        for kernel in configurations.launched(path.stem):
            recorders[f"{path.stem}.{kernel}"] = recorder = Recorder(getattr(module, kernel))
            setattr(module, kernel, recorder)
    sample._raise_not_finite, sample.logprobs = lambda *_: None, lambda *_: (None, None)  # nothing was computed
    linear_tiles._has_tma = lambda hidden, weight: hidden.dtype != torch.float32
    torch.mm = lambda a, b, out=None: out  # ours are all given where to write
    return recorders


def call_as_the_7b_model(dtype: torch.dtype) -> None:
    """Two tokens of two sequences, forward and backward, as engine and trainer pass them: ids below the tokenizer's
    size, some banned, a temperature of 1 and one of 0. The weights are never read, so they take no memory."""
    vocab, ids, features, inner, queries, keys, dim = 152_064, 151_665, 3_584, 18_944, 28, 4, 128
    index, ones, temperature = torch.arange(2), torch.ones(2), torch.tensor([1.0, 0.0])
    banned = torch.arange(ids) > ids - 20
    among: dict[str, Any] = {"vocab_size": ids, "banned_ids": banned}
    logits = torch.zeros(2, vocab, dtype=dtype, requires_grad=True)
    for limits in ({}, {"top_p": 0.9}):
        sample.sample_triton(logits, temperature, seed=index, position=index, **among, **limits)
    config = grpo_loss.GrpoLossConfig(entropy_coef=0.1)
    more = {"temperature": temperature, "config": config, **among}
    grpo_loss.grpo_loss_triton(logits, index, ones, ones, **more)[0].backward()
    if dtype == torch.bfloat16:
        token_logprobs.token_logprobs_triton(logits, index, vocab_size=ids)[0].sum().backward()

    hidden = torch.zeros(2, features, dtype=dtype, requires_grad=True)
    head = torch.empty(vocab, features, dtype=dtype)
    for backward in ("recompute", "exp_tiles"):
        logprob, entropy = linear_logprob.linear_logprob_triton(
            hidden, head, index, temperature=temperature, backward=backward, **among
        )
        (logprob.sum() if backward == "exp_tiles" else logprob.sum() + entropy.sum()).backward()
    linear_logprob.linear_logprob_triton(hidden, head, index, temperature=temperature, **among)[0].sum().backward()

    weight = torch.ones(features, dtype=dtype, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            normed, total = rmsnorm.add_rmsnorm_triton(hidden, hidden, weight, 1e-6)
            plain = rmsnorm.rmsnorm_triton(hidden, weight, 1e-6)
        if grad:
            torch.autograd.backward((normed, total, plain), (hidden, hidden, hidden))
    swiglu.swiglu_triton(torch.zeros(2, 2 * inner, dtype=dtype, requires_grad=True)).sum().backward()

    qkv = torch.zeros(2, queries + 2 * keys, dim, dtype=dtype)
    cos, sin = mrope.mrope_tables(index[None], torch.ones(dim // 2))
    mrope.mrope_triton(qkv[:, : queries + keys].requires_grad_(), cos, sin).sum().backward()
    k_cache, v_cache = torch.zeros(2, 160, 16, keys, dim, dtype=dtype)
    with torch.no_grad():
        q = kv_cache.mrope_write_kv_triton(
            qkv, cos, sin, k_cache, v_cache, index, bias=torch.zeros(36 * dim, dtype=dtype)
        )
    caches = (k_cache, v_cache, torch.zeros(2, 80, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    starts = torch.arange(3, dtype=torch.int32)
    shared = paged_attention.SharedPrefix(torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    for with_prefix in (None, shared):
        paged_attention.paged_attention_triton(q, *caches, starts, scale=dim**-0.5, shared=with_prefix)


if __name__ == "__main__":
    recorders = record()
    for dtype in (torch.bfloat16, torch.float32):
        call_as_the_7b_model(dtype)
    known = {(one.module, one.kernel, compiled(one)) for one in configurations.configurations()}
    missing = [name for name, recorder in recorders.items() if not recorder.launches]
    for name, recorder in recorders.items():
        for launch in sorted(recorder.launches):
            print(name, launch)
            if (*name.split("."), launch) not in known:
                missing.append(f"{name} {launch}")
    print(*(f"NOT COMPILED BY THE GATE, OR NOT LAUNCHED HERE: {one}" for one in missing), sep="\n")
    sys.exit(bool(missing))
