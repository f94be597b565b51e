"""Facades: what a type checker is told a package has is what Python finds there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(p.parent.name for p in (ROOT / "thyme").glob("*/__init__.py") if "facade(" in p.read_text())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_facade_gives_what_it_tells_type_checkers(package: str) -> None:
    tree = ast.parse((ROOT / "thyme" / package / "__init__.py").read_text())
    [checked] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    facade = import_module(f"thyme.{package}")
    assert sorted(told) == facade.__all__
    for name, module in told.items():
        assert getattr(facade, name) is getattr(import_module(module), name)


def test_an_unknown_name_is_an_attribute_error_that_names_both() -> None:
    with pytest.raises(AttributeError, match=r"module .thyme\.engine. has no attribute .Engin."):
        import_module("thyme.engine").Engin  # noqa: B018


def test_every_facade_is_made_the_same_way() -> None:
    assert {"engine", "evals", "model", "rollout", "sandbox", "train"} <= set(PACKAGES)
    for path in (ROOT / "thyme").rglob("__init__.py"):
        assert "def __getattr__" not in path.read_text(), f"{path.relative_to(ROOT)}: use thyme._lazy.facade"
