"""The direction of imports, read from the source: who may know whom."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# part -> the parts of thyme it may import. A part is a folder or a module of thyme/.
ALLOWED: dict[str, set[str]] = {
    "kernels": {"_native"},
    "repetition": {"_native"},
    "config": {"recipes"},
    "options": {"config"},
    "help": {"config", "options"},
    "result": set(),
    "progress": set(),
    "interrupt": set(),
    "any_text": set(),
    "pictures": set(),
    "limits": set(),
    "shard": set(),
    "heap": set(),
    "cluster": set(),
    "trace": set(),
    "sandbox": {"_fork", "pictures", "limits"},
    "model": {"kernels", "pictures", "heap"},
    "engine": {"model", "kernels", "repetition", "trace", "limits"},
    "rollout": {"engine", "sandbox", "model", "pictures", "trace", "limits"},
    "rewards": {"rollout", "trace"},
    "data": {"rollout", "model", "pictures"},
    "build": {"config", "shard", "cluster", "pictures", "sandbox", "rollout", "rewards", "data"},
    "evals": {"config", "progress", "pictures", "rollout", "rewards", "data"},
    "train": {"config", "progress", "interrupt", "rollout", "rewards", "data", "model", "kernels", "trace"},
    "serve": {"rollout", "engine", "sandbox", "model", "pictures"},
    "report": {"rollout", "sandbox"},
    "profile": {"trace", "kernels", "model", "engine"},
    "toy": {"train", "data", "rollout", "model"},
    "verbs": {
        "_native",
        "kernels",
        "repetition",
        "config",
        "options",
        "result",
        "progress",
        "interrupt",
        "shard",
        "cluster",
        "heap",
        "pictures",
        "model",
        "engine",
        "sandbox",
        "rollout",
        "rewards",
        "data",
        "build",
        "evals",
        "train",
        "serve",
        "toy",
        "report",
        "profile",
        "trace",
    },
    "demo": {"verbs", "toy", "train", "evals", "rollout"},
    "cli": {"any_text", "config", "options", "help", "result", "interrupt", "sandbox", "demo", "verbs"},
}
FACES = {"recipes", "__main__", "__init__", "_lazy"}  # no part of their own
BUILT_LATER: set[str] = set()  # rooms that DESIGN names and nobody lives in yet
ROLLOUT_FOR_DATA = {"thyme.rollout.types", "thyme.rollout.prompts"}  # data and rewards know rollout's nouns only


def sources() -> list[tuple[str, Path]]:
    files = [("kernels", p) for p in (ROOT / "kernels").glob("*.py")]
    for path in (ROOT / "thyme").rglob("*.py"):
        relative = path.relative_to(ROOT / "thyme")
        if relative.parts[0] != "kernels":
            files.append((relative.parts[0] if len(relative.parts) > 1 else relative.stem, path))
    return files


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_stands_below_it(part: str) -> None:
    files = [path for name, path in sources() if name == part]
    assert files or part in BUILT_LATER, f"no source for {part}"
    for path in files:
        for name in imports(path):
            if name.startswith("thyme."):
                target = name.split(".")[1]
                assert target == part or target in ALLOWED[part] or target in {"__version__", "_lazy"}, (
                    f"{path.relative_to(ROOT)} imports {name}"
                )


def test_every_module_belongs_to_a_layer() -> None:
    assert {name for name, _ in sources()} <= set(ALLOWED) | FACES


def test_data_and_rewards_know_only_the_nouns_of_rollout() -> None:
    for part, path in sources():
        if part in {"data", "rewards"}:
            modules = {".".join(n.split(".")[:3]) for n in imports(path) if n.startswith("thyme.rollout.")}
            assert modules <= ROLLOUT_FOR_DATA, f"{path.relative_to(ROOT)}: {modules}"


def test_nothing_imports_tests_bench_or_the_name_kernels() -> None:
    for path in [*(p for _, p in sources()), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]:
        for name in imports(path):
            assert name.split(".")[0] != "kernels", f"{path}: import it as thyme.kernels"
            if "tests" not in path.parts and "bench" not in path.parts:
                assert name.split(".")[0] not in {"tests", "bench"}, f"{path}: {name}"


def test_configs_import_the_standard_library_only() -> None:
    paths = [p for _, p in sources() if p.name == "config.py" or p.name in {"options.py", "help.py", "limits.py"}]
    assert len(paths) >= 7
    for path in paths:
        for name in imports(path):
            top = name.split(".")[0]
            same_part = name.startswith(f"thyme.{path.parent.name}")
            light = name.startswith(("thyme.config", "thyme.options", "thyme.limits")) or ".config" in name
            assert top in sys.stdlib_module_names or same_part or light, f"{path.relative_to(ROOT)} imports {name}"


def test_the_rules_that_matter_most_hold_for_names_too() -> None:
    """Never data -> toy, train -> toy, engine -> rollout, sandbox or train, report -> torch."""
    forbidden = {
        "data": {"thyme.toy"},
        "train": {"thyme.toy"},
        "engine": {"thyme.rollout", "thyme.sandbox", "thyme.train"},
        "report": {"torch"},
    }
    for part, path in sources():
        for name in imports(path):
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in forbidden.get(part, ())), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


@pytest.mark.parametrize(
    "module",
    [
        "thyme",
        "thyme.cli",
        "thyme.config",
        "thyme.help",
        "thyme.sandbox",
        "thyme.repetition",
        "thyme.engine.tags",
        "thyme.verbs.recipe",
        "thyme.demo.verb",
    ],
)
def test_light_modules_leave_torch_alone(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_is_instant_in_imports() -> None:
    code = (
        "import sys\nfrom thyme.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def import_graph(folder: Path, package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package it imports, wherever in its text; what an __init__ imports is its face."""
    names = {}
    for path in folder.rglob("*.py"):
        if path.stem != "__init__":
            names[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = imports(path)
        graph[name] = {target for target in found if target in names}
    return graph


def test_imports_form_no_circle_those_for_types_and_inside_functions_included() -> None:
    graph = import_graph(ROOT / "thyme", "thyme") | import_graph(ROOT / "kernels", "thyme.kernels")
    assert len(graph) > 150
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "upper",
    [
        "from p.part.lower import Lower",
        "import p.part.lower",
        "from p.part import lower",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.part.lower import Lower",
        "def late():\n    from p.part import lower",
    ],
)
def test_a_circle_is_seen(tmp_path: Path, upper: str) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "upper.py").write_text(upper)
    (tmp_path / "part" / "lower.py").write_text("import json\nfrom p import upper")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path, "p")).prepare()
