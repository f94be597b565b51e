"""The benchmarks as who benchmarks runs them, in child processes and short: options, JSON, comparison."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import predicted
import pytest
import selection
import torch

ROOT = Path(__file__).resolve().parents[2]


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
