"""The fixture of the kernel benchmarks, and what every benchmark shares: machine and versions, warnings as warnings."""

import platform
import signal
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import goals
import harness
import pytest
import torch

Compare = Callable[[str, Callable[[], harness.Group], dict[str, str]], None]

# torch.compile warns of its own internals; a benchmark is no place to fail on them.
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


_replayed = [0.0]


def replay_clock() -> float:
    """Moves by the next recorded duration at each call of what is timed: pytest-benchmark times one test after another,
    contenders are timed side by side before that, and it keeps the result."""
    return _replayed[0]


def pytest_configure() -> None:
    # `timeout` sends it: an interrupted run still writes what it has measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for ignored in IGNORED:
            item.add_marker(pytest.mark.filterwarnings(ignored))
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["device"] = device_name()
    machine_info["versions"] = {name: version(name) for name in ("torch", "triton", "numpy")}
    machine_info["versions"] |= {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}


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
            _last_group.update(key=key, measured=harness.measure(build()))
        measured: harness.Measured = _last_group["measured"]
        failed = {other: timing.failed for other, timing in measured.timings.items() if timing.failed}
        if name in failed:
            pytest.skip(str(failed[name]))
        info = measured.info(name) | {"contender": name, "absent": absent | failed}
        goal = goals.GOALS.get(measured.group.title)
        if goal is not None and name.startswith("ours"):
            info |= {"goal": str(goal), "met": goal.met(info)}
        benchmark.group = measured.group.title
        benchmark.extra_info |= info
        seconds = iter(measured.timings[name].seconds)

        def advance() -> None:
            _replayed[0] += next(seconds, 0.0)

        benchmark.pedantic(advance, rounds=len(measured.timings[name].seconds), iterations=1)

    return compare


def device_name() -> str:
    return torch.cuda.get_device_name() if harness.GPU else f"CPU, {torch.get_num_threads()} threads"
