"""`make bench`: runs every bench_*.py, writes build/bench.json and prints one table.

    python bench/table.py [pytest options]                            run and print
    python bench/table.py --print RESULTS.json...                     print what runs have written
           [--against KEPT.json] [--baseline OUT.json]                beside what is kept; keep the figures

Each row is one pytest-benchmark. Kernels come first, a group a shape, the fraction of the ceiling in the first
column; other rows say in `extra_info` what they measured: `figure` and `goal` (strings), `met` (bool) and any counted
quantity. Nothing fails on a time.
"""

import argparse
import json
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
        lines += kernel_lines(rows) if "of_ceiling" in rows[0]["extra_info"] else other_lines(rows)
    return lines


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


def compared(results: list[Row], kept: dict[str, Any]) -> None:
    """Puts beside each figure how it stands to the one that is kept of the same contender and group: on a CPU by the
    time of its cores, which other processes disturb less, else by device time."""
    before = {(row["group"], row["name"]): row["extra_info"] for row in kept["benchmarks"]}
    for row in results:
        info, then = row["extra_info"], before.get((row["group"], row["name"]), {})
        for figure in ("cpu_ms", "ms"):
            if info.get(figure) and then.get(figure):
                info["vs_kept"] = info[figure] / then[figure]
                break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULTS.json", help="print these, run nothing")
    parser.add_argument("--baseline", type=Path, metavar="OUT.json", help="keep the figures, for --benchmark-compare")
    parser.add_argument("--against", type=Path, metavar="KEPT.json", help="a column with the ratio to these")
    options, pytest_options = parser.parse_known_args()
    command = ["pytest", "bench", *pytest_options]
    if options.print is None:
        OUT.parent.mkdir(exist_ok=True)
        run = [sys.executable, "-m", *command, "-q", "--benchmark-only"]
        run += ["--benchmark-columns=median,rounds", f"--benchmark-json={OUT}"]
        code = subprocess.run(run, cwd=ROOT, check=False).returncode
        if code:
            return code
    found = [json.loads(path.read_text()) for path in options.print or [OUT]]
    results = [row for one in found for row in one["benchmarks"]]
    results.sort(key=lambda row: "of_ceiling" not in row["extra_info"])
    if options.against is not None:
        compared(results, json.loads(options.against.read_text()))
    print(stamp(found[0]), *ceilings(results), *table(results), sep="\n")
    if options.baseline is not None:
        options.baseline.parent.mkdir(parents=True, exist_ok=True)
        options.baseline.write_text(json.dumps(baseline(found, " ".join(command)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
