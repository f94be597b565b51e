"""The command line and the fixture of the kernel benchmarks, and what every benchmark shares: machine and versions,
warnings as warnings, the table at the end.
"""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import goals
import harness
import predicted
import pytest
import pytest_benchmark.utils
import selection
import survive
import table
import torch

Compare = Callable[[str, Callable[[], harness.Group], dict[str, str]], None]

# torch.compile warns of its own internals; a benchmark is no place to fail on them.
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
GPU_STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"

_replayed = [0.0]


def replay_clock() -> float:
    """Moves by the next recorded duration at each call of what is timed: pytest-benchmark times one test after another,
    contenders are timed side by side before that, and it keeps the result."""
    return _replayed[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("kernel benchmarks").addoption
    add("--shapes", default="", help="like 8192x152064,64x49152: of the benchmarks whose shapes have so many numbers")
    add("--dtype", choices=sorted(selection.DTYPES), help="of every shape, in place of its own")
    add("--contenders", default="", help="only those whose names begin so, like ours,torch.compile")
    add("--without", default="", help="not those, like torch.compile")
    add("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU")
    add("--as-trained", action="store_true", help="ops as engine and trainer call them, the default")
    add("--bare", action="store_true", help="ops without temperatures, with all ids")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Files with benchmarks are found in a folder too, and not twice where they are named or asked for by pattern."""
    patterns = parent.config.getini("python_files")
    if not file_path.match("bench/bench_*.py") or any(fnmatch(file_path.name, pattern) for pattern in patterns):
        return None
    return None if parent.session.isinitpath(file_path) else pytest.Module.from_parent(parent, path=file_path)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads what it compares with
def pytest_configure(config: pytest.Config) -> None:
    # `timeout` sends it: an interrupted run still writes what it has measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A comparison with another machine is said, and made.
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    with suppress(ImportError):
        from pytest_benchmark.logger import PytestBenchmarkWarning

        warnings.filterwarnings("default", category=PytestBenchmarkWarning)  # while plugins are configured, too
    option = config.option
    if option.bare and option.as_trained:
        raise pytest.UsageError("--bare and --as-trained exclude each other")
    if option.device == "cuda" and not harness.GPU:
        raise pytest.UsageError("--device cuda: torch sees no GPU here")
    try:
        shapes = selection.parsed(option.shapes) if option.shapes else ()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    harness.use(option.device or ("cuda" if harness.GPU else "cpu"))
    chosen = selection.chosen
    chosen.contenders, chosen.without = (tuple(filter(None, x.split(","))) for x in (option.contenders, option.without))
    chosen.shapes, chosen.dtype, chosen.bare = shapes, selection.DTYPES.get(option.dtype), option.bare
    if "SURVIVE_NOTES" in os.environ:
        commit_info = pytest_benchmark.utils.get_commit_info()
        machine = {"machine_info": described() | {"cpu": {}}, "commit_info": commit_info}
        survive.note("machine", json.dumps(machine, default=str))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for ignored in IGNORED:
            item.add_marker(pytest.mark.filterwarnings(ignored))
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))
    out = [item for item in items if not selection.takes_part(_parameters(item).get("contender", ""))]
    config.hook.pytest_deselected(items=out)
    kept = [item for item in items if item not in out]
    # Of each file the first shape of all its tests first, then the second one.
    ranks: dict[tuple[Path, str], int] = {}
    for item in kept:
        ranks.setdefault((item.path, str(_parameters(item).get("shape"))), len(ranks))
    files = {path: at for at, path in enumerate(dict.fromkeys(item.path for item in kept))}
    items[:] = sorted(kept, key=lambda item: (files[item.path], ranks[item.path, str(_parameters(item).get("shape"))]))
    if config.option.shapes and not any(getattr(item, "callspec", None) and _runs(item) for item in items):
        raise pytest.UsageError(f"--shapes {config.option.shapes}: no benchmark among these has so many numbers")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _runs(item: Any) -> bool:
    return "compare" in item.fixturenames and not any(mark.name == "skip" for mark in item.own_markers)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    kept = table.machine(machine_info | described())
    machine_info.clear()
    machine_info |= kept


def described() -> dict[str, Any]:
    """The machine, as far as figures need it to be read."""
    machine_info: dict[str, Any] = {"device": device_name()}
    machine_info["versions"] = {name: version(name) for name in ("torch", "triton", "numpy")}
    machine_info["versions"] |= {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    if state := gpu_state():
        machine_info["gpu"] = state
    return machine_info


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and driver, as nvidia-smi says; nothing without a GPU."""
    if not harness.GPU:
        return {}
    command = ["nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_STATE.split(","), done.stdout.splitlines()[0].split(", "), strict=False))


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Our table below that of pytest-benchmark, which knows no ceilings."""
    if config.option.benchmark_quiet:
        return
    done = getattr(config, "_benchmarksession", None)
    every = [
        {"group": one.group, "name": one.name, "stats": {}, "extra_info": one.extra_info}
        for one in getattr(done, "benchmarks", [])
    ]
    if rows := list(filter(table.is_kernel, every)):
        terminalreporter.section("of their ceilings")
        terminalreporter.write_line("\n".join([*table.ceilings(rows), *table.table(rows)]))


@pytest.fixture(scope="session")
def _last_group() -> dict[str, Any]:
    """The group measured last: its contenders' tests follow one another."""
    return {}


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, _last_group: dict[str, Any]) -> Compare:
    """compare(name, build, absent): reports `name` of the group, which is measured unless it was the last one."""

    def compare(name: str, build: Callable[[], harness.Group], absent: dict[str, str]) -> None:
        parameters = {key: value for key, value in request.node.callspec.params.items() if key != "contender"}
        key = f"{request.node.nodeid.partition('[')[0]} {parameters}"
        if _last_group.get("key") != key:
            _last_group.clear()
            _last_group.update(key=key, measured=harness.measure(_chosen(build())), gpu=gpu_state())
        measured: harness.Measured = _last_group["measured"]
        failed = {other: timing.failed for other, timing in measured.timings.items() if timing.failed}
        if name in failed:
            pytest.skip(str(failed[name]))
        info = measured.info(name) | {"contender": name, "absent": absent | failed}
        info["version"] = selection.version_of(name)
        info["model_ms"] = {term: 1e3 * seconds for term, seconds in predicted.seconds(measured.group).items()}
        if _last_group["gpu"]:
            info["gpu"] = _last_group["gpu"]
        goal = goals.GOALS.get(measured.group.title) if harness.GPU else None
        if goal is not None and name.startswith("ours"):
            info |= {"goal": str(goal), "met": goal.met(info)}
        benchmark.group = measured.group.title
        benchmark.params = {key: selection.readable(value) for key, value in request.node.callspec.params.items()}
        benchmark.extra_info |= info
        seconds = iter(measured.timings[name].seconds)

        def advance() -> None:
            _replayed[0] += next(seconds, 0.0)

        benchmark.pedantic(advance, rounds=len(measured.timings[name].seconds), iterations=1)
        result = benchmark.stats.as_dict(include_data=False)
        survive.note("result", json.dumps(result, default=str))

    return compare


def _chosen(group: harness.Group) -> harness.Group:
    names = [name for name in group.names if selection.takes_part(name)]
    return dataclasses.replace(group, title=group.title + ", bare" * selection.chosen.bare, names=names)


def device_name() -> str:
    return torch.cuda.get_device_name() if harness.GPU else f"CPU, {torch.get_num_threads()} threads"
