"""Numbers of a config: whole where the field says so, and numbers at all. Standard library only.

The command line and recipes give each field what it asks for; a caller in Python may give anything, and a fraction or
something that is not a number passes every comparison with a limit until it ends a step hours later.
"""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def check_numbers(config: Any, name: str) -> None:
    """Checks the fields of a dataclass that are declared int or float, or one of them or None.

    Args:
        config: an instance of the dataclass.
        name: what errors call it.

    Raises:
        ValueError: a value is of another type, or not a number.
    """
    for field in fields(config):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        value = getattr(config, field.name)
        declared = kind.removesuffix(" | None")
        if value is None and (declared != kind or field.default is None):
            continue
        if declared == "int" and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name}.{field.name} must be a whole number, got {value!r}")
        if declared == "float":
            check_number(value, f"{name}.{field.name}")


def check_number(value: Any, name: str) -> None:
    """Checks one value that may have a fraction.

    Raises:
        ValueError: it is of another type, or not a number.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
