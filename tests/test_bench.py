"""The benchmarks themselves: what a group's figures are, that goals are those of shapes that run, and that the peers
compute what ours do, called as they are when timed."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_grpo_loss
import bench_kv_cache
import bench_linear_logprob
import bench_mrope
import bench_paged_attention
import bench_rmsnorm
import bench_sample
import bench_swiglu
import goals
import harness
import pytest
import table
import torch
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def group(build: Callable[[str], harness.Run], *names: str, **more: Any) -> harness.Group:
    figures = {"title": "t", "num_bytes": 8_000_000, "dtype": torch.float32, "names": list(names), "build": build}
    return harness.Group(**figures | more)


@pytest.fixture
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bytes_per_s", lambda: 1e9)
    monkeypatch.setattr(harness, "matmul_flops_per_s", lambda dtype: 1e12)


def test_contenders_take_turns() -> None:
    called: list[str] = []
    measured = harness.measure(group(lambda name: lambda: called.append(name), "ours", "torch"))
    rounds = len(measured.timings["ours"].seconds)
    assert rounds == len(measured.timings["torch"].cpu) == harness.MAX_ROUNDS
    assert called[-2 * rounds :] == ["ours", "torch"] * rounds


def test_a_peer_that_cannot_run_is_a_line_and_ours_is_an_error() -> None:
    def build(name: str) -> harness.Run:
        if name == "peer":
            raise ImportError("no module named peer\nand more")
        return lambda: None

    measured = harness.measure(group(build, "ours", "peer"))
    assert measured.timings["peer"].failed == "ImportError: no module named peer"
    assert measured.timings["ours"].failed is None
    with pytest.raises(ImportError):
        harness.measure(group(lambda name: build("peer"), "ours"))


class Event:
    """A CUDA event of a device that counts its calls: each takes a millisecond."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.calls

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return float(end.at - self.at)


@pytest.mark.usefixtures("_ceilings")
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu_calls_are_captured_where_they_can_be(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_mode, eager = ["default"], Counter()

    @contextmanager
    def capture(graph: SimpleNamespace) -> Iterator[None]:
        before = Event.calls
        yield
        graph.replay = lambda: setattr(Event, "calls", Event.calls + 1)
        assert Event.calls == before + 1

    def build(name: str) -> harness.Run:
        def call() -> None:
            Event.calls += 1
            eager[name] += 1
            if name == "ours, waits" and sync_mode[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if name == "torch, large":
                raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    fakes = {
        "Event": Event,
        "CUDAGraph": SimpleNamespace,
        "graph": capture,
        "synchronize": lambda: None,
        "set_sync_debug_mode": sync_mode.append,
        "memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3 << 20,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(harness, "GPU", True)
    monkeypatch.setattr(harness, "_sweep", lambda seconds: None)
    names = ("ours", "ours, waits", "torch, large")
    measured = harness.measure(group(build, *names, training=training))
    assert measured.timings["torch, large"].failed == "OutOfMemoryError: CUDA out of memory"
    info = measured.info("ours")
    assert info["ms"] == info["warm_ms"] == 1
    assert info["peak_mib"] == 3
    assert eager["ours, waits"] > info["rounds"]
    assert (eager["ours"] > info["rounds"]) == training
    assert info["replayed"] == (not training)
    assert measured.info("ours, waits")["replayed"] is False


@pytest.mark.usefixtures("_ceilings")
@pytest.mark.parametrize(
    ("flops", "binding", "fraction"), [(0, "copy", 0.5), (2_000_000_000, "copy", 0.5), (12e9, "matmul", 0.75)]
)
def test_the_fraction_is_of_the_ceiling_that_binds(flops: int, binding: str, fraction: float) -> None:
    timing = harness.Timing(seconds=[0.5, 0.016, 0.001], cpu=[0.002] * 3)
    info = harness.Measured(group(lambda name: lambda: None, flops=flops), {"ours": timing}).info("ours")
    assert next(iter(info)) == "of_ceiling"
    assert info["binding"] == binding
    assert info["of_ceiling"] == pytest.approx(fraction)
    assert info["ms"] == pytest.approx(16)
    assert info["cpu_ms"] == pytest.approx(2)
    assert info["gb_per_s"] == pytest.approx(0.5)


def titles() -> set[str]:
    """Of every group that is timed on a GPU."""
    found = {bench_grpo_loss.title(*shape) for shape in bench_grpo_loss.GPU_SHAPES}
    found |= {
        bench_linear_logprob.title(f"{op} {what}", shape)
        for shape in bench_linear_logprob.GPU_SHAPES
        for op in ("linear_logprob", "linear_grpo_loss")
        for what in ("forward", "forward + backward")
    }
    found |= {bench_sample.title(shape, kind) for shape in bench_sample.GPU_SHAPES for kind in bench_sample.LIMITS}
    found |= {shape.title for shape in bench_paged_attention.GPU_SHAPES}
    found |= {
        bench_rmsnorm.title(op, at)
        for op in ("rmsnorm", "add_rmsnorm", "add_rmsnorm backward")
        for at in bench_rmsnorm.GPU_SHAPES
    }
    found |= {bench_swiglu.title(what, at) for what in ("", " forward + backward") for at in bench_swiglu.GPU_SHAPES}
    found |= {bench_mrope.title(shape, False) for shape in bench_mrope.GPU_SHAPES}
    return found | {bench_kv_cache.title(shape) for shape in bench_kv_cache.GPU_SHAPES}


def test_every_goal_is_one_of_a_group_that_runs() -> None:
    assert set(goals.GOALS) <= titles()


def test_a_goal_says_what_it_wants() -> None:
    goal = goals.Goal("of_ceiling", 0.9, "%", at_most=False)
    assert str(goal) == ">= 90%"
    assert goal.met({"of_ceiling": 0.91})
    assert not goal.met({"of_ceiling": 0.89})
    assert goals.Goal("ms", 2.05, "ms", at_most=True).met({"ms": 2.05})


def test_goals_hold_for_any_gpu() -> None:
    """A fraction of what its copy or matmul rate allows, below 1; a time only where a call is too small for either."""
    for title, goal in goals.GOALS.items():
        assert (goal.figure == "of_ceiling" and 0 < goal.limit < 1 and not goal.at_most) or (
            goal.figure == "warm_ms" and title.startswith(("sample: 1 ", "sample: 8 ", "sample: 64 "))
        ), title


@pytest.mark.usefixtures("_ceilings")
def test_the_table_and_the_figures_worth_keeping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = harness.Measured(group(lambda name: lambda: None), {"ours": harness.Timing([0.016], [0.008])})
    info = measured.info("ours") | {"contender": "ours", "absent": {"liger": "liger_kernel is not installed"}}
    model = {"model_ms": {"copy": 9.0, "issue": 2.0}, "version": ""}
    rows = [
        {
            "group": "engine",
            "name": "test_race",
            "stats": {"median": 1.0, "rounds": 3, "data": [1.0] * 3},
            "extra_info": {"goal": "2x", "met": False, "of_ceiling": 0.59},  # of the packed products
        },
        {"group": "t", "name": "test_x", "stats": {}, "extra_info": info | {"goal": ">= 90%", "met": False} | model},
    ]
    machine = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "cpu": {"brand_raw": "a CPU"}}
    path, kept = tmp_path / "bench.json", tmp_path / "kept" / "h200.json"
    commit = {"id": "0123456789abcdef", "dirty": True}
    path.write_text(json.dumps({"benchmarks": rows, "machine_info": machine, "commit_info": commit}))
    monkeypatch.setattr("sys.argv", ["table.py", "--print", str(path), "--baseline", str(kept)])
    assert table.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H200 (a CPU); torch 2.11.0; commit 0123456789ab-dirty"
    assert lines[1] == "ceilings: copy 1 GB/s"
    at = lines.index("t")
    assert lines.index("engine") > at
    assert lines[at + 1] == "  a perfect kernel: copy 8 ms"
    assert lines[at + 2] == "  the models predict 9 ms: copy 9 ms, issue 2 ms"
    assert lines[at + 3].split() == ["ceiling", "ms", "p20", "p80", "warm", "ms", "GB/s", "n"]
    figures = ["50%", "16", "16", "16", "8", "0.5", "1"]
    assert lines[at + 4].split() == [*figures, "ours;", "goal", ">=", "90%:", "missed"]
    assert lines[at + 5].split() == ["-", "liger:", "liger_kernel", "is", "not", "installed"]

    found = json.loads(kept.read_text())
    assert found["command"] == "pytest bench"
    assert found["machine_info"] == {
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"},
        "cpu": {"brand_raw": "a CPU"},
    }
    assert found["commit_info"] == commit
    assert [row["name"] for row in found["benchmarks"]] == ["test_race", "test_x"]
    assert "data" not in found["benchmarks"][0]["stats"]
    found["benchmarks"][1]["extra_info"]["ms"] = 8.0
    kept.write_text(json.dumps(found))
    monkeypatch.setattr("sys.argv", ["table.py", "--print", str(path), "--against", str(kept)])
    assert table.main() == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("t")
    assert lines[at + 3].split()[-2:] == ["vs", "kept"]
    assert lines[at + 4].split()[:8] == [*figures, "2.00x"]


# --- peers, interpreted: Liger-Kernel's RMSNorm and SwiGLU and cut-cross-entropy cannot be ---------------------------


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_liger_computes_the_same_loss_from_logits() -> None:
    case = dataclasses.replace(bench_grpo_loss.problem(16, 50, torch.float32, 0.6), tau=torch.ones(16))
    close(bench_grpo_loss.LOSSES["liger"](case)(), bench_grpo_loss.LOSSES["ours"](case)())


def test_liger_turns_heads_the_same_way() -> None:
    heads, positions = torch.randn(10, 6, 32), torch.randint(0, 50, (3, 10))
    tensors, turn = bench_mrope.call("ours", heads, positions, (4, 6, 6), 4)
    wanted = turn(*tensors)
    tensors, turn = bench_mrope.call("liger", heads, positions, (4, 6, 6), 4)
    close(torch.cat([x[0] for x in turn(*tensors)]).transpose(0, 1), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("peer", ["liger", "liger, scaled"])
def test_a_peers_logprobs_and_their_gradients(peer: str) -> None:
    case = bench_linear_logprob.problem(16, 24, 50, torch.float32, 1.0)
    results: list[list[Tensor]] = []
    for name in ("ours, recompute", peer):
        out = bench_linear_logprob.LOGPROBS[name](case)()
        gradients = torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), (case.hidden, case.weight))
        results.append([out.detach(), *gradients])
    close(results[1], results[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_ligers_fused_loss_and_its_gradients() -> None:
    case = bench_linear_logprob.problem(16, 24, 50, torch.float32, 0.6)
    case = dataclasses.replace(case, tau=torch.ones(16), old=case.old + 8, ref=case.ref + 8)
    results: list[list[Tensor]] = []
    for name in ("torch", "ours", "liger"):
        loss = bench_linear_logprob.LOSSES[name](case)()
        results.append([loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))])
    close(results[1], results[0])
    close(results[2], results[0])
