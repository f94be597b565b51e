"""What bench/shipped lists: the configurations in which kernels are launched, and Triton's compiler for one of them."""

import ast
import importlib
import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One compiled kernel: the types of its runtime arguments; every other argument is a constant."""

    module: str
    """The file of kernels/ without .py."""
    op: str
    kernel: str
    """Name of the jit function in the module."""
    what: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    instructions: tuple[str, ...] = ()
    """Regular expressions that the PTX for sm_90 must hold."""
    elements: int = 0
    """How many a thread handles on one way through the region that sass.py counts; 0: not said."""
    budget: float = 0
    """Instructions that the longest way may take an element; 0: no limit of its own."""
    excused: tuple[str, ...] = ()
    """Rules of `over` that it may break."""
    work: model.Work = field(default_factory=model.Work)
    """At the shape that its times are printed for."""
    spot: bool = False
    """Also compiled for the other targets."""
    since: int = 80
    """The first of them that has what it takes."""
    rare: bool = False
    """Compiled only where --rare asks for it."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16 at run time; pointers are, but for those of vectors."""
    unaligned: frozenset[str] = field(default_factory=frozenset)
    """Pointers that are not."""


def configurations() -> list[Configuration]:
    """What bench/shipped/<module>.py lists for each module."""
    found = []
    for path in sorted((ROOT / "bench/shipped").glob("*.py")):
        module = importlib.import_module(f"thyme.kernels.{path.stem}")
        for entry in runpy.run_path(str(path))["configurations"]():
            configuration = _configuration(path.stem, **entry)
            assert hasattr(module, configuration.kernel), configuration
            found.append(configuration)
    return found


def launched(module: str) -> set[str]:
    """The jit functions that kernels/<module>.py launches itself, `kernel[grid]`; others are called by those."""
    source = (ROOT / f"kernels/{module}.py").read_text()
    indexed = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript)]
    names = {value.id for value in indexed if isinstance(value, ast.Name)}
    return names & set(re.findall(r"^@triton\.jit.*\n(?:#.*\n)*def (\w+)", source, re.MULTILINE))


def _configuration(
    module: str,
    *,
    kernel: str,
    what: str,
    types: str,
    constants: dict[str, Any],
    options: dict[str, int],
    op: str | None = None,
    aligned: str = "",
    unaligned: str = "",
    instructions: tuple[str, ...] = (),
    elements: int = 0,
    budget: float = 0,
    excused: tuple[str, ...] = (),
    work: dict[str, Any] | None = None,
    spot: bool = False,
    since: int = 80,
    rare: bool = False,
) -> Configuration:
    """`options` is what the op's launch configuration says: warps and stages, and tile sizes, which are constants."""
    return Configuration(
        module=module,
        op=op or module,
        kernel=kernel,
        what=what,
        types=dict(pair.split(":") for pair in types.split()),
        constants=constants | {name: value for name, value in options.items() if not name.startswith("num_")},
        options={name: value for name, value in options.items() if name.startswith("num_")},
        instructions=instructions,
        elements=elements,
        budget=budget,
        excused=excused,
        work=model.Work(**work or {}),
        spot=spot,
        since=since,
        rare=rare,
        aligned=frozenset(aligned.split()),
        unaligned=frozenset(unaligned.split()),
    )


def built(configuration: Configuration, capability: int) -> Any:
    """What triton.compile returns for it, its `asm` by kind: ttgir, ptx, cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import thyme.kernels  # noqa: F401  the package must exist before its modules are asked for

    kernel = getattr(sys.modules[f"thyme.kernels.{configuration.module}"], configuration.kernel)
    types = configuration.types
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    unknown = (set(types) | set(configuration.constants)) ^ set(kernel.arg_names)
    assert not unknown, f"{configuration.module}.{configuration.kernel}: arguments {sorted(unknown)}"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if is_aligned(configuration, kernel, name)
    }
    source = ASTSource(kernel, signature, configuration.constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=configuration.options)


def is_aligned(configuration: Configuration, kernel: Any, name: str) -> bool:
    """Whether an argument is compiled as a multiple of 16: a pointer is, unless its kernel is told not to ask."""
    (parameter,) = (one for one in kernel.params if one.name == name)
    pointer = configuration.types.get(name, "").startswith("*") and not parameter.do_not_specialize_on_alignment
    return (pointer and name not in configuration.unaligned) or name in configuration.aligned
