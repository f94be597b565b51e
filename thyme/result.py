"""What a verb found, for programs: `--json` prints it as one JSON value on stdout, where nothing else is then written.

A verb says it once, beside what it prints for people; `thyme.cli` does the rest. Standard library only.
"""

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What `run(config)` of a verb may return."""

    data: Any
    """Dataclasses, dicts, lists, paths, enums and plain values."""
    code: int = 0
    """The exit code."""

    def to_json(self) -> str:
        """The data as JSON; a number that is not finite is null, since JSON has none such, and half a surrogate pair,
        as in the name of a file that is no UTF-8, stays as its escape."""
        text = json.dumps(_plain(self.data), indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
