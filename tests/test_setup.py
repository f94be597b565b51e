"""Set-up keeps a torch that is there, and installs the CPU build where none is: what the Makefile asks pip for, with a
stand-in for Python, and what pip makes of it, resolved without installing."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What it can import are the names in its folder; what pip is asked for it writes down.
STAND_IN = """#!/usr/bin/env bash
installed=$STATE/installed
[[ $0 != .venv/* ]] || installed=$STATE/venv
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"find_spec('torch')"*) [[ -e $installed/torch ]] ;;
    "-c import "*) [[ -e $installed/${2#import } ]] ;;
    "-m pip install "*)
        echo "$*" >> "$STATE/pip"
        case "$*" in
            *torch==*) touch "$installed/torch" ${BROUGHT_BY_TORCH:+"$installed/$BROUGHT_BY_TORCH"} ;;
            *triton==*) touch "$installed/triton" ;;
        esac ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


def set_up(folder: Path, brought_by_torch: str) -> list[str]:
    """Runs `make setup` in `folder` and returns what pip was asked for in this run."""
    state = folder / "state"
    (state / "pip").write_text("")
    environment = {**os.environ, "STATE": str(state), "BROUGHT_BY_TORCH": brought_by_torch}
    command = ["make", "--no-print-directory", "setup", f"PYTHON={folder / 'python'}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "unexpected" not in done.stderr, done
    return [line.split("--disable-pip-version-check ")[1] for line in (state / "pip").read_text().splitlines()]


PROJECT = "-c constraints.txt -e .[dev,demo]"
READER = "-c constraints.txt --no-deps rapidocr-onnxruntime; python_version < '3.13'"


@pytest.mark.parametrize(
    ("installed", "brought_by_torch", "asked"),
    [
        (["torch", "triton"], "", [PROJECT, READER]),
        (["torch"], "", ["triton==3.6.0", PROJECT, READER]),
        (["triton"], "triton", ["torch==2.13.0", PROJECT, READER]),
        ([], "triton", ["torch==2.13.0", PROJECT, READER]),
        ([], "", ["torch==2.13.0", "triton==3.6.0", PROJECT, READER]),
    ],
    ids=[
        "torch with its triton",
        "torch alone",
        "triton alone",
        "nothing, a CUDA build comes",
        "nothing, a CPU build comes",
    ],
)
def test_set_up_asks_for_what_is_missing(
    installed: list[str], brought_by_torch: str, asked: list[str], tmp_path: Path
) -> None:
    for name in ("Makefile", "CMakeLists.txt", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("installed", "venv"):
        (tmp_path / "state" / folder).mkdir(parents=True)
    for name in installed:
        (tmp_path / "state" / "installed" / name).touch()
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    assert set_up(tmp_path, brought_by_torch) == asked
    assert (tmp_path / ".venv").exists() != ("torch" in installed), "an environment of its own only without a torch"
    assert set_up(tmp_path, brought_by_torch) == [], "nothing to do the second time"
    os.utime(tmp_path / "setup.py", (2e9, 2e9))
    assert set_up(tmp_path, brought_by_torch) == [PROJECT, READER], "a source has changed"


def test_constraints_pin_neither_torch_nor_triton() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "numpy" in pinned and not pinned & {"torch", "triton"}


def fake_distribution(site: Path, name: str, version: str) -> None:
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(f'__version__ = "{version}"\n')
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")


def make_plan(python: str) -> str:
    command = ["make", "--no-print-directory", "-n", "-W", "setup.py", "setup", f"PYTHON={python}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def resolve(python: str, *requirements: str) -> dict[str, str]:
    command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-", *requirements]
    if python != sys.executable:
        command.remove("--ignore-installed")
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}


@pytest.mark.soak
def test_an_installed_cuda_torch_is_kept(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    fake_distribution(site, "torch", "2.11.0+cu130")
    fake_distribution(site, "triton", "3.6.0")
    plan = make_plan(python)
    assert f"{python} -m pip install" in plan
    assert ".venv/bin/python -m pip" not in plan
    chosen = resolve(python, "-c", "constraints.txt", "-e", ".[dev,demo]")
    assert "transformers" in chosen
    assert not {"torch", "triton"} & set(chosen)
    assert not [name for name in chosen if name.startswith("nvidia")]


@pytest.mark.soak
def test_without_torch_the_cpu_pins_resolve(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    plan = make_plan(python)
    assert '.venv/bin/python -m pip install -q --disable-pip-version-check "torch==2.13.0"' in plan
    assert '"triton==3.6.0"' in plan
    chosen = resolve(python, "torch==2.13.0", "triton==3.6.0", "-c", "constraints.txt", "-e", ".[dev,demo]")
    assert chosen["torch"].startswith("2.13.0")
    assert chosen["triton"] == "3.6.0"
    assert chosen["numpy"] == "2.3.5"
