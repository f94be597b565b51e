"""`make bench`: runs every bench_*.py, writes build/bench.json and prints one table.

Each row is one pytest-benchmark; `extra_info` may carry `figure` and `goal` (strings), `met` (bool) and any counted
quantity (GB/s, tok/s, fraction of the ceiling). Nothing fails on a time.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "bench.json"


def stamp() -> str:
    """Machine, versions and commit: what every figure below is to be read with."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers", "numpy"))
    return f"{cpu}; Python {platform.python_version()}, {packages}; commit {commit or 'unknown'}; `make bench`"


def table(results: list[dict]) -> list[str]:
    lines = []
    for group in dict.fromkeys(r["group"] or "" for r in results):
        lines.append(f"\n{group}")
        for r in (r for r in results if (r["group"] or "") == group):
            info = r["extra_info"]
            goal = f"  goal {info['goal']}: {'met' if info.get('met') else 'missed'}" if "goal" in info else ""
            rest = "  ".join(f"{k} {v}" for k, v in info.items() if k not in {"figure", "goal", "met"})
            figure = f"  {info['figure']}" if "figure" in info else ""
            median = r["stats"]["median"] * 1e3
            lines.append(
                f"  {r['name']:<58} {median:>10.3f} ms  n={r['stats']['rounds']}{figure}{goal}  {rest}".rstrip()
            )
    return lines


def main() -> int:
    OUT.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "bench", "-o", "python_files=bench_*.py", "-q", "--benchmark-only"]
    command += ["--benchmark-columns=median,rounds", f"--benchmark-json={OUT}", *sys.argv[1:]]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        return code
    print(stamp())
    print("\n".join(table(json.loads(OUT.read_text())["benchmarks"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
