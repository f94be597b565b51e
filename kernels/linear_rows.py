"""Rows of hidden states and the LM head over them: what a pass is told, how it goes by chunks, and the pass on a CPU.

On a CPU the logits of a chunk exist, as many as a core's cache holds; the row pass over them is in torch (the
definition) or in C++, logit_rows.py has both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, values_visible
from thyme.kernels.logit_rows import ROW_PASS, Backend, BannedIds, check_row_arguments, ids_of, logprobs

TokenGradient = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(rows, their logprob, their entropy) -> (g = dL / dlogprob, h = dL / dentropy or None)."""

_CHUNK = 1 << 18  # logits in flight at once on the CPU, which a core's cache holds,
_CHUNK_ROWS = 256  # but for many words no fewer rows than make it worth to walk dL / dweight once more
MIN_ROWS = 16  # BLAS gives other bits for a few rows


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

    def at(self, rows: slice) -> HeadRows:
        """Some of the rows."""
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows], tau=rows_at(self.tau, rows))


def chunks(num_rows: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step))


def num_chunks(num_rows: int, step: int) -> int:
    """How many slices `chunks` gives, at least one."""
    return max(1, -(-num_rows // step))


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


def counted_rows(mask: Tensor, num_counted: int | None) -> Tensor | None:
    """The rows of True, [num_counted] int64, ascending; None: all of them.

    Without a number the host waits for the device once, to learn it. With one it doesn't.

    Raises:
        ValueError: a mask of another shape or dtype, or, where values are visible, of another number of rows.
    """
    check_tensor("mask", mask, (None,), (torch.bool,))
    if num_counted is None:
        return mask.nonzero().flatten()
    if not 0 <= num_counted <= len(mask):
        raise ValueError(f"num_counted must be in [0, {len(mask)}] (the rows), got {num_counted}")
    if values_visible(mask) and int(mask.sum()) != num_counted:
        raise ValueError(f"num_counted is {num_counted}, but {int(mask.sum())} rows count")
    if num_counted == len(mask):
        return None
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:num_counted]


def spread(x: Tensor, counted: Tensor | None, num_rows: int) -> Tensor:
    """x [n] of the rows that count among all [num_rows], 0 elsewhere."""
    return x if counted is None else x.new_zeros(num_rows).index_copy(0, counted, x)


def checked_rows(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    num_counted: int | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
    *,
    keep: bool,
    workspace_bytes: int,
) -> tuple[HeadRows, Tensor | None]:
    """(the rows that count, which they are: `counted_rows`); arguments as in `linear_logprob`.

    Raises:
        ValueError: as in `linear_logprob`.
    """
    check_tensor("hidden", hidden, (None, None), FLOATS if backend == "triton" else FLOATS_AND_DOUBLE)
    check_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden.device)
    if backend == "triton" and not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    targets, tau, banned, vocab_size = check_row_arguments(
        len(hidden), len(weight), hidden.device, targets, temperature, mask, vocab_size, banned_ids
    )
    counted = None if mask is None else counted_rows(mask, num_counted)
    if counted is not None:
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
        tau = None if tau is None else tau.index_select(0, counted)
    tau = None if tau is None else tau.contiguous()
    rows = HeadRows(hidden.contiguous(), weight, targets.contiguous(), tau, banned, vocab_size, keep, workspace_bytes)
    return rows, counted


class _Plan(NamedTuple):
    weight: Tensor  # [vocab_size, H], in the dtype that is computed in
    banned: Tensor | None  # ids
    z: Tensor  # [step, vocab_size], the logits of one chunk
    kept_rows: int


def _plan(rows: HeadRows) -> _Plan:
    dtype = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
    fit = rows_that_fit(rows.workspace_bytes, rows.vocab_size * dtype.itemsize, MIN_ROWS)
    step = min(fit, max(_CHUNK_ROWS, _CHUNK // rows.vocab_size // MIN_ROWS * MIN_ROWS))
    num_rows, left = len(rows.hidden), fit - step
    return _Plan(
        weight=rows.weight[: rows.vocab_size].to(dtype),
        banned=ids_of(rows.banned),
        z=rows.hidden.new_empty(max(MIN_ROWS, min(step, num_rows)), rows.vocab_size, dtype=dtype),
        kept_rows=0 if not rows.keep else num_rows if num_rows <= left else left // step * step,
    )


def _logits(rows: HeadRows, plan: _Plan, at: slice) -> Tensor:
    hidden = rows.hidden[at].to(plan.z.dtype)
    num = len(hidden)
    if num < MIN_ROWS:
        hidden = torch.cat((hidden, hidden.new_zeros(MIN_ROWS - num, hidden.shape[1])))
    return torch.mm(hidden, plan.weight.T, out=plan.z[: len(hidden)])[:num]


def forward_cpu(rows: HeadRows, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """(stats [5, n]: logprob, then those of the row pass; p_tau of the first rows)."""
    plan = _plan(rows)
    kept = plan.z.new_empty(plan.kept_rows, rows.vocab_size) if plan.kept_rows else None
    stats = plan.z.new_empty(5, len(rows.hidden))
    for at in chunks(len(rows.hidden), len(plan.z)):
        p = kept[at] if kept is not None and at.stop <= len(kept) else None
        _softmax(rows, plan, at, stats, p, backend)
    return stats, kept


def _softmax(rows: HeadRows, plan: _Plan, at: slice, stats: Tensor, p: Tensor | None, backend: Backend) -> Tensor:
    """Fills the stats of the rows `at`, and p_tau if it is given; returns their logits."""
    z, tau = _logits(rows, plan, at), rows_at(rows.tau, at)
    stats[1:, at] = ROW_PASS[backend].softmax(z, tau, plan.banned, p=p)
    stats[0, at], _ = logprobs(z, rows.targets[at], tau, stats[1:, at])
    return z


def backward_cpu(
    rows: HeadRows,
    stats: Tensor,
    kept: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    needs: tuple[bool, bool],
    *,
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    """(dL / dhidden, dL / dweight), those that are needed; `kept` of the first rows becomes their dz."""
    plan = _plan(rows)
    products = _Products(rows, plan, needs)
    for at in chunks(len(rows.hidden), len(plan.z)):
        if kept is not None and h is None and at.stop <= len(kept):
            dz = _dlogits_of_p(rows, at, kept[at], g[at])
        else:
            dz = _dlogits(rows, plan, at, _logits(rows, plan, at), stats, g[at], rows_at(h, at), backend)
        products.add(dz, at)
    return products.result()


def gradient_cpu(
    rows: HeadRows, token_gradient: TokenGradient, needs: tuple[bool, bool], *, backend: Backend
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward and backward chunk by chunk: (stats [5, n], dL / dhidden, dL / dweight)."""
    plan = _plan(rows._replace(keep=False))
    stats = plan.z.new_empty(5, len(rows.hidden))
    products = _Products(rows, plan, needs)
    p = torch.empty_like(plan.z)
    for at in chunks(len(rows.hidden), len(plan.z)):
        own = p[: at.stop - at.start]
        z = _softmax(rows, plan, at, stats, own, backend)
        g, h = token_gradient(at, stats[0, at], stats[4, at])
        dz = _dlogits_of_p(rows, at, own, g) if h is None else _dlogits(rows, plan, at, z, stats, g, h, backend)
        products.add(dz, at)
    return stats, *products.result()


def _dlogits_of_p(rows: HeadRows, at: slice, p: Tensor, g: Tensor) -> Tensor:
    """In place."""
    tau = rows_at(rows.tau, at)
    factor = g[:, None] if tau is None else (g / tau.to(g.dtype))[:, None]
    return p.mul_(-factor).scatter_add_(-1, rows.targets[at, None], factor)


def _dlogits(
    rows: HeadRows,
    plan: _Plan,
    at: slice,
    z: Tensor,
    stats: Tensor,
    g: Tensor,
    h: Tensor | None,
    backend: Backend,
) -> Tensor:
    """In place."""
    ROW_PASS[backend].gradient(z, rows.targets[at], rows_at(rows.tau, at), plan.banned, stats[1:, at], g, h, z)
    return z


class _Products:
    """The two products of each chunk's dz, summed in the dtype that is computed in."""

    def __init__(self, rows: HeadRows, plan: _Plan, needs: tuple[bool, bool]) -> None:
        self.rows, self.plan = rows, plan
        self.dhidden = plan.z.new_empty(rows.hidden.shape) if needs[0] else None
        self.dweight = plan.z.new_zeros(rows.weight.shape) if needs[1] else None

    def add(self, dz: Tensor, at: slice) -> None:
        if self.dhidden is not None:
            torch.mm(dz, self.plan.weight, out=self.dhidden[at])
        if self.dweight is not None:
            total = self.dweight[: self.rows.vocab_size]
            torch.addmm(total, dz.T, self.rows.hidden[at].to(dz.dtype), out=total)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        dtype = self.rows.hidden.dtype
        return (
            None if self.dhidden is None else self.dhidden.to(dtype),
            None if self.dweight is None else self.dweight.to(dtype),
        )
