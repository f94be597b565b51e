"""The Triton backward of the LM head: dz of a chunk of rows in the operands' dtype, then two matmuls by torch.

dz comes from the x that the forward kept, and is written where it lay; or from tiles of z once more, turned into dz in
their epilogue by programs that take tile after tile. dL / dweight is summed over the chunks in float32, in place.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.linear_rows import HeadRows, TokenGradient, chunks, num_chunks, rows_at
from thyme.kernels.linear_tiles import (
    LOG2_E,
    LOWEST,
    Kept,
    Plan,
    launch_config,
    launch_tiles,
    logits_tile,
    new_kept,
    operand,
    place,
    plan_of,
    rows_of,
    stats_of_tiles,
)
from thyme.kernels.logit_rows import Backend

_BLOCK = 4096  # words of a program that turns x into dz
_VECTORS = ["targets_ptr", "tau_ptr", "g_ptr", "h_ptr"]  # slices of what the caller has, which begin anywhere


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VECTORS)
def _dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    tau_ptr,
    bias_ptr,
    stats_ptr,
    g_ptr,
    h_ptr,
    dz_ptr,
    num_rows,
    vocab_size,
    num_features,
    dz_width,
    HAS_TAU: tl.constexpr,
    HAS_H: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Tiles of z again, turned into dz; dz has whole tiles, 0 past vocab_size."""
    hidden = operand(hidden_ptr, num_rows, num_features, ROWS, FEATURES, TMA)
    weight = operand(weight_ptr, vocab_size, num_features, WORDS, FEATURES, TMA)
    out = operand(dz_ptr, tl.cdiv(num_rows, ROWS) * ROWS, dz_width, ROWS, WORDS, TMA)
    num_tiles = tl.cdiv(num_rows, ROWS) * (dz_width // WORDS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row_tile, column = place(tile, num_rows, dz_width // WORDS, ROWS, GROUP)
        first_row = row_tile * ROWS
        first_word = column * WORDS
        z = logits_tile(
            hidden,
            weight,
            bias_ptr,
            first_row,
            first_word,
            num_rows,
            vocab_size,
            num_features,
            TMA,
            SPECIALIZE,
            ROWS,
            WORDS,
            FEATURES,
        )
        row = rows_of(row_tile, ROWS)
        alive = row < num_rows
        x = z - tl.load(stats_ptr + num_rows + row, mask=alive, other=0.0)[:, None]
        log_total = tl.load(stats_ptr + 2 * num_rows + row, mask=alive, other=0.0) * LOG2_E
        target = tl.load(targets_ptr + row, mask=alive, other=-1).to(tl.int32) - first_word
        g = tl.load(g_ptr + row, mask=alive, other=0.0)
        if HAS_TAU:
            inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32)
            g *= inverse_tau
            dz = tl.exp2(x * (inverse_tau * LOG2_E)[:, None] - log_total[:, None]) * -g[:, None]
        else:
            dz = tl.exp2(x * LOG2_E - log_total[:, None]) * -g[:, None]
        dz = tl.where(tl.arange(0, WORDS)[None, :] == target[:, None], dz + g[:, None], dz)
        if HAS_H:
            h = tl.load(h_ptr + row, mask=alive, other=0.0)
            log_p = x - tl.load(stats_ptr + 3 * num_rows + row, mask=alive, other=0.0)[:, None]
            entropy = tl.load(stats_ptr + 4 * num_rows + row, mask=alive, other=0.0)
            dz -= h[:, None] * tl.exp2(log_p * LOG2_E) * (log_p + entropy[:, None])
        if TMA:
            out.store([first_row, first_word], dz.to(dz_ptr.dtype.element_ty))
        else:
            out_ptr = dz_ptr + row[:, None].to(tl.int64) * dz_width + (first_word + tl.arange(0, WORDS))[None, :]
            tl.store(out_ptr, dz.to(dz_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VECTORS)
def _kept_kernel(
    x_ptr,
    kept_max_ptr,
    targets_ptr,
    tau_ptr,
    stats_ptr,
    g_ptr,
    h_ptr,
    dz_ptr,
    num_rows,
    kept_width,
    HAS_TAU: tl.constexpr,
    HAS_H: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """x to dz, in place. The target's own p is the exact one: at a sure token 1 - p would be all rounding."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    inside = tile < kept_width // WORDS
    word = tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    target = tl.load(targets_ptr + row).to(tl.int32)
    largest = tl.load(stats_ptr + num_rows + row)
    log_total = tl.load(stats_ptr + 2 * num_rows + row)
    gap = tl.load(kept_max_ptr + tile * num_rows + row, mask=inside, other=LOWEST) - largest
    x = tl.load(x_ptr + row * kept_width + word, mask=inside[:, None], other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row)
    inverse_tau = 1.0
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row).to(tl.float32)
        g *= inverse_tau
    scale = inverse_tau * LOG2_E
    dz = -g * tl.exp2(x * scale + (gap * scale - log_total * LOG2_E)[:, None])
    at_target = g * (1.0 - tl.exp2(tl.load(stats_ptr + row) * LOG2_E))
    dz = tl.where(word == target, at_target, dz)
    if HAS_H:
        h = tl.load(h_ptr + row)
        log_p = tl.maximum(x + (gap - tl.load(stats_ptr + 3 * num_rows + row))[:, None], -1e30)  # x may be -inf
        dz -= h * tl.exp2(log_p * LOG2_E) * (log_p + tl.load(stats_ptr + 4 * num_rows + row))
    tl.store(dz_ptr + row * kept_width + word, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    """x *= scale; nothing is read or written where the scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, (x * scale).to(x_ptr.dtype.element_ty), mask=at < size)


def scale_in_place(gradients: Sequence[Tensor | None], scale: Tensor, backend: Backend) -> None:
    """Those that are there (contiguous) times a scalar of their device, which in Triton the host does not look at."""
    for x in gradients:
        if x is None or not x.numel():
            continue
        if backend == "triton":
            _scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, scale, x.numel(), BLOCK=4096, num_warps=8)
        elif scale != 1:
            x.mul_(scale)


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """cuBLAS may by default add up the parts of a long sum in 16 bits; dhidden sums over the whole vocabulary."""
    flags = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)


def backward_tiles(
    rows: HeadRows, stats: Tensor, kept: Kept | None, g: Tensor, h: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dL / dhidden, dL / dweight), those that are needed; `kept` of the first rows becomes their dz."""
    plan = plan_of(rows)
    num_rows = len(rows.hidden)
    unit = None
    if num_rows and rows.hidden.dtype == torch.float16:  # g is the size of 1 / tokens: times p it would vanish
        unit = g.abs() if rows.tau is None else g.abs() / rows.tau
        unit = (unit if h is None else torch.maximum(unit, h.abs())).amax().clamp_min(1e-30)
        g, h = g / unit, None if h is None else h / unit
    workspace = rows.hidden.new_empty(plan.rows, plan.width) if kept is None else kept.workspace
    products = _Products(rows, plan, needs, in_float32=unit is not None)
    for at in chunks(num_rows, plan.rows):
        if kept is not None and at.start == 0:
            dlogits_of_kept(rows, plan, at, kept, stats[:, at], g[at], rows_at(h, at))
        else:
            _dlogits(rows, plan, at, workspace, stats[:, at].contiguous(), g[at], rows_at(h, at))
        products.add(workspace, at)
    del workspace, kept  # before the sum is rounded into a tensor of its own
    return products.result(unit)


def gradient_tiles(
    rows: HeadRows, token_gradient: TokenGradient, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward and backward chunk by chunk, so that x of one chunk is all that is ever kept.

    Returns:
        (stats [5, n], dL / dhidden, dL / dweight).
    """
    plan = plan_of(rows)
    num_rows = len(rows.hidden)
    stats = plan.bias.new_empty(5, num_rows)
    products = _Products(rows, plan, needs)
    kept = new_kept(rows, plan, min(num_rows, plan.rows))
    for at in chunks(num_rows, plan.rows):
        part = stats_of_tiles(rows, plan, at, kept)
        g, h = token_gradient(at, part[0], part[4])
        dlogits_of_kept(rows, plan, at, kept, part, g, h)
        products.add(kept.workspace, at)
        stats[:, at] = part
    del kept
    return stats, *products.result(None)


def _dlogits(rows: HeadRows, plan: Plan, at: slice, dz: Tensor, stats: Tensor, g: Tensor, h: Tensor | None) -> None:
    part = rows.at(at)
    num_rows, num_features = part.hidden.shape
    config = launch_config("dlogits" if h is None else "entropy", plan.tma)
    num_tiles = triton.cdiv(num_rows, config["ROWS"]) * (plan.width // config["WORDS"])
    launch = partial(
        _dlogits_kernel[(min(num_tiles, _num_programs(part.hidden.device)) if plan.tma else num_tiles,)],
        part.hidden,
        rows.weight,
        part.targets,
        part.tau,
        plan.bias,
        stats,
        g,
        h,
        dz,
        num_rows,
        rows.vocab_size,
        num_features,
        plan.width,
        HAS_TAU=part.tau is not None,
        HAS_H=h is not None,
        **config,
    )
    launch_tiles(plan.tma, launch)


def _num_programs(device: torch.device) -> int:
    """One per multiprocessor, which a tile's shared memory fills."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def dlogits_of_kept(
    rows: HeadRows, plan: Plan, at: slice, kept: Kept, stats: Tensor, g: Tensor, h: Tensor | None
) -> None:
    """Turns the x of the rows `at` into their dz."""
    part = rows.at(at)
    words = launch_config("keep", plan.tma)["WORDS"]
    _kept_kernel[(len(part.targets), triton.cdiv(plan.width, _BLOCK))](
        kept.x,
        kept.largest,
        part.targets,
        part.tau,
        stats.contiguous(),
        g,
        h,
        kept.workspace,
        len(part.targets),
        plan.width,
        HAS_TAU=part.tau is not None,
        HAS_H=h is not None,
        WORDS=words,
        TILES=_BLOCK // words,
        num_warps=8,
    )


class _Products:
    """The two products of each chunk's dz."""

    def __init__(self, rows: HeadRows, plan: Plan, needs: tuple[bool, bool], *, in_float32: bool = False) -> None:
        parts = num_chunks(len(rows.hidden), plan.rows)
        self.rows = rows
        # Whole tiles, of which dz is 0 past the vocabulary: for odd sizes cuBLAS has no product made for Hopper, and
        # took 134 ms in place of 14 (8192 x 3584 x 151665).
        self.words = min(plan.width, len(rows.weight))
        self.dhidden = torch.empty_like(rows.hidden) if needs[0] else None
        self.dweight = _WeightGradient(rows, in_float32 or parts > 1) if needs[1] else None

    def add(self, dz: Tensor, at: slice) -> None:
        part = self.rows.at(at)
        dz = dz[: len(part.hidden), : self.words]
        with _sums_in_float32():
            if self.dhidden is not None:
                torch.mm(dz, self.rows.weight[: self.words], out=self.dhidden[at])
            if self.dweight is not None:
                self.dweight.add(dz, part.hidden)

    def result(self, unit: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        dhidden = self.dhidden
        if unit is not None and dhidden is not None:
            dhidden = (dhidden * unit).to(dhidden.dtype)
        return dhidden, None if self.dweight is None else self.dweight.result(unit)


class _WeightGradient:
    """dz^T hidden summed over chunks in float32; of one chunk alone the matmul's own float32 is enough."""

    WORDS = 16_384  # at a time, where a product in float32 has to exist beside the sum

    def __init__(self, rows: HeadRows, in_float32: bool) -> None:
        self.dtype = rows.weight.dtype
        self.total = torch.empty_like(rows.weight, dtype=torch.float32 if in_float32 else self.dtype)
        self.total[rows.vocab_size if len(rows.hidden) else 0 :] = 0
        self.is_first = True

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        total, is_first = self.total[: dz.shape[1]], self.is_first
        self.is_first = False
        if total.dtype == dz.dtype:
            torch.mm(dz.T, hidden, out=total) if is_first else torch.addmm(total, dz.T, hidden, out=total)
        elif not adds_in_float32(dz.device, dz.dtype):
            for words in chunks(len(total), self.WORDS):
                product = torch.mm(dz[:, words].T, hidden, out_dtype=torch.float32)
                total[words] = product if is_first else total[words].add_(product)
        elif is_first:
            torch.mm(dz.T, hidden, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, dz.T, hidden, out_dtype=torch.float32, out=total)

    def result(self, unit: Tensor | None) -> Tensor:
        total = self.total if unit is None else self.total.mul_(unit)
        return total.to(self.dtype)


@lru_cache(maxsize=16)
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 sum, in place; older ones refuse the sum's dtype."""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=total)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
