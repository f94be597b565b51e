"""Compile every Triton configuration we ship for a GPU that is not there, and refuse what would be slow on it.

    python bench/gate.py [--targets sm_90,sm_80,sm_100,sm_120] [--rare]

bench/shipped/<module>.py lists what is shipped of each file of kernels/: at most six configurations an op that the
7B model runs, and as rare what remains, such as float32 or other heads. For each configuration: no stack (a spilled
register shows as stack), shared memory within the chip's limit, every bulk copy as large as what it fills, and the
instructions that make it fast are in the PTX.
Prints one line each: op, kernel, registers, shared memory, tile. Exits with 1 when something fails. Results are kept
under .cache/gate by source, so that only what changed is compiled.
"""

import argparse
import ast
import hashlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sass

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {
    80: 166_912,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # bytes of dynamic shared memory one program may use


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
    spot: bool = False
    """Also compiled for the other targets."""
    rare: bool = False
    """Compiled only where --rare asks for it."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16 at run time; pointers are, but for those of vectors."""


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
    instructions: tuple[str, ...] = (),
    elements: int = 0,
    spot: bool = False,
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
        spot=spot,
        rare=rare,
        aligned=frozenset(aligned.split()),
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


def compiled(configuration: Configuration, capability: int) -> dict[str, Any]:
    """`inspected` of what is built."""
    return inspected(built(configuration, capability), configuration, capability)


def inspected(out: Any, configuration: Configuration, capability: int) -> dict[str, Any]:
    """Registers, threads, stack and shared memory in bytes, waits for copies, and the PTX instructions that were asked
    for but are not there."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    missing = [
        wanted for wanted in configuration.instructions if capability == 90 and not re.search(wanted, out.asm["ptx"])
    ]
    (threads,) = re.findall(r"\.reqntid (\d+)", out.asm["ptx"])
    return {
        "registers": use["REG"],
        "threads": int(threads),
        "stack": use["STACK"],
        "shared": out.metadata.shared,
        "waits": sass.waits(out.asm["ttgir"]),
        "missing": missing,
        "misfits": misfits(out.asm["ttgir"]),
    }


def is_aligned(configuration: Configuration, kernel: Any, name: str) -> bool:
    """Whether an argument is compiled as a multiple of 16: a pointer is, unless its kernel is told not to ask."""
    (parameter,) = (one for one in kernel.params if one.name == name)
    pointer = configuration.types.get(name, "").startswith("*") and not parameter.do_not_specialize_on_alignment
    return pointer or name in configuration.aligned


def misfits(ttgir: str) -> list[str]:
    """Bulk copies whose box, what the hardware will bring, is not the shape of the shared memory that they fill.

    Descriptors made in the kernel show their box where they are created; those of the host have the one in their type.
    """
    constant = r"(%[\w-]+) = arith\.constant (?:\{[^}]*\} )?(\d+) : i32"
    constants = {name: int(value) for name, value in re.findall(constant, ttgir)}
    found = []

    def compare(what: str, box: str, shape: str, bits: int = 0) -> None:
        *rows, width = map(int, shape.removeprefix("1x").split("x"))
        in_parts = "x".join(map(str, (*rows, 1024 // bits))) if bits and width % (1024 // bits) == 0 else shape
        if box.removeprefix("1x") not in (shape.removeprefix("1x"), in_parts):  # wide rows come 128 bytes at a time
            found.append(f"{what} of {box} into {shape}")

    boxes = {}
    for name, box in re.findall(r"ttng\.tensormap_create (%\w+), %\w+, \[([^\]]*)\]", ttgir):
        boxes[name] = "x".join(str(constants[size]) for size in reversed(box.split(", ")))  # the fastest comes first
    described = r"ttng\.reinterpret_tensor_descriptor (%\w+) .*?tensordesc<(?:tensor<)?((?:\d+x)+)[a-z]+(\d+)"
    for name, shape, bits in re.findall(described, ttgir):
        compare(f"descriptor {name}", boxes[name], shape[:-1], int(bits))
    for line in ttgir.splitlines():
        if "ttng.async_tma_copy_global_to_local" in line:
            (box,) = re.findall(r"tensordesc<(?:tensor<)?((?:\d+x)+)", line)
            compare("copy", box[:-1], re.findall(r"memdesc<((?:\d+x)+)", line)[-1][:-1])
    return found


def failures(result: dict[str, Any], capability: int) -> list[str]:
    found = [f"{result['stack']} bytes of stack: registers spill"] if result["stack"] else []
    if result["shared"] > SHARED_LIMIT[capability]:
        found.append(f"{result['shared']} bytes of shared memory, {SHARED_LIMIT[capability]} there are")
    found += [f"bulk {misfit}" for misfit in result["misfits"]]
    return found + [f"no {wanted} in the PTX" for wanted in result["missing"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--targets", default="sm_90", help="comma-separated; all but sm_90 compile one configuration an op or two"
    )
    parser.add_argument("--rare", action="store_true", help="also what the 7B model does not run")
    parser.add_argument("--no-cache", action="store_true", help="compile everything")
    options = parser.parse_args()
    capabilities = [int(target.removeprefix("sm_")) for target in options.targets.split(",")]
    if unknown := set(capabilities) - set(SHARED_LIMIT):
        parser.error(f"--targets: sm_{min(unknown)} is not one of {', '.join(f'sm_{known}' for known in SHARED_LIMIT)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")

    import triton

    read = [*sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "bench/shipped").glob("*.py"))]
    read += [ROOT / "bench/gate.py", ROOT / "bench/sass.py"]
    sources = b"".join(path.read_bytes() for path in read)
    digest = hashlib.sha256(sources + triton.__version__.encode()).hexdigest()[:16]
    cache = ROOT / ".cache/gate" / f"{digest}.json"
    results = json.loads(cache.read_text()) if cache.exists() and not options.no_cache else {}

    failed = 0
    print(f"{'op':17}{'kernel':18}{'target':8}{'regs':>5}{'shared':>8}  configuration")
    for capability in capabilities:
        for configuration in configurations():
            if (capability != 90 and not configuration.spot) or (configuration.rare and not options.rare):
                continue
            key = f"{configuration.module}.{configuration.kernel} ({configuration.what}) sm_{capability}"
            result = results[key] = results.get(key) or compiled(configuration, capability)
            print(
                f"{configuration.op:17}{configuration.kernel:18}sm_{capability:<5}{result['registers']:>5}"
                f"{result['shared']:>8}  {configuration.what}; {_tile(configuration)}"
            )
            for failure in failures(result, capability):
                failed += 1
                print(f"  FAILED: {failure}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    for stale in cache.parent.glob("*.json"):
        stale.unlink()
    cache.write_text(json.dumps(results, indent=1))
    print(f"gate: {failed} failures" if failed else "gate: all within limits, no spills")
    return 1 if failed else 0


def _tile(configuration: Configuration) -> str:
    shown = configuration.constants | configuration.options
    names = ("ROWS", "BLOCK", "QUERIES", "KEYS", "num_warps", "num_stages")
    return " ".join(f"{name.lower()} {shown[name]}" for name in names if name in shown)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
