"""Inside the sandbox imports form no circle, those under TYPE_CHECKING and inside functions included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "thyme" / "sandbox"


def import_graph(folder: Path, package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package it imports, wherever in its text. `package` itself is its __init__."""
    names = {f"{package}.{path.stem}": path for path in folder.glob("*.py") if path.stem != "__init__"}
    names[package] = folder / "__init__.py"
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= members & names.keys() or {node.module}
        graph[name] = found & names.keys()
    return graph


def test_the_sandbox_has_no_circle() -> None:
    graph = import_graph(FOLDER, "thyme.sandbox")
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "upper",
    [
        "from p.lower import Lower",
        "import p.lower",
        "from p import lower",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.lower import Lower",
        "def late():\n    from p import lower",
    ],
)
def test_a_circle_is_seen(tmp_path: Path, upper: str) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "upper.py").write_text(upper)
    (tmp_path / "lower.py").write_text("import json\nfrom p import upper")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path, "p")).prepare()
