"""What a group of contenders should take, before it is timed: by the bytes and products that it counts, and on a GPU by
what the kernels issue, which the gate has counted (bench/gate).

Each is a time alone; the largest is the prediction. Kernels that follow one another are added up.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import configurations
import counted
import harness
import model

_SUMS = ("row_stats", r"_partial_kernel bf16, 151665 ids$")
# Of a group's title: the kernels that it launches, by module and by op, kernel and what of their configuration; the
# first number of the title is the rows, of the configuration's shape too.
KERNELS = {
    r"sample: ": (_SUMS, ("sample_blocks", r"_draw_kernel bf16, 151665 ids$")),
    r"sample with ": (_SUMS, ("sample_cut", r"_candidates_kernel bf16, 151665 ids$")),
    r"grpo_loss forward \+ backward: ": (_SUMS, ("token_logprobs", r"_backward_kernel bf16$")),
    r"rmsnorm: ": (("rmsnorm", r"^rmsnorm _forward_kernel bf16, 3584, for rollout$"),),
    r"add_rmsnorm: ": (("rmsnorm", r"add_rmsnorm _forward_kernel bf16, 3584, for rollout$"),),
    r"add_rmsnorm backward: ": (("rmsnorm", r"add_rmsnorm _backward_kernel bf16, 3584$"),),
    r"swiglu: ": (("swiglu", r"_forward_kernel bf16, 18944$"),),
    r"swiglu forward \+ backward: ": (("swiglu", r" bf16, 18944$"),),
    r"mrope: ": (("mrope", r" bf16, 28 \+ 4 heads of 128$"),),
    r"mrope forward \+ backward: ": (("mrope", r" bf16, 28 \+ 4 heads of 128(, backward)?$"),),
    r"mrope_write_kv with bias: ": (("kv_cache", r" bf16, 28/4 heads of 128, bias$"),),
}


def seconds(group: harness.Group) -> dict[str, float]:
    """By what binds: "copy", "matmul", and "issue" on a GPU where the kernels are counted. The rates are those that
    this process has measured, times what good kernels reach of them."""
    terms = {"copy": group.num_bytes / (harness.copy_bytes_per_s() * model.MOVED)}
    if group.flops:
        terms["matmul"] = group.flops / (harness.matmul_flops_per_s(group.dtype) * model.MULTIPLIED)
    if harness.GPU and (issue := issue_seconds(group.title, _card(), _version())):
        terms["issue"] = issue
    return terms


def issue_seconds(title: str, card: model.Card, version: str) -> float:
    """Of the kernels of a group by its title; 0 where none of them is counted."""
    rows = re.search(r": (\d+)", title)
    if rows is None:
        return 0.0
    return sum(
        model.issue_seconds(card, row.most, work.elements / _first(work.shape) * int(rows.group(1)))
        for row, work in launches(title, version)
    )


def launches(title: str, version: str) -> Iterator[tuple[counted.Row, model.Work]]:
    """The counted rows of a group's kernels, each with the work of its configuration."""
    for pattern, kernels in KERNELS.items():
        for module, wanted in kernels if re.match(pattern, title) else ():
            for key, row in counted.kept(version, module).items():
                work = _works().get((module, *key), model.Work())
                if re.search(wanted, " ".join(key)) and work.elements:
                    yield row, work


@cache
def _works() -> dict[tuple[str, ...], model.Work]:
    return {(one.module, one.op, one.kernel, one.what): one.work for one in configurations.configurations()}


def _first(shape: str) -> int:
    return int(shape.split()[0])


def _version() -> str:
    import triton

    return str(triton.__version__)


def _card() -> model.Card:
    """The GPU as it is: its multiprocessors at the clock of the data sheet's card."""
    import torch

    properties: Any = torch.cuda.get_device_properties(harness.DEVICE)
    return model.Card(
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        clock_hz=model.H100.clock_hz,
        bytes_per_s=harness.copy_bytes_per_s(),
        flops_per_s=0,
    )
