"""Run the benchmarks of a checkout: contenders side by side, the machine's own ceilings first, beside figures kept.

The benchmarks are pytest-benchmark's, in bench/ of a checkout (docs/benchmarks.md); what stands behind `--` is given to
pytest as it is.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from thyme import interrupt
from thyme.config import INTERNAL, POSITIONAL, nearest
from thyme.options import parse as parse_options
from thyme.result import Result

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which benchmarks, of what, and beside which figures."""

    group: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Such as swiglu or sample; none: all of them, which takes minutes. --list names them."""
    list: bool = False
    """Print the groups and run nothing."""
    compare: Path | None = None
    """Figures to stand beside: a JSON of pytest-benchmark, or one of bench/baselines by its name, such as cpu."""
    shapes: str = ""
    """Shapes like 8192x152064,64x49152 in place of a group's own; a single number is the rows."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of every shape; none: each shape's own."""
    contenders: str = ""
    """Only those whose names begin so, such as ours,torch.compile."""
    without: str = ""
    """Not those, such as torch.compile."""
    device: Literal["cpu", "cuda"] | None = None
    """None: the GPU, if there is one."""
    bare: bool = False
    """Ops with all ids and without temperatures, and not as engine and trainer call them."""
    keep: Path | None = None
    """A file for the figures, which --compare reads: with machine, versions, commit and command."""
    pytest: tuple[str, ...] = field(default=(), metadata=INTERNAL)
    """What stands behind --."""


def parse(args: list[str]) -> Config:
    """The config from the command line; what stands behind `--` is pytest's."""
    at = args.index("--") if "--" in args else len(args)
    return replace(parse_options(Config, args[:at]), pytest=tuple(args[at + 1 :]))


def run(config: Config) -> Result:
    """Runs them in a process of their own, whose exit code is pytest's; for programs all figures.

    Raises:
        ValueError: no checkout, no such group, or nothing to compare with.
    """
    groups = groups_of(ROOT)
    if config.list:
        for name, about in groups.items():
            print(f"{name:<17} {about}")
        return Result(groups)
    with TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        words = [*command(config, groups), f"--results={results}"]
        # In a session of its own: a terminal's Ctrl-C would meet it while it is being imported, and end in a traceback.
        child: subprocess.Popen[bytes] | None = None
        try:
            with interrupt.held():
                child = subprocess.Popen(words, stdout=sys.stdout, start_new_session=True)
            code = child.wait()
        except KeyboardInterrupt:  # what it has measured it still prints
            if child is not None:
                child.terminate()
                child.wait()
            raise
        return Result(json.loads(results.read_text()) if results.is_file() else None, code)


def groups_of(root: Path) -> dict[str, str]:
    """The groups of a checkout, with what each is about.

    Raises:
        ValueError: there is no checkout.
    """
    found = sorted((root / "bench").glob("bench_*.py"))
    if not found:
        raise ValueError(
            "the benchmarks are in bench/ of a checkout and are not installed: clone the repository, "
            "`pip install -e '.[dev]'` there, and run `thyme bench`"
        )
    return {path.stem.removeprefix("bench_"): _about(path) for path in found}


def command(config: Config, groups: dict[str, str]) -> list[str]:
    """What is run: bench/table.py, which runs pytest and prints one table.

    Raises:
        ValueError: no such group, nothing to compare with, or pytest-benchmark is missing.
    """
    for name in config.group:
        if name not in groups:
            near = nearest(name, groups)
            raise ValueError(f"group {name!r}: no such group: did you mean {near!r}? ({', '.join(groups)})")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("thyme bench needs pytest-benchmark: pip install -e '.[dev]' in the checkout")
    words = [sys.executable, str(ROOT / "bench" / "table.py")]
    words += [f"bench/bench_{name}.py" for name in config.group]
    for name in ("shapes", "dtype", "contenders", "without", "device"):
        if value := getattr(config, name):
            words.append(f"--{name}={value}")
    words += ["--bare"] if config.bare else []
    words += [f"--against={_kept(config.compare)}"] if config.compare is not None else []
    words += [f"--baseline={config.keep.absolute()}"] if config.keep is not None else []
    return words + list(config.pytest)


def _about(path: Path) -> str:
    """The first sentence of a file, which is not imported."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(": ")[0].rstrip(".")


def _kept(said: Path) -> Path:
    """The figures to compare with, once they are known to be some."""
    baselines = ROOT / "bench" / "baselines"
    path = said if said.is_file() else baselines / f"{said}.json"
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in baselines.glob("*.json")))
        raise ValueError(f"compare {said}: no such file, and not one of the figures kept in bench/baselines: {names}")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        complete = {"benchmarks", "machine_info", "commit_info"} <= set(kept) and "versions" in kept["machine_info"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"compare {path}: not the JSON of pytest-benchmark: {error}") from None
    if not complete:
        raise ValueError(f"compare {path}: no figures of this project's benchmarks: make some with --keep {path}")
    return path.absolute()
