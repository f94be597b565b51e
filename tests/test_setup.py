"""Set-up keeps a torch that is there, and installs the CPU build where none is: resolved by pip without installing."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
