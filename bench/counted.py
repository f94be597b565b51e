"""What the gate counts of each configuration, a line each: printed, kept in bench/gate/<Triton version>/<module>.txt,
and compared with what is kept there.

A line is fixed in width, so that a change shows as the figures that changed. What the figures are: sass.py for
instructions, model.py for times.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import model

FOLDER = Path(__file__).parent / "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    op: str
    kernel: str
    what: str
    """The configuration, of one op and kernel."""
    registers: int
    shared: int
    """Bytes a program."""
    programs: int
    """That fit one multiprocessor."""
    waits: str
    """Groups of copies that may be in flight at each wait of a loop, "0,2"; "-" where there is none."""
    least: float
    most: float
    """Instructions of a thread, for each of its elements where the configuration counts them, else in all."""
    exps: float
    """On the longest way; for each element, or in all."""
    denormal: int
    narrow: int
    votes: int
    shuffles: int
    barriers: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.kernel, self.what


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    worse: int = 0
    """1: a larger figure is worse, -1: a smaller one, 0: neither."""


COLUMNS = {
    "op": Column("op", 17),
    "kernel": Column("kernel", 20),
    "what": Column("configuration", 68),
    "registers": Column("regs", 5),
    "shared": Column("shared", 7),
    "programs": Column("an SM", 6, -1),
    "waits": Column("waits", 8),
    "least": Column("least", 8, 1),
    "most": Column("most", 8, 1),
    "exps": Column("exp2", 7, 1),
    "denormal": Column("repairs", 8, 1),
    "narrow": Column("narrow", 7, 1),
    "votes": Column("votes", 6, 1),
    "shuffles": Column("shfl", 5, 1),
    "barriers": Column("bar", 4, 1),
}
LEFT = ("op", "kernel", "what")


def _cells(cells: dict[str, Any]) -> str:
    if long := [name for name, column in COLUMNS.items() if len(str(cells[name])) >= column.width]:
        raise ValueError(f"{cells[long[0]]!r} is too long for its column of {COLUMNS[long[0]].width}: shorten it")
    parts = [
        f"{cells[name]:<{column.width}}" if name in LEFT else f"{cells[name]:>{column.width}}"
        for name, column in COLUMNS.items()
    ]
    return "".join(parts)


def header() -> str:
    return _cells({name: column.title for name, column in COLUMNS.items()})


def line(row: Row, work: model.Work, limits: str) -> str:
    """The figures, and behind them their limits and what they come to at the shape of `work`."""
    cells = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in asdict(row).items()}
    return _cells(cells) + "".join(f"  {more}" for more in (limits, times(row, work)) if more)


def parsed(text: str) -> Row:
    """The row of a line.

    Raises:
        ValueError: it is none.
    """
    cells, at = {}, 0
    for name, column in COLUMNS.items():
        cells[name], at = text[at : at + column.width].strip(), at + column.width
    kinds: dict[str, type] = dict.fromkeys((*LEFT, "waits"), str) | dict.fromkeys(("least", "most", "exps"), float)
    return Row(**{name: kinds.get(name, int)(cell) for name, cell in cells.items()})


def path(version: str, module: str) -> Path:
    """Of a Triton version: its first three numbers."""
    return FOLDER / version.partition("+")[0] / f"{module}.txt"


def kept(version: str, module: str) -> dict[tuple[str, str, str], Row]:
    """Rows by op, kernel and configuration; none where the version has none."""
    file = path(version, module)
    rows = [parsed(text) for text in file.read_text().splitlines()[3:]] if file.exists() else []
    return {row.key: row for row in rows}


def keep(version: str, module: str, lines: list[str]) -> None:
    """Writes the lines of a module's rows, in place of those that were kept."""
    file = path(version, module)
    file.parent.mkdir(parents=True, exist_ok=True)
    title = f"kernels/{module}.py for sm_90 by Triton {version.partition('+')[0]}; written by bench/gate.py --update"
    file.write_text("\n".join([title, "", header(), *lines]) + "\n")


def worse(row: Row, before: Row) -> Iterator[str]:
    """What has become worse, both figures in each line."""
    for name, column in COLUMNS.items():
        now, then = getattr(row, name), getattr(before, name)
        if column.worse and column.worse * (now - then) > 0:
            yield f"{column.title} {now:g}, {then:g} before"
    if least_wait(row.waits) < least_wait(before.waits):
        yield f"waits {row.waits}, {before.waits} before"


def least_wait(waits: str) -> float:
    return min(map(int, waits.split(",")), default=0) if waits != "-" else float("inf")


def times(row: Row, work: model.Work) -> str:
    """What each resource needs at the shape of `work`: issue, exponentials, bytes on an H100 and an H200, products."""
    h100, h200 = model.H100, model.H200
    terms = {
        "issue": model.issue_seconds(h100, row.most, work.elements),
        "exp2": model.exp_seconds(h100, row.exps, work.elements),
        "bytes H100": model.bytes_seconds(h100, work.num_bytes),
        "H200": model.bytes_seconds(h200, work.num_bytes),
        "matmul": model.matmul_seconds(h100, work.flops),
    }
    shown = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in terms.items() if seconds)
    return f"{work.shape}, ms: {shown}" if work.shape else ""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"
