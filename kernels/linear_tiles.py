"""The Triton side of linear_logprob: tiles of rows times words, of the LM head's logits, that never leave a program.

Forward: a program is a tile of rows and 2,048 words; it keeps max, sum e^x, sum x e^x, sum e^(x / tau) and the target's
logit of float32 accumulators, and a second kernel merges the splits in their order: what a row gives does not depend on
the other rows, bit for bit. Backward: a tile of z once more, turned into dz in its epilogue; or the exp tiles that the
forward kept, turned into dz where they lie; then two matmuls by torch. On Hopper tiles arrive by bulk tensor copies
from a producer warp (warp specialization), elsewhere by pointers.

Tensor descriptors are made in the kernels. Warp specialization gives each of two consumers half of a tile's rows, and
with a descriptor of the host's, whose box is the whole tile, each half's copy would write twice what its slot holds.
"""

# mypy: disable-error-code="no-untyped-def"

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPLIT = 2048  # words of one program of the forward
_GROUP = 16  # row tiles that walk the vocabulary side by side, so that they find it in the L2


class HeadRows(NamedTuple):
    """What counts of the arguments, checked."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [n] int64
    tau: Tensor | None  # [n]; None: all 1
    banned: Tensor | None  # bool [vocab_size]
    vocab_size: int
    keep: bool
    workspace_bytes: int


def chunks(num_rows: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step))


def rows_that_fit(workspace_bytes: int, row_bytes: int, unit: int) -> int:
    """How many rows the workspace holds, a multiple of `unit`."""
    if workspace_bytes < unit * row_bytes:
        raise ValueError(
            f"workspace_bytes must be >= {unit * row_bytes} ({unit} rows of logits, the fewest this works on), "
            f"got {workspace_bytes}"
        )
    return workspace_bytes // row_bytes // unit * unit


def rows_at(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[at]


@triton.jit
def _place(num_rows, num_columns, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(first row, column tile) of this program: GROUP row tiles share a column tile before the next one comes."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    inside = program - group * GROUP * num_columns
    width = tl.minimum(tl.cdiv(num_rows, ROWS) - group * GROUP, GROUP)
    return (group * GROUP + inside % width) * ROWS, inside // width


@triton.jit
def _operand(pointer, num_rows, num_features, ROWS: tl.constexpr, FEATURES: tl.constexpr, TMA: tl.constexpr):
    """A [num_rows, num_features] matrix as `_logits_tile` reads it: a descriptor for bulk copies, or as it is."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, [num_rows, num_features], [num_features, 1], [ROWS, FEATURES])
    else:  # noqa: RET505  the condition is a constant, and the two are of different types
        return pointer


@triton.jit
def _logits_tile(
    hidden,
    weight,
    bias_ptr,
    first_row,
    first_word,
    num_rows,
    vocab_size,
    num_features,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """[ROWS, WORDS] logits in float32, -inf where an id does not count: bias is 0 or -inf, padded to whole splits."""
    z = tl.zeros([ROWS, WORDS], tl.float32)
    if TMA:
        for at in tl.range(0, num_features, FEATURES, warp_specialize=SPECIALIZE):
            z = tl.dot(hidden.load([first_row, at]), weight.load([first_word, at]).T, z, input_precision="ieee")
    else:
        row = first_row + tl.arange(0, ROWS)
        word = first_word + tl.arange(0, WORDS)
        feature = tl.arange(0, FEATURES)
        a_ptr = hidden + row[:, None].to(tl.int64) * num_features + feature[None, :]
        b_ptr = weight + word[None, :].to(tl.int64) * num_features + feature[:, None]
        for at in range(0, num_features, FEATURES):
            inside = feature < num_features - at
            a = tl.load(a_ptr + at, mask=(row < num_rows)[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptr + at, mask=(word < vocab_size)[None, :] & inside[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision="ieee")
    return z + tl.load(bias_ptr + first_word + tl.arange(0, WORDS))[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    tau_ptr,
    bias_ptr,
    partials_ptr,
    kept_ptr,
    kept_max_ptr,
    num_rows,
    vocab_size,
    num_features,
    kept_width,
    HAS_TAU: tl.constexpr,
    KEEP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """partials [5, splits, n]: largest, sum e^x, sum x e^x, sum e^(x / tau), the target's logit or -inf."""
    num_splits = tl.cdiv(vocab_size, SPLIT)
    first_row, split = _place(num_rows, num_splits, ROWS, GROUP)
    hidden = _operand(hidden_ptr, num_rows, num_features, ROWS, FEATURES, TMA)
    weight = _operand(weight_ptr, vocab_size, num_features, WORDS, FEATURES, TMA)
    row = first_row + tl.arange(0, ROWS)
    alive = row < num_rows
    # Finite, so that no difference is -inf - -inf.
    largest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    x_total = tl.zeros([ROWS], tl.float32)
    tempered_total = tl.zeros([ROWS], tl.float32)
    z_target = tl.full([ROWS], -float("inf"), tl.float32)
    for first_word in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab_size), WORDS):
        z = _logits_tile(
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
        # Row vectors are loaded again for each tile: held through the matmul they would spill.
        target = tl.load(targets_ptr + row, mask=alive, other=-1).to(tl.int32) - first_word
        hit = tl.arange(0, WORDS)[None, :] == target[:, None]
        z_target = tl.maximum(z_target, tl.max(tl.where(hit, z, -float("inf")), 1))
        new_largest = tl.maximum(largest, tl.max(z, 1))
        gap = tl.maximum(largest - new_largest, -1e30)
        x = tl.maximum(z - new_largest[:, None], -1e30)
        e = tl.exp(x)
        scale = tl.exp(gap)
        x_total = scale * (x_total + gap * total) + tl.sum(e * x, 1)
        total = scale * total + tl.sum(e, 1)
        if HAS_TAU:
            inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32)
            e = tl.exp(x * inverse_tau[:, None])
            tempered_total = tl.exp(gap * inverse_tau) * tempered_total + tl.sum(e, 1)
        if KEEP:  # no mask: the buffer has whole tiles
            word = first_word + tl.arange(0, WORDS)
            out_ptr = kept_ptr + row[:, None].to(tl.int64) * kept_width + word[None, :]
            tl.store(out_ptr, e.to(kept_ptr.dtype.element_ty))
            tl.store(kept_max_ptr + first_word // WORDS * num_rows + row, new_largest, mask=alive)
        largest = new_largest
    out_ptr = partials_ptr + split * num_rows + row
    plane = num_splits * num_rows
    tl.store(out_ptr, largest, mask=alive)
    tl.store(out_ptr + plane, total, mask=alive)
    tl.store(out_ptr + 2 * plane, x_total, mask=alive)
    tl.store(out_ptr + 3 * plane, tempered_total, mask=alive)
    tl.store(out_ptr + 4 * plane, z_target, mask=alive)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(partials_ptr, tau_ptr, stats_ptr, num_rows, num_splits, HAS_TAU: tl.constexpr, ROWS: tl.constexpr):
    """stats [5, n]: logprob, largest, log sum e^(x / tau), log sum e^x, entropy; the splits in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < num_rows
    inverse_tau = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32)
    largest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    x_total = tl.zeros([ROWS], tl.float32)
    tempered_total = tl.zeros([ROWS], tl.float32)
    z_target = tl.full([ROWS], -float("inf"), tl.float32)
    plane = num_splits * num_rows
    for split in range(0, num_splits):
        in_ptr = partials_ptr + split * num_rows + row
        other = tl.load(in_ptr, mask=alive, other=0.0)
        other_total = tl.load(in_ptr + plane, mask=alive, other=1.0)
        new_largest = tl.maximum(largest, other)
        gap = tl.maximum(largest - new_largest, -1e30)
        other_gap = tl.maximum(other - new_largest, -1e30)
        scale = tl.exp(gap)
        other_scale = tl.exp(other_gap)
        x_total = scale * (x_total + gap * total)
        x_total += other_scale * (tl.load(in_ptr + 2 * plane, mask=alive, other=0.0) + other_gap * other_total)
        total = scale * total + other_scale * other_total
        if HAS_TAU:
            tempered_total = tl.exp(gap * inverse_tau) * tempered_total
            other_scale = tl.exp(other_gap * inverse_tau)
            tempered_total += other_scale * tl.load(in_ptr + 3 * plane, mask=alive, other=1.0)
        z_target = tl.maximum(z_target, tl.load(in_ptr + 4 * plane, mask=alive, other=0.0))
        largest = new_largest
    log_total_raw = tl.log(total)
    log_total = log_total_raw
    if HAS_TAU:
        log_total = tl.where(inverse_tau == 1.0, log_total_raw, tl.log(tempered_total))
    out_ptr = stats_ptr + row
    tl.store(out_ptr, (z_target - largest) * inverse_tau - log_total, mask=alive)
    tl.store(out_ptr + num_rows, largest, mask=alive)
    tl.store(out_ptr + 2 * num_rows, log_total, mask=alive)
    tl.store(out_ptr + 3 * num_rows, log_total_raw, mask=alive)
    tl.store(out_ptr + 4 * num_rows, log_total_raw - x_total / total, mask=alive)


@triton.jit(do_not_specialize=["num_rows"])
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
    """One tile of z again, turned into dz; dz has whole tiles, 0 past vocab_size."""
    first_row, tile = _place(num_rows, dz_width // WORDS, ROWS, GROUP)
    first_word = tile * WORDS
    hidden = _operand(hidden_ptr, num_rows, num_features, ROWS, FEATURES, TMA)
    weight = _operand(weight_ptr, vocab_size, num_features, WORDS, FEATURES, TMA)
    row = first_row + tl.arange(0, ROWS)
    alive = row < num_rows
    z = _logits_tile(
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
    x = z - tl.load(stats_ptr + num_rows + row, mask=alive, other=0.0)[:, None]
    log_total = tl.load(stats_ptr + 2 * num_rows + row, mask=alive, other=0.0)
    target = tl.load(targets_ptr + row, mask=alive, other=-1).to(tl.int32) - first_word
    g = tl.load(g_ptr + row, mask=alive, other=0.0)
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32)
        g *= inverse_tau
        dz = tl.exp(x * inverse_tau[:, None] - log_total[:, None]) * -g[:, None]
    else:
        dz = tl.exp(x - log_total[:, None]) * -g[:, None]
    dz = tl.where(tl.arange(0, WORDS)[None, :] == target[:, None], dz + g[:, None], dz)
    if HAS_H:
        h = tl.load(h_ptr + row, mask=alive, other=0.0)
        log_p = x - tl.load(stats_ptr + 3 * num_rows + row, mask=alive, other=0.0)[:, None]
        log_p = tl.maximum(log_p, -1e30)
        dz -= (
            h[:, None]
            * tl.exp(log_p)
            * (log_p + tl.load(stats_ptr + 4 * num_rows + row, mask=alive, other=0.0)[:, None])
        )
    out_ptr = dz_ptr + row[:, None].to(tl.int64) * dz_width + (first_word + tl.arange(0, WORDS))[None, :]
    tl.store(out_ptr, dz.to(dz_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _scale_kernel(
    kept_ptr,
    kept_max_ptr,
    targets_ptr,
    tau_ptr,
    stats_ptr,
    g_ptr,
    num_rows,
    kept_width,
    HAS_TAU: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp tiles to dz, in place. The target's own p is the exact one: at a sure token 1 - p would be all rounding."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < kept_width
    g = tl.load(g_ptr + row)
    logprob = tl.load(stats_ptr + row)
    largest = tl.load(stats_ptr + num_rows + row)
    log_total = tl.load(stats_ptr + 2 * num_rows + row)
    gap = tl.load(kept_max_ptr + word // WORDS * num_rows + row, mask=inside, other=0.0) - largest
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row).to(tl.float32)
        g *= inverse_tau
        gap *= inverse_tau
    e = tl.load(kept_ptr + row * kept_width + word, mask=inside, other=0.0).to(tl.float32)
    dz = -g * e * tl.exp(gap - log_total)
    dz = tl.where(word == tl.load(targets_ptr + row), g * (1.0 - tl.exp(logprob)), dz)
    tl.store(kept_ptr + row * kept_width + word, dz.to(kept_ptr.dtype.element_ty), mask=inside)


def _has_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether tiles of these come by bulk tensor copies, in tiles made for Hopper (other GPUs have other registers and
    shared memory): rows of whole 16 bytes from addresses that are multiples of 16, and not float32, which has no fast
    matmul to feed."""
    return (
        hidden.is_cuda
        and hidden.dtype != torch.float32
        and torch.cuda.get_device_capability(hidden.device)[0] == 9
        and hidden.shape[1] * hidden.element_size() % 16 == 0
        and hidden.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def _launch(tma: bool, launch: Callable[[], object]) -> None:
    """Descriptors made in a kernel lie in memory that Triton asks the launching context for; the caller's own context,
    and the allocator that it may have set, stay as they are."""
    if not tma:
        launch()
        return
    context = contextvars.copy_context()
    context.run(triton.set_allocator, _descriptor_memory)
    context.run(launch)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch_config(kernel: Literal["forward", "keep", "dlogits", "entropy"], tma: bool) -> dict[str, Any]:
    """Tiles by what the epilogue holds beside the accumulators: compiled for sm_90 none of these spills, and the next
    larger one does. Specialized warps (a producer of copies, two consumers) exist for 4 warps only."""
    if not tma:
        return _tile(64, 64, 32, num_warps=8, num_stages=3) | {"TMA": False, "SPECIALIZE": False}
    if kernel == "keep":
        return _tile(128, 256, 64, num_warps=8, num_stages=3) | {"TMA": True, "SPECIALIZE": False}
    words = 128 if kernel == "entropy" else 256
    return _tile(128, words, 64, num_warps=4, num_stages=4) | {"TMA": True, "SPECIALIZE": True}


def _tile(rows: int, words: int, features: int, **options: int) -> dict[str, Any]:
    return {"ROWS": rows, "WORDS": words, "FEATURES": features, "GROUP": _GROUP} | options


class _TritonPlan(NamedTuple):
    tma: bool
    bias: Tensor  # [whole splits]: 0, or -inf where an id does not count
    rows: int  # of the workspace
    width: int  # of the workspace: words, whole tiles


def _triton_plan(rows: HeadRows) -> _TritonPlan:
    tma = _has_tma(rows.hidden, rows.weight)
    words = max(_launch_config(kernel, tma)["WORDS"] for kernel in ("keep", "dlogits", "entropy"))
    unit = _launch_config("keep", tma)["ROWS"]
    width = triton.cdiv(rows.vocab_size, words) * words
    row_bytes = width * rows.hidden.element_size() + width // words * 4  # and the largest of each tile
    fit = rows_that_fit(rows.workspace_bytes, row_bytes, unit)
    bias = rows.hidden.new_full((triton.cdiv(width, _SPLIT) * _SPLIT,), -torch.inf, dtype=torch.float32)
    bias[: rows.vocab_size] = 0.0
    if rows.banned is not None:
        bias[: rows.vocab_size].masked_fill_(rows.banned, -torch.inf)
    return _TritonPlan(tma, bias, min(fit, max(1, triton.cdiv(len(rows.hidden), unit)) * unit), width)


class _Kept(NamedTuple):
    """exp((z - largest) / tau) of the first rows, and the `largest` of each tile: the maximum up to that tile."""

    tiles: Tensor  # [plan.rows, plan.width]
    largest: Tensor  # [tiles, kept rows]


def forward_tiles(rows: HeadRows) -> tuple[Tensor, _Kept | None]:
    plan = _triton_plan(rows)
    num_rows = len(rows.hidden)
    num_kept = min(num_rows, plan.rows) if rows.keep else 0
    kept = None
    if num_kept:
        words = _launch_config("keep", plan.tma)["WORDS"]
        tiles = rows.hidden.new_empty(plan.rows, plan.width)
        kept = _Kept(tiles, plan.bias.new_empty(plan.width // words, num_kept))
    parts = [
        _stats(rows, plan, at, own)
        for at, own in ((slice(0, num_kept), kept), (slice(num_kept, num_rows), None))
        if at.start < at.stop
    ]
    return torch.cat(parts, 1) if parts else plan.bias.new_empty(5, 0), kept


def _stats(rows: HeadRows, plan: _TritonPlan, at: slice, kept: _Kept | None) -> Tensor:
    num_rows, num_features = at.stop - at.start, rows.hidden.shape[1]
    num_splits = triton.cdiv(rows.vocab_size, _SPLIT)
    config = _launch_config("forward" if kept is None else "keep", plan.tma)
    partials = plan.bias.new_empty(5, num_splits, num_rows)
    stats = plan.bias.new_empty(5, num_rows)
    tau = rows_at(rows.tau, at)
    launch = partial(
        _forward_kernel[(triton.cdiv(num_rows, config["ROWS"]) * num_splits,)],
        rows.hidden[at],
        rows.weight,
        rows.targets[at],
        tau,
        plan.bias,
        partials,
        None if kept is None else kept.tiles,
        None if kept is None else kept.largest,
        num_rows,
        rows.vocab_size,
        num_features,
        plan.width,
        HAS_TAU=tau is not None,
        KEEP=kept is not None,
        SPLIT=_SPLIT,
        **config,
    )
    _launch(plan.tma, launch)
    _merge_kernel[(triton.cdiv(num_rows, 128),)](
        partials, tau, stats, num_rows, num_splits, HAS_TAU=tau is not None, ROWS=128, num_warps=4
    )
    return stats


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
    rows: HeadRows, stats: Tensor, kept: _Kept | None, g: Tensor, h: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    plan = _triton_plan(rows)
    num_rows, vocab_size = len(rows.hidden), rows.vocab_size
    unit = None
    if num_rows and rows.hidden.dtype == torch.float16:  # g is the size of 1 / tokens: times p it would vanish
        unit = g.abs() if rows.tau is None else g.abs() / rows.tau
        unit = (unit if h is None else torch.maximum(unit, h.abs())).amax().clamp_min(1e-30)
        g, h = g / unit, None if h is None else h / unit
    workspace = rows.hidden.new_empty(plan.rows, plan.width) if kept is None else kept.tiles
    dhidden = torch.empty_like(rows.hidden) if needs[0] else None
    dweight = _WeightGradient(rows.weight, one_chunk=num_rows <= plan.rows and unit is None) if needs[1] else None
    for at in chunks(num_rows, plan.rows):
        num = at.stop - at.start
        arguments = rows.targets[at], rows_at(rows.tau, at), stats[:, at].contiguous(), g[at], rows_at(h, at)
        if kept is not None and at.start == 0:
            _dlogits_from_tiles(kept, plan, *arguments[:4])
        else:
            _dlogits(rows, plan, at, workspace, *arguments)
        dz = workspace[:num, :vocab_size]
        with _sums_in_float32():
            if dhidden is not None:
                torch.mm(dz, rows.weight[:vocab_size], out=dhidden[at])
            if dweight is not None:
                dweight.add(dz, rows.hidden[at])
    if unit is not None and dhidden is not None:
        dhidden = (dhidden * unit).to(dhidden.dtype)
    return dhidden, None if dweight is None else dweight.result(unit)


def _dlogits(
    rows: HeadRows,
    plan: _TritonPlan,
    at: slice,
    dz: Tensor,
    targets: Tensor,
    tau: Tensor | None,
    stats: Tensor,
    g: Tensor,
    h: Tensor | None,
) -> None:
    num_rows = at.stop - at.start
    config = _launch_config("dlogits" if h is None else "entropy", plan.tma)
    launch = partial(
        _dlogits_kernel[(triton.cdiv(num_rows, config["ROWS"]) * (plan.width // config["WORDS"]),)],
        rows.hidden[at],
        rows.weight,
        targets,
        tau,
        plan.bias,
        stats,
        g,
        h,
        dz,
        num_rows,
        rows.vocab_size,
        rows.hidden.shape[1],
        plan.width,
        HAS_TAU=tau is not None,
        HAS_H=h is not None,
        **config,
    )
    _launch(plan.tma, launch)


def _dlogits_from_tiles(
    kept: _Kept, plan: _TritonPlan, targets: Tensor, tau: Tensor | None, stats: Tensor, g: Tensor
) -> None:
    _scale_kernel[(len(targets), triton.cdiv(plan.width, 2048))](
        kept.tiles,
        kept.largest,
        targets,
        tau,
        stats,
        g,
        len(targets),
        plan.width,
        HAS_TAU=tau is not None,
        WORDS=_launch_config("keep", plan.tma)["WORDS"],
        BLOCK=2048,
        num_warps=8,
    )


class _WeightGradient:
    """dz^T hidden summed over chunks in float32; of one chunk alone the matmul's own float32 is enough."""

    WORDS = 16_384  # at a time, so that a chunk's product in float32 stays small beside the sum

    def __init__(self, weight: Tensor, one_chunk: bool) -> None:
        dtype = weight.dtype if one_chunk else torch.float32
        self.total = torch.zeros_like(weight, dtype=dtype)
        self.weight, self.one_chunk = weight, one_chunk

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        if self.one_chunk:
            torch.mm(dz.T, hidden, out=self.total[: dz.shape[1]])
            return
        for words in chunks(dz.shape[1], self.WORDS):
            part = dz[:, words].T
            if dz.dtype == torch.float32:
                self.total[words].addmm_(part, hidden)
            else:
                self.total[words] += torch.mm(part, hidden, out_dtype=torch.float32)

    def result(self, unit: Tensor | None) -> Tensor:
        total = self.total if unit is None else self.total.mul_(unit)
        return total.to(self.weight.dtype)
