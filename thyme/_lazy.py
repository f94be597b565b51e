"""Facades of packages: a name is imported from its module when it is first used. Standard library only.

A package's __init__ tells type checkers the names, and Python the modules they live in:

    if TYPE_CHECKING:
        from thyme.engine.config import EngineConfig as EngineConfig
    else:
        __all__, __getattr__ = facade(__name__, {"config": ["EngineConfig"]})
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def facade(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """A package's `__all__` and `__getattr__`, from the names that each of its modules gives to it."""
    home = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return sorted(home), __getattr__
