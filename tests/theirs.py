"""VLMEvalKit's own functions (PyPI ms-vlmeval), taken out of its files: its package needs more than tests install."""

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

UNINSTALLED = "VLMEvalKit's rules are not installed: pip install --no-deps ms-vlmeval==0.0.20"


@cache
def _folder() -> Path | None:
    """Of the package; asked before anything stands in for it."""
    found = importlib.util.find_spec("vlmeval")
    return None if found is None or found.origin is None else Path(found.origin).parent


def module(path: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> ModuleType:
    """One file of it; what it imports from the package is `given`, its own punctuation rule, or nothing."""
    root = _folder()
    if root is None:
        pytest.skip(UNINSTALLED)

    class Anything(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return given.get(name, lambda *_, **__: None)

    source = (root / "smp" / "misc.py").read_text()
    start = source.index("def process_punctuation")
    space: dict[str, Any] = {"re": re}
    exec(source[start : source.index("\ndef ", start + 1)], space)
    given.setdefault("process_punctuation", space["process_punctuation"])
    given.setdefault("istype", lambda text, kind: kind is list and text.startswith("["))
    given.setdefault("listinstr", lambda names, text: any(name in text for name in names))
    if "can_infer" not in given and path != "utils/matching_util.py":
        rules = module("utils/matching_util.py", monkeypatch)
        given |= {name: getattr(rules, name) for name in ("can_infer", "can_infer_lego")}
    for name in _imported((root / path).read_text()):
        monkeypatch.setitem(sys.modules, name, Anything(name))
    spec = importlib.util.spec_from_file_location(f"theirs_{Path(path).stem}", root / path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _imported(source: str) -> set[str]:
    """The modules of the package that a file of it imports, and their parents."""
    found: set[str] = {"vlmeval"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmeval"):
            parts = str(node.module).split(".")
            found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return found
