"""Compile every Triton configuration we ship for a GPU that is not there, and refuse what would be slow on it.

    python bench/gate.py [--targets sm_90,sm_80,sm_100,sm_120] [--module sample_blocks] [--rare] [--update]

bench/shipped/<module>.py lists what is shipped of each file of kernels/: the configurations that the 7B model launches
in bfloat16, and as rare what remains, such as float32 or other heads. For each configuration: no stack (a spilled
register shows as stack), shared memory within the chip's limit, every bulk copy as large as what it fills, and the
instructions that make it fast are in the PTX. For sm_90 its machine code is counted (sass.py) and must keep to the
configuration's budget of instructions an element, repair no denormals around exponentials, load no row in pieces of 16
or 8 bits and have copies in flight where it has stages for them; and it may not be worse than the row that is kept of
it in bench/gate/<Triton version>, which --update writes anew.
Prints a table a module, with the times that the figures come to at a shape of the 7B model. Exits with 1 when something
fails. Results are kept under .cache/gate by source, so that only what changed is compiled.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import counted
import sass
from configurations import ROOT, Configuration, built, configurations

SHARED_LIMIT = {
    80: 166_912,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # bytes of dynamic shared memory one program may use


def compiled(configuration: Configuration, capability: int) -> dict[str, Any]:
    """`inspected` of what is built, and for sm_90 the counts of its machine code."""
    out = built(configuration, capability)
    result = inspected(out, configuration, capability)
    if capability == 90:
        result["counts"] = asdict(sass.count(sass.disassembled(out.asm["cubin"])))
    return result


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
        "moved_twice": moved_twice(out.asm["ttgir"]),
    }


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


def moved_twice(ttgir: str) -> list[str]:
    """Indices of the second consumer of specialized warps that are moved on to its half of a tile two times.

    Triton cuts a range in halves, and moves the number on at which a descriptor reads the tile, wherever that number is
    used. Where a range is added to that very number, both happen: the half's results go to the next tile's rows.
    """
    found = []
    for partition in re.split(r"\n\s+partition\d+", ttgir)[1:]:
        constants = dict(re.findall(r"(%[\w-]+) = arith\.constant (?:\{[^}]*\} )?(\d+) : i32", partition))
        halves = dict(re.findall(r"(%\w+) = tt\.make_range \{[^}]*start = ([1-9]\d*) : i32\}", partition))
        sums = re.findall(r"(%\w+) = arith\.addi (%\w+), (%[\w-]+)", partition)
        moved = {name: constants.get(by) for name, _, by in sums}
        spread = dict(re.findall(r"(%\w+) = tt\.splat (%\w+)", partition))
        for name, *terms in sums:
            for number, half in (terms, terms[::-1]):
                if half in halves and moved.get(spread.get(number, "")) == halves[half]:
                    found.append(
                        f"{name}: a range from {halves[half]} on, added to a number that was moved on by as much"
                    )
    return found


def failures(result: dict[str, Any], capability: int) -> list[str]:
    """What must hold on every target."""
    found = [f"{result['stack']} bytes of stack: registers spill"] if result["stack"] else []
    if result["shared"] > SHARED_LIMIT[capability]:
        found.append(f"{result['shared']} bytes of shared memory, {SHARED_LIMIT[capability]} there are")
    found += [f"bulk {misfit}" for misfit in result["misfits"]] + result["moved_twice"]
    return found + [f"no {wanted} in the PTX" for wanted in result["missing"]]


def row_of(configuration: Configuration, result: dict[str, Any]) -> counted.Row:
    counts, elements = result["counts"], configuration.elements or 1
    return counted.Row(
        op=configuration.op,
        kernel=configuration.kernel,
        what=configuration.what,
        registers=result["registers"],
        shared=result["shared"],
        programs=sass.programs_an_sm(result["registers"], result["threads"], result["shared"]),
        waits=",".join(map(str, result["waits"])) or "-",
        least=round(counts["least"] / elements, 1),
        most=round(counts["most"] / elements, 1),
        exps=round(counts["exps"] / elements, 1),
        **{name: counts[name] for name in ("denormal", "narrow", "votes", "shuffles", "barriers")},
    )


def over(configuration: Configuration, row: counted.Row) -> dict[str, str]:
    """What a kernel may not do on sm_90, by rule: those with a budget are bound by what they issue, or would be."""
    sixteen_bit = any(kind in ("*bf16", "*fp16") for kind in configuration.types.values())
    stages, budget = configuration.options.get("num_stages", 0), configuration.budget
    rules = {
        "budget": (row.most > budget, f"{row.most:.1f} instructions an element, {budget:g} are its budget"),
        "denormal": (row.denormal > 0, f"{row.denormal} exponentials repair denormals, exp2 needs not"),
        "narrow": (sixteen_bit and row.narrow > 0, f"{row.narrow} loads of 16 or 8 bits where a row is read"),
    }
    rules = rules if budget else {}
    rules["waits"] = (stages > 2 and counted.least_wait(row.waits) < 1, f"{row.waits} in flight, of {stages} stages")
    return {rule: text for rule, (broken, text) in rules.items() if broken}


def against_kept(version: str, module: str, rows: list[counted.Row]) -> list[str]:
    """What is worse than the rows that are kept, and rows of one side alone; nothing for a version that has none."""
    kept = counted.kept(version, module)
    if not kept and not counted.path(version, module).parent.exists():
        return []
    found = [f"{', '.join(row.key)}: {text}" for row in rows for text in counted.worse(row, kept.get(row.key, row))]
    for key in {row.key for row in rows} ^ set(kept):
        state = "kept, but not shipped" if key in kept else "shipped, but not kept"
        found.append(f"{', '.join(key)}: {state}; run gate.py --update")
    return found


def better(version: str, module: str, rows: list[counted.Row]) -> list[str]:
    """A line for each row that is better than what is kept, so that it will be."""
    kept = counted.kept(version, module)
    ahead = [row for row in rows if row.key in kept and any(counted.worse(kept[row.key], row))]
    return [f"  better than is kept: {', '.join(row.key)}; run gate.py --update\n" for row in ahead]


def main() -> int:
    options = _options()
    capabilities = [int(target.removeprefix("sm_")) for target in options.targets.split(",")]
    import triton

    results = _Results(triton.__version__, options.no_cache)
    failed = []
    for capability in capabilities:
        chosen = [
            one
            for one in configurations()
            if (capability == 90 or (one.spot and capability >= one.since))
            and (options.rare or not one.rare)
            and options.module in ("", one.module)
        ]
        for module in dict.fromkeys(one.module for one in chosen):
            own = [one for one in chosen if one.module == module]
            failed += _module(capability, module, own, results, options, triton.__version__)
    results.save()
    print(f"gate: {len(failed)} failures" if failed else "gate: all within limits, no spills")
    return 1 if failed else 0


def _module(
    capability: int,
    module: str,
    configurations: list[Configuration],
    results: "_Results",
    options: argparse.Namespace,
    version: str,
) -> list[str]:
    """Prints the table of a module and what is wrong with it; returns the latter."""
    failed, lines, rows = [], [], []
    print(f"\n{module}, sm_{capability}")
    for configuration in configurations:
        result = results.of(configuration, capability)
        wrong = failures(result, capability)
        if capability == 90:
            row = row_of(configuration, result)
            broken = over(configuration, row)
            wrong += [text for rule, text in broken.items() if rule not in configuration.excused]
            excused = [rule for rule in broken if rule in configuration.excused]
            limits = f"budget {configuration.budget:g}" * (configuration.budget > 0), "excused: " + " ".join(excused)
            lines.append(counted.line(row, configuration.work, "; ".join(limits[: 1 + bool(excused)]).strip("; ")))
            rows.append(row)
        else:
            name = f"{configuration.op:17}{configuration.kernel:18}{configuration.what:53}"
            lines.append(f"{name}{result['registers']:>5}{result['shared']:>7}")
        failed += [f"{configuration.op}, {configuration.kernel}, {configuration.what}: {text}" for text in wrong]
    print(counted.header(), *lines, sep="\n")
    if capability == 90 and not options.rare:
        if options.update:
            counted.keep(version, module, lines)
        failed += against_kept(version, module, rows)
        print(*better(version, module, rows), sep="", end="")
    print(*(f"  FAILED: {text}\n" for text in failed), sep="", end="")
    return failed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--targets", default="sm_90", help="comma-separated; all but sm_90 compile one configuration an op or two"
    )
    parser.add_argument("--module", default="", help="only this file of kernels/")
    parser.add_argument("--rare", action="store_true", help="also what the 7B model does not run")
    parser.add_argument("--no-cache", action="store_true", help="compile everything")
    parser.add_argument("--update", action="store_true", help="keep the rows of sm_90 in bench/gate, better or worse")
    options = parser.parse_args()
    unknown = {target for target in options.targets.split(",")} - {f"sm_{known}" for known in SHARED_LIMIT}
    if unknown:
        known = ", ".join(f"sm_{one}" for one in SHARED_LIMIT)
        parser.error(f"--targets: {min(unknown)} is not one of {known}")
    if options.module and not (ROOT / f"bench/shipped/{options.module}.py").exists():
        parser.error(f"--module: there is no bench/shipped/{options.module}.py")
    if options.update and options.rare:
        parser.error("--update keeps what the 7B model runs: leave out --rare")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    return options


class _Results:
    """What was compiled, kept by source: what did not change is not compiled again."""

    def __init__(self, version: str, forget: bool) -> None:
        read = [*sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "bench/shipped").glob("*.py"))]
        read += [ROOT / f"bench/{name}.py" for name in ("configurations", "gate", "sass")]
        sources = b"".join(path.read_bytes() for path in read)
        digest = hashlib.sha256(sources + version.encode()).hexdigest()[:16]
        self.path = ROOT / ".cache/gate" / f"{digest}.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() and not forget else {}

    def of(self, configuration: Configuration, capability: int) -> dict[str, Any]:
        named = f"{configuration.op} {configuration.module}.{configuration.kernel}"
        key = f"{named} ({configuration.what}) sm_{capability}"
        if key not in self.found:
            self.found[key] = compiled(configuration, capability)
        return self.found[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.path.parent.glob("*.json"):
            stale.unlink()
        self.path.write_text(json.dumps(self.found, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
