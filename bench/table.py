"""`make bench`: runs every bench_*.py, writes build/bench.json and prints one table.

    python bench/table.py [pytest options]                            run and print
    python bench/table.py --print RESULTS.json... [--baseline OUT]    print what runs have written, and keep the figures

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
    ("warm ms", "warm_ms", "{:.4g}"),
    ("CPU ms", "cpu_ms", "{:.4g}"),
    ("GB/s", "gb_per_s", "{:.4g}"),
    ("TFLOP/s", "tflop_per_s", "{:.3g}"),
    ("peak MiB", "peak_mib", "{:.0f}"),
    ("graph", "replayed", "{!s}"),
    ("n", "rounds", "{}"),
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


def kernel_lines(rows: list[Row]) -> list[str]:
    infos = [row["extra_info"] for row in rows]
    columns = [column for column in COLUMNS if any(column[1] in info for info in infos)]
    floors = ", ".join(f"{term} {ms:.4g} ms" for term, ms in infos[0]["floor_ms"].items())
    lines = [f"  a perfect kernel: {floors}", "  " + "".join(f"{name:>10}" for name, _, _ in columns)]
    for info in infos:
        cells = (form.format(info[key]) if key in info else "" for _, key, form in columns)
        goal = f"; goal {info['goal']}: {'met' if info['met'] else 'missed'}" if "goal" in info else ""
        lines.append("  " + "".join(f"{cell:>10}" for cell in cells) + f"  {info['contender']}{goal}")
    lines += [f"  {'-':>10}  {name}: {reason}" for name, reason in infos[0]["absent"].items()]
    return lines


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


def baseline(results: list[Row], run: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping in the repository: a figure per contender, and what it was measured on."""
    kept: dict[str, Any] = {key: run["machine_info"][key] for key in ("device", "versions")} | {"commit": commit(run)}
    kept |= {"command": "make gpu", "groups": {}}
    keys = {key for _, key, _ in COLUMNS} | {"goal", "met"}
    for row in results:
        info = row["extra_info"]
        if "of_ceiling" in info:
            figures = {key: info[key] for key in info if key in keys}
            kept["ceilings"] = kept.get("ceilings", {}) | info["ceilings"]
            kept["groups"].setdefault(row["group"], {})[info["contender"]] = {
                key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()
            }
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", nargs="+", type=Path, metavar="RESULTS.json", help="print these, run nothing")
    parser.add_argument(
        "--baseline", type=Path, metavar="OUT", help="folder for <device>.json, the figures worth keeping"
    )
    options, pytest_options = parser.parse_known_args()
    if options.print is None:
        OUT.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pytest", "bench", "-o", "python_files=bench_*.py", "-q", "--benchmark-only"]
        command += ["--benchmark-columns=median,rounds", f"--benchmark-json={OUT}", *pytest_options]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    found = [json.loads(path.read_text()) for path in options.print or [OUT]]
    results = [row for one in found for row in one["benchmarks"]]
    results.sort(key=lambda row: "of_ceiling" not in row["extra_info"])
    print(stamp(found[0]))
    print("\n".join(table(results)))
    if options.baseline is not None:
        options.baseline.mkdir(parents=True, exist_ok=True)
        path = options.baseline / f"{found[0]['machine_info']['device'].replace(' ', '-')}.json"
        path.write_text(json.dumps(baseline(results, found[0]), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
