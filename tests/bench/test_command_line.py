"""The benchmarks as who benchmarks runs them, in child processes and short: options, JSON, comparison, and each command
that docs/benchmarks.md shows."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import configurations
import predicted
import pytest
import selection
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/benchmarks.md"
COMMANDS = [
    line.partition("#")[0].strip()
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    if not kind
    for line in block.splitlines()
]


def child(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = (
        "TRITON_INTERPRET",
        "PYTEST_",
    )  # benchmarks refuse to run inside of xdist, as which a child would count
    kept = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "BENCH_BUDGET_S": "0.01"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_shapes_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = [(2_048, 152_064, torch.bfloat16, 1.0), (8_192, 152_064, torch.bfloat16, 0.4)]
    assert selection.shapes(defaults) == defaults[::-1]  # the largest first
    monkeypatch.setattr(selection.chosen, "shapes", selection.parsed("64x32, 8,1x2x3"))
    monkeypatch.setattr(selection.chosen, "dtype", torch.float32)
    assert selection.shapes(defaults) == [
        (8, 152_064, torch.float32, 1.0),
        (8, 152_064, torch.float32, 0.4),
        (64, 32, torch.float32, 1.0),
        (64, 32, torch.float32, 0.4),
    ]
    assert selection.shapes(defaults, lambda *numbers: numbers if len(numbers) == 3 else None) == [(1, 2, 3)]
    for wrong in ("8x", "0x3", "8*3", "x"):
        with pytest.raises(ValueError, match=re.escape(f"--shapes: '{wrong}' is no shape")):
            selection.parsed(wrong)


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selection.takes_part("torch.compile")
    monkeypatch.setattr(selection.chosen, "without", ("torch.compile",))
    assert [name for name in ("torch", "torch.compile", "ours") if selection.takes_part(name)] == ["torch", "ours"]
    monkeypatch.setattr(selection.chosen, "contenders", ("ours",))
    assert [name for name in ("torch", "ours, recompute") if selection.takes_part(name)] == ["ours, recompute"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8x"], "--shapes: '8x' is no shape; write numbers like 8192x152064,64x49152"),
        (["--shapes", "1x2x3x4x5"], "--shapes 1x2x3x4x5: no benchmark among these has so many numbers"),
        (["--bare", "--as-trained"], "--bare and --as-trained exclude each other"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], message: str) -> None:
    done = child(["-m", "pytest", "bench/bench_swiglu.py", "--collect-only", "-q", *arguments])
    assert done.returncode == 4
    assert message in done.stderr + done.stdout


def test_a_run_its_json_and_a_comparison_with_it(tmp_path: Path) -> None:
    command = ["-m", "pytest", "bench/bench_swiglu.py", "--shapes", "8x64", "--dtype", "bfloat16", "-k", "not backward"]
    command += ["--without", "torch.compile"]
    done = child([*command, f"--benchmark-json={tmp_path / 'before.json'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "before.json").read_text()
    assert "UNSERIALIZABLE" not in text
    rows = {row["extra_info"]["contender"]: row for row in json.loads(text)["benchmarks"]}
    assert {"torch", "ours"} <= set(rows)
    assert rows["ours"]["params"] == {"shape": [8, 64, "bfloat16"], "contender": "ours"}
    assert rows["ours"]["group"] == "swiglu: 8 x 64 bfloat16"
    info = rows["torch"]["extra_info"]
    assert info["version"] == torch.__version__
    assert info["p20_ms"] <= info["ms"] <= info["p80_ms"]
    assert set(info["model_ms"]) == {"copy"}
    assert info["model_ms"]["copy"] == pytest.approx(info["floor_ms"]["copy"] / 0.9)
    assert "\nceilings: copy " in done.stdout.partition("of their ceilings")[2]

    kept = tmp_path / "kept.json"
    assert child(["bench/table.py", "--print", str(tmp_path / "before.json"), "--baseline", str(kept)]).returncode == 0
    done = child([*command, f"--benchmark-compare={kept}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"-ours\] \(\S*kept\)", done.stdout) and "-ours] (NOW)" in done.stdout


@pytest.mark.parametrize("device", ["cpu"])
def test_a_baseline_that_is_kept_says_where_it_is_from(device: str) -> None:
    kept = json.loads((ROOT / f"bench/baselines/{device}.json").read_text())
    assert kept["machine_info"]["device"].lower().startswith(device)
    assert {"torch", "triton", "numpy", "python"} <= set(kept["machine_info"]["versions"])
    assert kept["command"].startswith("pytest bench")
    assert re.fullmatch(r"[0-9a-f]{40}", kept["commit_info"]["id"])
    groups = {row["group"] for row in kept["benchmarks"]}
    assert any(group.startswith("sample: ") for group in groups)


@pytest.mark.parametrize("title", ["rmsnorm: 8192 x 3584 bfloat16", "swiglu: 64 x 18944 bfloat16"])
def test_a_model_of_what_is_issued(title: str) -> None:
    version = max(path.name for path in (ROOT / "bench/gate").iterdir())
    (row, work), *others = predicted.launches(title, version)
    assert not others
    rows = int(title.split()[1])
    card = predicted.model.H100
    assert predicted.issue_seconds(title, card, version) == pytest.approx(
        row.most * work.elements / 8_192 * rows / 32 / (528 * 1.7e9 * 0.8)
    )
    assert predicted.issue_seconds("nothing: 8 x 8", card, version) == 0


def test_the_page_shows_commands() -> None:
    assert len(COMMANDS) >= 12
    assert all(shlex.split(command)[0] in ("pytest", "python", "thyme") for command in COMMANDS)


@pytest.mark.soak
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_runs(command: str, tmp_path: Path) -> None:
    words = [word.replace("build/", f"{tmp_path}/") for word in shlex.split(command)]
    if words[0] == "pytest":
        words = ["-m", *words]
        (tmp_path / "before.json").write_text(short_run())
        if words[2] == "bench":
            words += ["--collect-only", "-q"]
        elif "--shapes" not in words:
            words += ["--shapes", "8x64", "--without", "torch.compile"]
    elif words[0] == "thyme":
        words = ["-m", *words]
        (tmp_path / "before.json").write_text(short_run())
        if words[3:] == []:
            words += ["--", "--collect-only"]
        elif "--shapes" in words:
            at = words.index("--shapes")
            words[at:at] = ["--without", "torch.compile"]
    else:
        words = words[1:]
        (tmp_path / "before.json").write_text(short_run())
    done = child(words)
    assert done.returncode == 0, done.stdout + done.stderr


def short_run() -> str:
    """A run's JSON, as `--benchmark-json` writes it: the kept one is in its form."""
    return (ROOT / "bench/baselines/cpu.json").read_text()


def test_every_kernel_that_is_predicted_is_counted() -> None:
    """A configuration that was renamed would predict nothing, and nobody would see it."""
    works = [(one.module, f"{one.op} {one.kernel} {one.what}", one.work) for one in configurations.configurations()]
    for kernels in predicted.KERNELS.values():
        for module, wanted in kernels:
            found = [work for of, name, work in works if of == module and re.search(wanted, name)]
            assert found and all(work.elements for work in found), wanted
