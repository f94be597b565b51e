"""`thyme bench`: which groups there are, what is run of them, and figures beside others, with what these are of."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import table

from thyme.cli import main
from thyme.verbs import bench

ROOT = Path(__file__).parents[2]
SHORT = ("--shapes", "8x64", "--dtype", "bfloat16", "--without", "torch.compile")


def child(*args: str | Path, **more: object) -> "subprocess.Popen[str]":
    """A process of its own: pytest-benchmark refuses to run inside of xdist, as which a child would count."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "thyme", "bench", *map(str, args)],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "BENCH_BUDGET_S": "0.01", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )


def test_the_groups_are_the_files_and_say_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--list"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    assert "swiglu            SwiGLU over a fused projection, forward and backward" in lines
    assert all(len(line.split(None, 1)[1]) > 10 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["swigu"], "group 'swigu': no such group: did you mean 'swiglu'? (engine, "),
        (["sample", "--shape", "8"], "unknown option --shape: did you mean --shapes?"),
        (["sample", "--compare", "h200"], "compare h200: no such file, and not one of the figures kept in"),
        (["sample", "--compare", "README.md"], "compare README.md: not the JSON of pytest-benchmark"),
        (["sample", "--compare", "other.json"], "compare other.json: no figures of this project's benchmarks"),
        (["sample", "--dtype", "float8"], "'float8' is not one of"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# no JSON")
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and said in err


def test_without_a_checkout_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        main(["bench", "sample"])
    assert "are in bench/ of a checkout and are not installed: clone the repository" in capsys.readouterr().err


def test_the_command_line_of_pytest_is_made_of_ours() -> None:
    config = bench.parse(["swiglu", "sample", *SHORT, "--compare", "cpu", "--bare", "--", "-k", "not backward"])
    words = bench.command(config, bench.groups_of(ROOT))[2:]
    assert words[:2] == ["bench/bench_swiglu.py", "bench/bench_sample.py"]
    assert words[2:6] == ["--shapes=8x64", "--dtype=bfloat16", "--without=torch.compile", "--bare"]
    assert words[6:] == [f"--against={ROOT / 'bench/baselines/cpu.json'}", "-k", "not backward"]
    assert "thyme bench" in (ROOT / "Makefile").read_text()  # there is one way


def run_of(**versions: str) -> dict[str, object]:
    machine = {"device": "CPU, 1 threads", "versions": {"torch": "2.13.0"} | versions, "cpu": {"brand_raw": "a CPU"}}
    return {"machine_info": machine, "commit_info": {"id": "0" * 40, "dirty": False}, "benchmarks": []}


def test_what_differs_between_two_runs_is_named() -> None:
    assert table.differences(run_of(), run_of()) == []
    assert table.differences(run_of(triton="3.6.0"), run_of(torch="2.11.0")) == [
        "torch: 2.13.0 here, 2.11.0 there",
        "triton: 3.6.0 here, none there",
    ]
    other = run_of() | {"machine_info": {"device": "NVIDIA H100", "versions": {"torch": "2.13.0"}, "cpu": {}}}
    assert table.differences(run_of(), other) == [
        "device: CPU, 1 threads here, NVIDIA H100 there",
        "processor: a CPU here, none there",
    ]
    told = table.comparison_lines({"with": "x.json", "is": "it", "shared": 0, "differences": ["a: b here, c there"]}, 3)
    assert told == [
        "compared with x.json: it",
        "0 of 3 figures are kept there",
        "not the same machine or versions, so a ratio is not of the code alone:",
        "  a: b here, c there",
    ]


@pytest.mark.soak
def test_a_run_that_is_kept_is_compared_with(tmp_path: Path) -> None:
    """One contender, so that there is little to time: once to keep, once beside that, by versions that differ."""
    kept, pytests = tmp_path / "kept.json", ("--", "-k", "test_swiglu and not backward")
    done = child("swiglu", *SHORT, "--contenders", "ours,reference", "--keep", kept, *pytests)
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, out + err
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("ceilings: copy "))
    assert lines[at + 2] == "swiglu: 8 x 64 bfloat16"  # the ceilings first
    assert out.count("swiglu: 8 x 64 bfloat16") == 1  # and one table
    data = json.loads(kept.read_text())
    assert data["command"].startswith("pytest bench/bench_swiglu.py --shapes=8x64 --dtype=bfloat16")
    data["machine_info"]["versions"]["torch"] = "1.0"
    kept.write_text(json.dumps(data))

    done = child("swiglu", *SHORT, "--contenders", "ours", "--compare", kept, "--json", *pytests)
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, out + err
    said = json.loads(out)
    assert "ceilings: copy" in err and "not the same machine or versions" in err
    assert said["compared"]["shared"] == 1 and len(said["compared"]["differences"]) == 1
    assert said["compared"]["differences"][0].endswith("here, 1.0 there")
    (row,) = said["benchmarks"]
    assert row["group"] == "swiglu: 8 x 64 bfloat16" and row["extra_info"]["vs_kept"] > 0
    assert said["commit_info"]["id"] and said["machine_info"]["versions"]["python"]


@pytest.mark.soak
def test_what_was_measured_is_printed_after_a_signal() -> None:
    running = child("rmsnorm", "--without", "torch.compile", start_new_session=True)
    assert running.stdout is not None
    time.sleep(1)
    while running.stdout.read(1) != ".":  # pytest has ended a first benchmark
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 143 and "thyme: interrupted" in err and "Traceback" not in err
    assert "ceilings: copy" in out and "GB/s" in out


@pytest.mark.soak
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3, 0.6, 0.9])
def test_ctrl_c_at_a_terminal_is_one_line_while_what_it_runs_is_imported(delay: float) -> None:
    running = child("swiglu", *SHORT, start_new_session=True)
    while not Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text():
        assert running.poll() is None
    time.sleep(delay)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err.splitlines()[-1:]) == (130, ["thyme: interrupted"]) and "Traceback" not in err
