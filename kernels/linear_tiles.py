"""The Triton forward of the LM head: tiles of rows times words, of its logits, that never leave a program.

A program is a tile of rows and 2,048 words; of float32 accumulators it keeps max, sum e^x, sum x e^x and
sum e^(x / tau), and a second kernel merges the splits in their order: what a row gives does not depend on the other
rows, bit for bit. The target's logit is a product of its own, in the order of the tiles'. Where a gradient will be
wanted, x = z - max so far stays in 16 bits; linear_gradient.py has what becomes of it.

On Hopper tiles arrive by bulk tensor copies from a producer warp (warp specialization), elsewhere by pointers. Tensor
descriptors are made in the kernels. Warp specialization gives each of two consumers half of a tile's rows, and with a
descriptor of the host's, whose box is the whole tile, each half's copy would write twice what its slot holds.

Exponentials are powers of two, one instruction each. An id that does not count has -1e30 added to its logit: finite, so
that no difference is -inf - -inf and nothing needs to be clamped.
"""

# mypy: disable-error-code="no-untyped-def"

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.linear_rows import HeadRows, num_chunks, rows_that_fit

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-2e30)  # below every logit, that of an id that does not count included
NOT_COUNTED: tl.constexpr = tl.constexpr(-1e30)
_SPLIT = 2048  # words of one program of the forward
_GROUP = 16  # row tiles that walk the vocabulary side by side, so that they find it in the L2
_VECTORS = ["targets_ptr", "tau_ptr"]  # slices of what the caller has, which begin anywhere
Kernel = Literal["forward", "keep", "keep float32", "dlogits", "entropy"]


@triton.jit
def place(program, num_rows, num_columns, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share a column tile before the next one comes."""
    group = program // (GROUP * num_columns)
    inside = program - group * GROUP * num_columns
    width = tl.minimum(tl.cdiv(num_rows, ROWS) - group * GROUP, GROUP)
    return group * GROUP + inside % width, inside // width


@triton.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """The rows of a row tile, [ROWS].

    Not by the number at which a descriptor reads the tile, which is tile * ROWS: where warps are specialized Triton
    moves that number on for the second consumer, wherever it is used, and this range too. Rows would be moved on twice:
    the second half of a tile had the results of the next tile's first half, on a GPU alone."""
    return (tile << _log2(ROWS)) + tl.arange(0, ROWS)


@triton.jit
def operand(pointer, num_rows, num_features, ROWS: tl.constexpr, FEATURES: tl.constexpr, TMA: tl.constexpr):
    """A [num_rows, num_features] matrix as `logits_tile` reads it: a descriptor for bulk copies, or as it is."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, [num_rows, num_features], [num_features, 1], [ROWS, FEATURES])
    else:  # noqa: RET505  the condition is a constant, and the two are of different types
        return pointer


@triton.jit
def logits_tile(
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
    """[ROWS, WORDS] logits in float32; bias is 0, or -1e30 where an id does not count, padded to whole splits."""
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


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VECTORS)
def _forward_kernel(
    hidden_ptr,
    weight_ptr,
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
    """partials [3 or 4, splits, n]: largest, sum e^x, sum x e^x, and with a temperature sum e^(x / tau)."""
    num_splits = tl.cdiv(vocab_size, SPLIT)
    row_tile, split = place(tl.program_id(0), num_rows, num_splits, ROWS, GROUP)
    first_row = row_tile * ROWS
    hidden = operand(hidden_ptr, num_rows, num_features, ROWS, FEATURES, TMA)
    weight = operand(weight_ptr, vocab_size, num_features, WORDS, FEATURES, TMA)
    if KEEP:
        kept = operand(kept_ptr, tl.cdiv(num_rows, ROWS) * ROWS, kept_width, ROWS, WORDS, TMA)
    row = rows_of(row_tile, ROWS)
    alive = row < num_rows
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    x_total = tl.zeros([ROWS], tl.float32)
    tempered_total = tl.zeros([ROWS], tl.float32)
    for first_word in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab_size), WORDS):
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
        new_largest = tl.maximum(largest, tl.max(z, 1))
        gap = largest - new_largest
        x = z - new_largest[:, None]  # by itself, so that it is 0 at the largest and no log-prob exceeds 0
        if KEEP:  # no mask: the buffer has whole tiles
            if TMA:
                kept.store([first_row, first_word], x.to(kept_ptr.dtype.element_ty))
            else:
                word = first_word + tl.arange(0, WORDS)
                out_ptr = kept_ptr + row[:, None].to(tl.int64) * kept_width + word[None, :]
                tl.store(out_ptr, x.to(kept_ptr.dtype.element_ty))
            tl.store(kept_max_ptr + first_word // WORDS * num_rows + row, new_largest, mask=alive)
        e = tl.exp2(x * LOG2_E)
        scale = tl.exp2(gap * LOG2_E)
        x_total = scale * (x_total + gap * total) + tl.sum(e * x, 1)
        total = scale * total + tl.sum(e, 1)
        if HAS_TAU:  # loaded again for each tile: held through the matmul it would spill
            inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32) * LOG2_E
            e = tl.exp2(x * inverse_tau[:, None])
            tempered_total = tl.exp2(gap * inverse_tau) * tempered_total + tl.sum(e, 1)
        largest = new_largest
    out_ptr = partials_ptr + split * num_rows + row
    plane = num_splits * num_rows
    tl.store(out_ptr, largest, mask=alive)
    tl.store(out_ptr + plane, total, mask=alive)
    tl.store(out_ptr + 2 * plane, x_total, mask=alive)
    if HAS_TAU:
        tl.store(out_ptr + 3 * plane, tempered_total, mask=alive)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VECTORS)
def _target_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    z_target_ptr,
    num_rows,
    num_features,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """The logit of each row's target, -inf where it does not count: of ROWS x ROWS products, those on the diagonal.

    The instruction and the order over the features are the tiles', so the bits are those of the tile's logit."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < num_rows
    target = tl.load(targets_ptr + row, mask=alive, other=0)
    feature = tl.arange(0, FEATURES)
    a_ptr = hidden_ptr + row[:, None].to(tl.int64) * num_features + feature[None, :]
    b_ptr = weight_ptr + target[None, :] * num_features + feature[:, None]
    z = tl.zeros([ROWS, ROWS], tl.float32)
    for at in range(0, num_features, FEATURES):
        inside = feature < num_features - at
        a = tl.load(a_ptr + at, mask=alive[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr + at, mask=alive[None, :] & inside[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
    mine = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    z_target = tl.sum(tl.where(mine, z, 0.0), 1)
    counts = tl.load(bias_ptr + target, mask=alive, other=0.0) == 0.0
    tl.store(z_target_ptr + row, tl.where(counts, z_target, -float("inf")), mask=alive)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VECTORS)
def _merge_kernel(
    partials_ptr,
    z_target_ptr,
    tau_ptr,
    stats_ptr,
    num_rows,
    num_splits,
    HAS_TAU: tl.constexpr,
    ROWS: tl.constexpr,
):
    """stats [5, n]: logprob, largest, log sum e^(x / tau), log sum e^x, entropy; the splits in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < num_rows
    inverse_tau = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TAU:
        inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=alive, other=1.0).to(tl.float32)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    x_total = tl.zeros([ROWS], tl.float32)
    tempered_total = tl.zeros([ROWS], tl.float32)
    plane = num_splits * num_rows
    for split in range(0, num_splits):
        in_ptr = partials_ptr + split * num_rows + row
        other = tl.load(in_ptr, mask=alive, other=0.0)
        other_total = tl.load(in_ptr + plane, mask=alive, other=1.0)
        new_largest = tl.maximum(largest, other)
        gap = largest - new_largest
        other_gap = other - new_largest
        scale = tl.exp2(gap * LOG2_E)
        other_scale = tl.exp2(other_gap * LOG2_E)
        x_total = scale * (x_total + gap * total)
        x_total += other_scale * (tl.load(in_ptr + 2 * plane, mask=alive, other=0.0) + other_gap * other_total)
        total = scale * total + other_scale * other_total
        if HAS_TAU:
            tempered_total = tl.exp2(gap * (inverse_tau * LOG2_E)) * tempered_total
            other_scale = tl.exp2(other_gap * (inverse_tau * LOG2_E))
            tempered_total += other_scale * tl.load(in_ptr + 3 * plane, mask=alive, other=1.0)
        largest = new_largest
    log_total_raw = tl.log(total)
    log_total = log_total_raw
    if HAS_TAU:
        log_total = tl.where(inverse_tau == 1.0, log_total_raw, tl.log(tempered_total))
    x_target = tl.minimum(tl.load(z_target_ptr + row, mask=alive, other=0.0) - largest, 0.0)
    out_ptr = stats_ptr + row
    tl.store(out_ptr, x_target * inverse_tau - log_total, mask=alive)
    tl.store(out_ptr + num_rows, largest, mask=alive)
    tl.store(out_ptr + 2 * num_rows, log_total, mask=alive)
    tl.store(out_ptr + 3 * num_rows, log_total_raw, mask=alive)
    tl.store(out_ptr + 4 * num_rows, log_total_raw - x_total / total, mask=alive)


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


def launch_tiles(tma: bool, launch: Callable[[], object]) -> None:
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


def launch_config(kernel: Kernel, tma: bool) -> dict[str, Any]:
    """Tiles by what the epilogue holds beside the accumulators: compiled for sm_90 none of these spills, and the next
    larger one does. Specialized warps (a producer of copies, two consumers) exist for 4 warps only; a tile that leaves
    in bulk takes the place of a stage."""
    if not tma:
        stages = 2 if kernel == "keep float32" else 3
        return _tile(64, 64, 32, num_warps=8, num_stages=stages) | {"TMA": False, "SPECIALIZE": False}
    words, stages = {"forward": (256, 4), "entropy": (128, 4)}.get(kernel, (256, 3))
    return _tile(128, words, 64, num_warps=4, num_stages=stages) | {"TMA": True, "SPECIALIZE": True}


def _tile(rows: int, words: int, features: int, **options: int) -> dict[str, Any]:
    return {"ROWS": rows, "WORDS": words, "FEATURES": features, "GROUP": _GROUP} | options


class Plan(NamedTuple):
    """How the rows of one call are taken apart."""

    tma: bool
    bias: Tensor  # [whole splits]: 0, or -1e30 where an id does not count
    rows: int  # of a chunk and of the workspace: whole tiles
    width: int  # of the workspace: words, whole tiles


def plan_of(rows: HeadRows) -> Plan:
    """Chunks of one size, as few as the workspace allows."""
    tma = _has_tma(rows.hidden, rows.weight)
    config = launch_config("keep", tma)
    unit, words = config["ROWS"], config["WORDS"]
    width = triton.cdiv(rows.vocab_size, words) * words
    row_bytes = width * rows.hidden.element_size() + width // words * 4  # and the largest of each tile
    num_rows = len(rows.hidden)
    parts = num_chunks(num_rows, rows_that_fit(rows.workspace_bytes, row_bytes, unit))
    bias = rows.hidden.new_full((triton.cdiv(width, _SPLIT) * _SPLIT,), NOT_COUNTED.value, dtype=torch.float32)
    bias[: rows.vocab_size] = 0.0
    if rows.banned is not None:
        bias[: rows.vocab_size].masked_fill_(rows.banned, NOT_COUNTED.value)
    return Plan(tma, bias, max(1, triton.cdiv(triton.cdiv(num_rows, parts), unit)) * unit, width)


class Kept(NamedTuple):
    """x = z - max so far of some rows, and the `largest` of each tile, which x is a distance to."""

    workspace: Tensor  # [plan.rows, plan.width], the operands' dtype: what dz will be written to
    largest: Tensor  # [tiles, kept rows]

    @property
    def x(self) -> Tensor:
        """The same memory, as it is before: of 16-bit operands float16, whose steps are finest where p is largest."""
        return self.workspace if self.workspace.dtype == torch.float32 else self.workspace.view(torch.float16)


def new_kept(rows: HeadRows, plan: Plan, num_rows: int) -> Kept:
    """Memory for the tiles of `num_rows` rows, at most those of a chunk."""
    tiles = plan.width // launch_config("keep", plan.tma)["WORDS"]
    workspace = rows.hidden.new_empty(plan.rows, plan.width)
    return Kept(workspace, plan.bias.new_empty(tiles, num_rows))


def forward_tiles(rows: HeadRows) -> tuple[Tensor, Kept | None]:
    """(stats [5, n], x of the rows of the first chunk)."""
    plan = plan_of(rows)
    num_rows = len(rows.hidden)
    num_kept = min(num_rows, plan.rows) if rows.keep else 0
    kept = new_kept(rows, plan, num_kept) if num_kept else None
    parts = [
        stats_of_tiles(rows, plan, at, own)
        for at, own in ((slice(0, num_kept), kept), (slice(num_kept, num_rows), None))
        if at.start < at.stop
    ]
    return torch.cat(parts, 1) if parts else plan.bias.new_empty(5, 0), kept


def stats_of_tiles(rows: HeadRows, plan: Plan, at: slice, kept: Kept | None) -> Tensor:
    """stats [5, n] of the rows `at`; `kept` is filled."""
    part = rows.at(at)
    num_rows, num_features = part.hidden.shape
    num_splits = triton.cdiv(rows.vocab_size, _SPLIT)
    keep: Kernel = "keep float32" if rows.hidden.dtype == torch.float32 else "keep"
    config = launch_config("forward" if kept is None else keep, plan.tma)
    partials = plan.bias.new_empty(4 if part.tau is not None else 3, num_splits, num_rows)
    z_target, stats = plan.bias.new_empty(num_rows), plan.bias.new_empty(5, num_rows)
    launch = partial(
        _forward_kernel[(triton.cdiv(num_rows, config["ROWS"]) * num_splits,)],
        part.hidden,
        rows.weight,
        part.tau,
        plan.bias,
        partials,
        None if kept is None else kept.x,
        None if kept is None else kept.largest,
        num_rows,
        rows.vocab_size,
        num_features,
        plan.width,
        HAS_TAU=part.tau is not None,
        KEEP=kept is not None,
        SPLIT=_SPLIT,
        **config,
    )
    launch_tiles(plan.tma, launch)
    _target_kernel[(triton.cdiv(num_rows, 64),)](
        part.hidden,
        rows.weight,
        part.targets,
        plan.bias,
        z_target,
        num_rows,
        num_features,
        ROWS=64,
        FEATURES=config["FEATURES"],
        num_warps=4,
        num_stages=3,
    )
    _merge_kernel[(triton.cdiv(num_rows, 128),)](
        partials, z_target, part.tau, stats, num_rows, num_splits, HAS_TAU=part.tau is not None, ROWS=128, num_warps=4
    )
    return stats
