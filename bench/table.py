"""What `thyme bench` and `make bench` run: pytest on bench_*.py, its results in build/bench.json, one table of them.

    python bench/table.py [pytest options and files]                  run and print
    python bench/table.py --print RESULTS.json...                     print what runs have written
           [--against KEPT.json] [--baseline OUT.json]                beside what is kept; keep the figures

Each row is one pytest-benchmark. Kernels come first, a group a shape, the fraction of the ceiling in the first
column; other rows say in `extra_info` what they measured: `figure` and `goal` (strings), `met` (bool) and any counted
quantity. Nothing fails on a time.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "bench.json"
Row = dict[str, Any]

# Title, entry of extra_info, format.
COLUMNS = (
    ("ceiling", "of_ceiling", "{:.0%}"),
    ("ms", "ms", "{:.4g}"),
    ("p20", "p20_ms", "{:.4g}"),
    ("p80", "p80_ms", "{:.4g}"),
    ("warm ms", "warm_ms", "{:.4g}"),
    ("CPU ms", "cpu_ms", "{:.4g}"),
    ("GB/s", "gb_per_s", "{:.4g}"),
    ("TFLOP/s", "tflop_per_s", "{:.3g}"),
    ("peak MiB", "peak_mib", "{:.0f}"),
    ("graph", "replayed", "{!s}"),
    ("n", "rounds", "{}"),
    ("vs kept", "vs_kept", "{:.2f}x"),
)


def stamp(run: dict[str, Any]) -> str:
    """Machine, versions and commit: what every figure below is to be read with."""
    machine = run["machine_info"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']} ({machine['cpu'].get('brand_raw', 'unknown')}); {packages}; commit {commit(run)}"


def commit(run: dict[str, Any]) -> str:
    found = run["commit_info"]
    return found["id"][:12] + "-dirty" * bool(found["dirty"])


def table(results: list[Row]) -> list[str]:
    lines = []
    for group in dict.fromkeys(row["group"] or "" for row in results):
        rows = [row for row in results if (row["group"] or "") == group]
        lines.append(f"\n{group}")
        lines += kernel_lines(rows) if is_kernel(rows[0]) else other_lines(rows)
    return lines


def is_kernel(row: Row) -> bool:
    """Whether a row is one of `harness.Measured`; others may have a ceiling of their own."""
    return "floor_ms" in row["extra_info"]


def ceilings(results: list[Row]) -> list[str]:
    """What the machine can do, measured in the same process: what all fractions are of."""
    found: dict[str, float] = {}
    for row in results:
        found |= row["extra_info"].get("ceilings", {})
    named = {"copy_gb_per_s": "copy {:.4g} GB/s", "matmul_tflop_per_s": "matmul {:.4g} TFLOP/s"}
    shown = ", ".join(named[name].format(value) for name, value in found.items() if name in named)
    return [f"ceilings: {shown}"] if shown else []


def kernel_lines(rows: list[Row]) -> list[str]:
    infos = [row["extra_info"] for row in rows]
    columns = [column for column in COLUMNS if any(column[1] in info for info in infos)]
    lines = [f"  a perfect kernel: {terms(infos[0]['floor_ms'])}"]
    if model := infos[0].get("model_ms"):
        lines.append(f"  the models predict {max(model.values()):.4g} ms: {terms(model)}")
    lines.append("  " + "".join(f"{name:>10}" for name, _, _ in columns))
    for info in infos:
        cells = (form.format(info[key]) if key in info else "" for _, key, form in columns)
        goal = f"; goal {info['goal']}: {'met' if info['met'] else 'missed'}" if "goal" in info else ""
        named = f"{info['contender']} {info.get('version', '')}".strip()
        lines.append("  " + "".join(f"{cell:>10}" for cell in cells) + f"  {named}{goal}")
    lines += [f"  {'-':>10}  {name}: {reason}" for name, reason in infos[0]["absent"].items()]
    return lines


def terms(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{term} {ms:.4g} ms" for term, ms in milliseconds.items())


def other_lines(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        info = row["extra_info"]
        goal = f"  goal {info['goal']}: {'met' if info.get('met') else 'missed'}" if "goal" in info else ""
        rest = "  ".join(f"{key} {value}" for key, value in info.items() if key not in {"figure", "goal", "met"})
        figure = f"  {info['figure']}" if "figure" in info else ""
        median = row["stats"]["median"] * 1e3
        lines.append(
            f"  {row['name']:<58} {median:>10.3f} ms  n={row['stats']['rounds']}{figure}{goal}  {rest}".rstrip()
        )
    return lines


# What is kept of a run, by its place in the JSON of pytest-benchmark.
KEPT = {
    "machine_info": ("device", "versions", "machine", "system", "gpu"),
    "cpu": ("brand_raw", "count", "arch"),
    "commit_info": ("id", "time", "dirty"),
    "benchmarks": ("group", "name", "fullname", "params", "param", "extra_info", "options"),
    "stats": (
        *("min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iqr_outliers", "stddev_outliers"),
        *("outliers", "ld15iqr", "hd15iqr", "ops", "total", "iterations"),
    ),
}


def _kept(place: str, found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in KEPT[place] if key in found}


def machine(found: dict[str, Any]) -> dict[str, Any]:
    """What figures are read with of a machine, without what only tells two of a kind apart."""
    return _kept("machine_info", found) | {"cpu": _kept("cpu", found.get("cpu", {}))}


def baseline(found: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """What is worth keeping in the repository of runs on one machine, in the form of pytest-benchmark, whose
    --benchmark-compare reads it: without single times, flags of the CPU and paths."""
    first = found[0]
    rows = [row for one in found for row in one["benchmarks"]]
    return {
        "command": command,
        "machine_info": machine(first["machine_info"]),
        "commit_info": _kept("commit_info", first["commit_info"]),
        "benchmarks": [_rounded(_kept("benchmarks", row) | {"stats": _kept("stats", row["stats"])}) for row in rows],
    } | {key: first[key] for key in ("datetime", "version") if key in first}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def compared(results: list[Row], kept: dict[str, Any]) -> int:
    """Puts beside each figure how it stands to the one that is kept of the same contender and group: on a CPU by the
    time of its cores, which other processes disturb less, else by device time.

    Returns:
        How many figures have one that is kept.
    """
    before = {(row["group"], row["name"]): row["extra_info"] for row in kept["benchmarks"]}
    found = 0
    for row in results:
        info, then = row["extra_info"], before.get((row["group"], row["name"]), {})
        for figure in ("cpu_ms", "ms"):
            if info.get(figure) and then.get(figure):
                info["vs_kept"] = info[figure] / then[figure]
                found += 1
                break
    return found


def differences(now: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """What two runs do not share of machine and versions, a line each: across them a ratio says little."""
    places = [("device", "device"), ("processor", "cpu", "brand_raw"), ("processors", "cpu", "count")]
    packages = now["machine_info"]["versions"] | kept["machine_info"]["versions"]
    places += [(package, "versions", package) for package in packages]
    lines = []
    for name, *keys in places:
        here, there = now["machine_info"], kept["machine_info"]
        for key in keys:
            here, there = (found.get(key, {}) for found in (here, there))
        if here != there:
            lines.append(f"{name}: {here or 'none'} here, {there or 'none'} there")
    return lines


def comparison(run: dict[str, Any], results: list[Row], path: Path) -> dict[str, Any]:
    """Fills the column of ratios; says what they are to be read with."""
    kept = json.loads(path.read_text())
    shared = compared(results, kept)
    return {"with": str(path), "is": stamp(kept), "shared": shared, "differences": differences(run, kept)}


def comparison_lines(found: dict[str, Any], rows: int) -> list[str]:
    lines = [f"compared with {found['with']}: {found['is']}", f"{found['shared']} of {rows} figures are kept there"]
    if found["differences"]:
        lines.append("not the same machine or versions, so a ratio is not of the code alone:")
        lines += [f"  {line}" for line in found["differences"]]
    return lines


def measured(pytest_options: list[str]) -> int:
    """Runs the benchmarks in a process of their own, and returns its exit code; what is measured by the time of a
    Ctrl-C or SIGTERM is written."""
    OUT.parent.mkdir(exist_ok=True)
    OUT.unlink(missing_ok=True)
    run = [sys.executable, "-m", "pytest", *pytest_options, "-q", "--benchmark-only"]
    run += [f"--benchmark-json={OUT}"]
    if not any(word.startswith("--benchmark") for word in pytest_options):
        run.append("--benchmark-quiet")  # one table is enough, the one below
    # In a session of its own: a terminal's Ctrl-C and a parent's SIGTERM reach it once, by this process.
    child: subprocess.Popen[bytes] | None = None
    told: list[int] = []

    def tell(number: int, frame: object) -> None:
        told.append(number)
        if len(told) == 1 and child is not None:
            child.terminate()  # quietly where pytest is still being imported; then bench/conftest.py hears it

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with subprocess.Popen(run, cwd=ROOT, start_new_session=True) as child:
            if told:
                child.terminate()
            return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULTS.json", help="print these, run nothing")
    parser.add_argument("--baseline", type=Path, metavar="OUT.json", help="keep the figures, for --benchmark-compare")
    parser.add_argument("--against", type=Path, metavar="KEPT.json", help="a column with the ratio to these")
    parser.add_argument("--results", type=Path, metavar="OUT.json", help="write all of it, the comparison too")
    options, pytest_options = parser.parse_known_args()
    if not any(word == "bench" or word.startswith("bench/") for word in pytest_options):
        pytest_options = ["bench", *pytest_options]
    code = 0 if options.print is not None else measured(pytest_options)
    if options.print is None and not OUT.is_file():  # nothing was run
        return code
    found = [json.loads(path.read_text()) for path in options.print or [OUT]]
    results = [row for one in found for row in one["benchmarks"]]
    results.sort(key=lambda row: not is_kernel(row))
    against = None if options.against is None else comparison(found[0], results, options.against)
    lines = [] if against is None else comparison_lines(against, len(results))
    print(stamp(found[0]), *lines, *ceilings(results), *table(results), sep="\n")
    kept = baseline(found, shlex.join(["pytest", *pytest_options]))
    if options.results is not None:
        options.results.write_text(json.dumps(kept if against is None else kept | {"compared": against}) + "\n")
    if options.baseline is not None:
        for row in kept["benchmarks"]:
            row["extra_info"].pop("vs_kept", None)  # of this comparison, not of this run
        options.baseline.parent.mkdir(parents=True, exist_ok=True)
        options.baseline.write_text(json.dumps(kept, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
