"""The line of a verb's long work, each time it changes, as a terminal would show it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from thyme.progress import Line


def watched(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """How far work is that `module` shows from now on, such as "build 3/7  kept 2": without what depends on time."""
    shown: list[str] = []

    class Told(Line):
        label = ""

        def _tell(self, *args: Any) -> None:
            super()._tell(*args)
            told = [part for part in self.told().split("  ") if "/s" not in part and "s/" not in part]
            shown.append("  ".join([f"{self.label} {told[0]}", *(part for part in told[1:] if "left" not in part)]))

    @contextmanager
    def progress(total: int | None, label: str, unit: str = "step") -> Iterator[Line]:
        line = Told(label, total, unit)
        line.label = label
        yield line

    monkeypatch.setattr(module, "progress", progress)
    return shown
