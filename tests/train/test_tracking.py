"""Tracking: TensorBoard's files are read back; what trackio and Weights & Biases are told is recorded."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from thyme.train.config import TrackConfig
from thyme.train.tracking import tracked

STEPS = [{"step": 0.0, "loss": 2.0, "bad": float("nan")}, {"step": 1.0, "loss": 1.5, "optim/grad_norm": 0.5}]


def test_tensorboard_holds_what_a_run_measured_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for metrics in STEPS:
        with tracked(TrackConfig(to="tensorboard"), tmp_path / "run", {"seed": 0}) as track:
            track("rl", metrics)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"rl/loss", "rl/optim/grad_norm"}
    assert [(e.step, e.value) for e in events.Scalars("rl/loss")] == [(0, 2.0), (1, 1.5)]


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    def named(self, name: str) -> Any:
        return lambda *args, **named: self.append((name, args, named))


def test_trackio_is_told_and_finished_after_an_error_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, module = Calls(), ModuleType("trackio")
    for name in ("init", "log", "finish"):
        setattr(module, name, calls.named(name))
    monkeypatch.setitem(sys.modules, "trackio", module)
    with (
        pytest.raises(KeyError),
        tracked(TrackConfig(to="trackio", project="signs"), tmp_path / "r1", {"seed": 3}) as track,
    ):
        track("sft", STEPS[0])
        raise KeyError
    (init, log, finish) = calls
    assert init[2] == {"project": "signs", "name": "r1", "config": {"seed": 3}, "resume": "allow", "embed": False}
    assert log == ("log", ({"sft/loss": 2.0},), {"step": 0})
    assert finish[0] == "finish"


def test_wandb_counts_steps_by_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, module = Calls(), ModuleType("wandb")
    run = SimpleNamespace(**{name: calls.named(name) for name in ("define_metric", "log", "finish")})
    module.init = lambda **named: (calls.append(("init", (), named)), run)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with tracked(TrackConfig(to="wandb"), tmp_path / "r1", {}) as track:
        for metrics in STEPS:
            track("sft", metrics)
        track("rl", STEPS[0])
    assert [name for name, *_ in calls] == ["init", "define_metric", "log", "log", "define_metric", "log", "finish"]
    assert calls[0][2]["id"] == "r1" and calls[0][2]["resume"] == "allow"
    assert calls[3][1] == ({"sft/loss": 1.5, "sft/optim/grad_norm": 0.5, "sft/step": 1},)
    assert calls[4][1:] == (("rl/*",), {"step_metric": "rl/step"})


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with tracked(TrackConfig(), tmp_path, {}) as track:
        track("rl", STEPS[0])
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"needs the package trackio: pip install thyme\[track\]"):
        tracked(TrackConfig(to="trackio"), tmp_path, {}).__enter__()
    with pytest.raises(ValueError, match=r"TrackConfig\.to"):
        TrackConfig(to="mlflow")  # type: ignore[arg-type]
