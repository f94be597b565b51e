"""The figures of an ablation as Markdown."""

from collections.abc import Mapping, Sequence

from thyme.evals.ablation.figures import ArmFigures, Estimate


def to_markdown(title: str, notes: Sequence[str], seeds: Sequence[int], metrics: Mapping[str, list[ArmFigures]]) -> str:
    """A document with a table for each metric, in figures of three significant digits.

    Args:
        title: of the document.
        notes: lines below it: what was run and how figures are made.
        seeds: of the columns.
        metrics: by name, the figures of each arm.
    """
    lines = [f"# {title}", "", *(f"- {note}" for note in notes)]
    columns = ["arm", "mean [95 % interval]", *(f"seed {seed}" for seed in seeds), "difference [95 % interval]"]
    for metric, arms in metrics.items():
        lines += ["", f"## {metric}", "", _row(columns), _row(["---"] * len(columns))]
        for arm in arms:
            by_seed = ["-" if value is None else _number(value) for value in arm.by_seed]
            lines.append(_row([arm.arm, _interval(arm.estimate), *by_seed, _interval(arm.difference, signed=True)]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    mean = _number(estimate.mean, signed=signed)
    if estimate.half_width is None:
        return f"{mean} (one run)"
    low, high = estimate.mean - estimate.half_width, estimate.mean + estimate.half_width
    return f"{mean} [{_number(low, signed=signed)}, {_number(high, signed=signed)}]"


def _number(value: float, *, signed: bool = False) -> str:
    return f"{value:+.3g}" if signed else f"{value:.3g}"
