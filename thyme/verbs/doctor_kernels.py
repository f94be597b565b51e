"""The doctor's self-test of the kernels: each op in Triton, and what a CPU runs in its place, against its reference.

On a GPU they are compiled; without one Triton's interpreter runs them, which a process must have been told before it
imports them. So they run in a process of their own, `python -m thyme.verbs.doctor_kernels`, whose death is a finding.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from thyme.verbs.doctor_check import Check

TIMEOUT_S = 300.0
_TOLERANCE = 2e-3
"""Largest difference over the largest value of the reference, in float32: far above rounding, far below a mistake."""
_REMEDY = "pip install -e . anew; if it stays, report the op with what `thyme doctor` prints"


def kernels_in_child() -> list[Check]:
    """`kernel_checks` in a fresh process; one failed check where that dies."""
    environment = dict(os.environ)
    if not _has_gpu():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "thyme.verbs.doctor_kernels"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
        return [Check(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        found = f"no answer within {TIMEOUT_S:g} s"
    except (ValueError, IndexError, TypeError):
        lines = done.stderr.strip().splitlines() or ["no word"]
        found = f"its process ended with {done.returncode}: {lines[-1][:300]}"
    return [Check(part="kernels", name="all", ok=False, needed=True, found=found, remedy=_REMEDY)]


def kernel_checks() -> list[Check]:
    """Every op on small odd shapes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = "compiled" if device == "cuda" else "interpreted"
    checks = []
    for name, (run, reference) in _pairs(device).items():
        try:
            error = _difference(run(), reference())
            way = "C++" if name.endswith("C++)") else how
            ok, found = error <= _TOLERANCE, f"{way}, differs from its reference by {error:.1e}"
        except Exception as failure:  # whatever it is, it is what was to be found out
            ok, found = False, f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        mend = "" if ok else _REMEDY
        checks.append(Check(part="kernels", name=name, ok=ok, needed=True, found=found, remedy=mend))
    return checks


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def _pairs(device: str) -> Mapping[str, Pair]:
    """Op -> the run and its reference, on the same inputs."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=device)

    pairs: dict[str, Pair] = {}
    index = torch.arange(5, device=device)
    pairs |= _head_pairs(random, index) | _attention_pairs(random, device)
    pairs |= _small_pairs(random)
    if device == "cpu":
        pairs |= {"repetition (C++)": _repetition_pair()}
    return pairs


def _head_pairs(random: Callable[..., Any], index: Any) -> dict[str, Pair]:
    import torch

    from thyme.kernels import grpo_loss, linear_grpo_loss, linear_logprob, sample, token_logprobs, truncated_logprobs

    logits, hidden, weight = 3 * random(5, 1_003), random(5, 64), random(1_003, 64) / 8
    banned = (7, 130, 640)
    uncounted = [*banned, 1_000, 1_001, 1_002]
    logits[:, [0, 999]] += 6  # the ends of the vocabulary weigh, and one that must not count would outweigh all
    logits[:, uncounted] += 20
    weight[[0, 999]] *= 8
    weight[uncounted] *= 20
    temperature = torch.where(index % 2 == 0, 0.0, 0.8)
    drawn = {"seed": index * 977, "position": index}
    targets, advantages, weights = index * 100, random(5), torch.full_like(temperature, 0.2)
    limited = {"vocab_size": 1_000, "banned_ids": banned}
    warm = {"temperature": temperature, **limited}
    cut = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, **limited}
    tied = [_tied(random, index, size) for size in (300, 9_000)]  # several rows a program, and several blocks a row

    def sampled(run: Callable[..., Any], **limits: Any) -> Callable[[], list[Any]]:
        return lambda: list(run(logits, temperature, **drawn, **limits))

    def tied_sampled(run: Callable[..., Any]) -> Callable[[], list[Any]]:
        warmth = torch.full_like(temperature, 0.8)
        return lambda: [one for rows, limits in tied for one in run(rows, warmth, **drawn, **limits)]

    def scored(run: Callable[..., Any], **more: Any) -> Callable[[], list[Any]]:
        return lambda: _with_gradients(lambda x: run(x, targets, **more), logits)

    def lost(run: Callable[..., Any]) -> Callable[[], list[Any]]:
        return lambda: _with_gradients(lambda x: run(x, targets, advantages, weights, **warm)[0], logits)

    def scored_by_head(run: Callable[..., Any]) -> Callable[[], list[Any]]:
        return lambda: _with_gradients(lambda x, w: run(x, w, targets, **warm), hidden, weight)

    def lost_by_head(run: Callable[..., Any]) -> Callable[[], list[Any]]:
        return lambda: _with_gradients(lambda x, w: run(x, w, targets, advantages, weights, **warm)[0], hidden, weight)

    kept = truncated_logprobs
    return {
        "sample": (sampled(sample.sample_triton, vocab_size=1_000), sampled(sample.sample_ref, vocab_size=1_000)),
        "sample, truncated": (sampled(sample.sample_triton, **cut), sampled(sample.sample_ref, **cut)),
        "sample, truncated in ties": (tied_sampled(sample.sample_triton), tied_sampled(sample.sample_ref)),
        "token_logprobs": (
            scored(token_logprobs.token_logprobs_triton, **warm),
            scored(token_logprobs.token_logprobs_ref, **warm),
        ),
        "truncated_logprobs": (
            scored(kept.truncated_logprobs_triton, top_k=900, **limited),
            scored(kept.truncated_logprobs_ref, top_k=900, **limited),
        ),
        "grpo_loss": (lost(grpo_loss.grpo_loss_triton), lost(grpo_loss.grpo_loss_ref)),
        "linear_logprob": (
            scored_by_head(linear_logprob.linear_logprob_triton),
            scored_by_head(linear_logprob.linear_logprob_ref),
        ),
        "linear_grpo_loss": (
            lost_by_head(linear_grpo_loss.linear_grpo_loss_triton),
            lost_by_head(linear_grpo_loss.linear_grpo_loss_ref),
        ),
    }


def _tied(random: Callable[..., Any], index: Any, size: int) -> tuple[Any, dict[str, Any]]:
    """Logits [5, size] in which two dozen equal ids weigh most, elsewhere in each row, and limits that cut among them
    or right behind the last: one id too many or too few shows in the mass that is kept."""
    import torch

    logits = random(5, size)
    places = torch.arange(size, device=index.device) + 97 * index[:, None]
    logits[places % (size // 24) == 5] = 7.0
    off = torch.zeros_like(logits[:, 0])
    top_p, min_p = off + 1.0, off.clone()
    top_p[1], top_p[3], min_p[2] = 0.5, 0.75, 0.5
    top_k = torch.tensor([0, 0, 0, 9, 1], device=index.device)
    top_k[0] = (logits[0] == 7.0).sum()
    return logits, {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def _with_gradients(run: Callable[..., Any], *inputs: Any) -> list[Any]:
    """What an op gives, and the gradients of a weighted sum of it: a trainer needs both."""
    import torch

    leaves = [one.clone().requires_grad_() for one in inputs]
    given = run(*leaves)
    outputs = [given] if isinstance(given, torch.Tensor) else list(given)
    moved = [one for one in outputs if one.requires_grad]
    pulls = [torch.arange(one.numel(), device=one.device).cos().view_as(one) for one in moved]
    return [*outputs, *torch.autograd.grad(moved, leaves, pulls)]


def _attention_pairs(random: Callable[..., Any], device: str) -> dict[str, Pair]:
    import torch

    from thyme.kernels import kv_cache, mrope, paged_attention

    def on(values: Any) -> Any:
        return torch.tensor(values, dtype=torch.int32, device=device)

    caches, q = random(2, 6, 16, 2, 64), random(4, 4, 64)
    arguments = (q, *caches, on([[5, 0, 3], [1, 2, -1]]), on([40, 17]), on([0, 1, 4]))
    scale = {"scale": 64**-0.5}
    qkv, slots = random(5, 8, 48), torch.arange(5, device=device) * 7
    cos, sin = mrope.mrope_tables(slots[None], 0.9 ** torch.arange(24, device=device))

    def written(write: Callable[..., Any]) -> list[Any]:
        stores = torch.zeros(2, 4, 16, 2, 48, device=device)
        return [write(qkv, cos, sin, *stores, slots), stores]

    pairs: dict[str, Pair] = {
        "paged_attention": (
            lambda: [paged_attention.paged_attention_triton(*arguments, **scale)],
            lambda: [paged_attention.paged_attention_ref(*arguments, **scale)],
        ),
        "mrope_write_kv": (
            lambda: written(kv_cache.mrope_write_kv_triton),
            lambda: written(kv_cache.mrope_write_kv_ref),
        ),
        "mrope": (
            lambda: _with_gradients(lambda x: mrope.mrope_triton(x, cos, sin), qkv),
            lambda: _with_gradients(lambda x: mrope.mrope_ref(x, cos, sin), qkv),
        ),
    }
    if device == "cpu":
        pairs["paged_attention (C++)"] = (
            lambda: [paged_attention.paged_attention(*arguments, **scale)],
            lambda: [paged_attention.paged_attention_ref(*arguments, **scale)],
        )
    return pairs


def _small_pairs(random: Callable[..., Any]) -> dict[str, Pair]:
    from thyme.kernels import fp8, fp8_linear, rmsnorm, swiglu

    codes = fp8.quantize_weight(random(70, 130))
    x, residual, weight, gates = random(9, 130), random(9, 130), random(130), random(9, 220)
    return {
        "rmsnorm": (
            lambda: _with_gradients(lambda a, b: rmsnorm.rmsnorm_triton(a, b, 1e-6), x, weight),
            lambda: _with_gradients(lambda a, b: rmsnorm.rmsnorm_ref(a, b, 1e-6), x, weight),
        ),
        "add_rmsnorm": (
            lambda: _with_gradients(lambda a, b, c: rmsnorm.add_rmsnorm_triton(a, b, c, 1e-6), x, residual, weight),
            lambda: _with_gradients(lambda a, b, c: rmsnorm.add_rmsnorm_ref(a, b, c, 1e-6), x, residual, weight),
        ),
        "swiglu": (
            lambda: _with_gradients(lambda a: swiglu.swiglu_triton(a), gates),
            lambda: _with_gradients(lambda a: swiglu.swiglu_ref(a), gates),
        ),
        "fp8_linear": (
            lambda: [fp8_linear.fp8_linear_triton(x, *codes)],
            lambda: [fp8_linear.fp8_linear_ref(x, *codes)],
        ),
    }


def _repetition_pair() -> Pair:
    import numpy as np
    import torch

    from thyme.repetition import RepetitionConfig, RepetitionDetector, repetition_ref

    config = RepetitionConfig()
    tokens = [*range(40), *list(range(100, 110)) * 60]

    def native() -> list[Any]:
        detector = RepetitionDetector(config, 1)
        slot = np.array([detector.open()], dtype=np.int32)
        hits = (i for i, token in enumerate(tokens) if detector.push(slot, np.array([token], dtype=np.int32))[0])
        return [torch.tensor(float(next(hits, -1)))]

    def reference() -> list[Any]:
        index = repetition_ref(tokens, config)
        return [torch.tensor(float(-1 if index is None else index))]

    return native, reference


def _difference(found: list[Any], expected: list[Any]) -> float:
    """The largest, over the largest value of what is expected; infinite where one is not a number, or ids differ."""
    import torch

    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if not one.is_floating_point() and not torch.equal(one, two):
            return float("inf")
        one, two = one.detach().double(), two.detach().double()
        if one.shape != two.shape or not bool(torch.isfinite(one).all()):
            return float("inf")
        worst = max(worst, float((one - two).abs().max() / two.abs().max().clamp_min(1.0)))
    return worst


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    print(json.dumps([asdict(check) for check in kernel_checks()]))
