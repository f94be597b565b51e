"""What of the benchmarks is run, as the command line says: shapes, dtype, and in which form ops are called.

conftest.py sets `chosen` before the files with benchmarks are imported, which ask `shapes` for theirs.
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Selection:
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of `--shapes`; none: those that a file has for the device."""
    dtype: torch.dtype | None = None
    """None: the one of each shape."""
    contenders: tuple[str, ...] = ()
    """Beginnings of the names of those that take part; none: all."""
    without: tuple[str, ...] = ()
    """And of those that do not."""
    bare: bool = False
    """Call ops without temperatures and with all ids, and not as engine and trainer do."""


chosen = Selection()


def takes_part(contender: str) -> bool:
    return (not chosen.contenders or contender.startswith(chosen.contenders)) and not (
        chosen.without and contender.startswith(chosen.without)
    )


def parsed(text: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of "8192x152064,64x49152".

    Raises:
        ValueError: something else, or a number below 1.
    """
    found = []
    for shape in text.split(","):
        numbers = shape.strip().split("x")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"--shapes: {shape.strip()!r} is no shape; write numbers like 8192x152064,64x49152")
        found.append(tuple(map(int, numbers)))
    return tuple(found)


def shapes(defaults: Sequence[Any], make: Callable[..., Any] | None = None) -> list[Any]:
    """The shapes that a file runs: its `defaults`, or those of the command line that are shapes of its kind.

    A default is a tuple: numbers, of which --shapes gives all or the first alone, then what goes with them, a dtype
    among it. Each given shape is run with whatever goes with the defaults.

    The largest come first.

    Args:
        make: of a given shape's numbers, for defaults that are no tuples; None where they are not of its kind.
    """
    if make is not None:
        if not chosen.shapes:
            return list(defaults)
        return [shape for numbers in chosen.shapes if (shape := make(*numbers)) is not None]
    found = [tuple(chosen.dtype or part if isinstance(part, torch.dtype) else part for part in one) for one in defaults]
    if chosen.shapes:
        found = [new for numbers in chosen.shapes for one in found for new in _with(one, numbers)]
    return sorted(dict.fromkeys(found), key=lambda one: -math.prod(part for part in one if isinstance(part, int)))


def _with(default: tuple[Any, ...], numbers: tuple[int, ...]) -> list[tuple[Any, ...]]:
    count = next((at for at, part in enumerate(default) if not isinstance(part, int)), len(default))
    return [(*numbers, *default[len(numbers) :])] if len(numbers) in (1, count) else []


def readable(value: Any) -> Any:
    """A parameter of a test as JSON has it: dtypes by name, anything else that JSON lacks as its text."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple | list):
        return [readable(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


packages: dict[str, str] = {}
"""Of the peers that benchmarks have named, by contender."""


@cache
def version_of(contender: str) -> str:
    """Of the package that a contender comes from: a peer's own, torch's; nothing for what is in this repository."""
    package = "torch" if contender.startswith("torch") else packages.get(contender)
    if package is None:
        return ""
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return ""
