"""`thyme doctor`: its self-tests pass on a sound machine; what is broken is named, with a remedy."""

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pages import ROOT
from thyme.cli import main
from thyme.engine import Engine
from thyme.kernels import (
    grpo_loss,
    kv_cache,
    linear_grpo_loss,
    linear_logprob,
    mrope,
    paged_attention,
    rmsnorm,
    sample,
    swiglu,
    token_logprobs,
    truncated_logprobs,
)
from thyme.model.model import Model
from thyme.sandbox import Layer
from thyme.verbs import doctor, doctor_kernels, doctor_machine
from thyme.verbs.doctor_check import Check
from thyme.verbs.doctor_kernels import kernel_checks, kernels_in_child
from thyme.verbs.doctor_machine import machine_checks, package_checks
from thyme.verbs.doctor_parity import parity_checks

# Triton's interpreter, as in the tests of kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def failing(checks: list[Check]) -> list[str]:
    assert all(check.remedy for check in checks if check.needed and not check.ok), "no remedy"
    return [check.name for check in checks if not check.ok]


@pytest.mark.soak
def test_a_sound_machine_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it: kernels in a process of their own. What this machine's sandbox lacks is not of interest."""
    found = doctor.run(doctor.Config())
    rows, code = found.data, found.code
    assert code in (0, 2) and not failing([row for row in rows if row.part in ("kernels", "parity")])
    assert not failing([row for row in rows if row.part == "machine" and row.needed])
    names = {row.name for row in rows if row.part == "kernels"}
    assert names == set(doctor_kernels._pairs("cpu")) and len(names) == 17
    assert len([row for row in rows if row.part == "parity"]) == 2


def off_by_a_little(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, one number in a hundred wrong."""

    def wrong(*args: Any, **more: Any) -> Any:
        out = run(*args, **more)
        first = out[0] if isinstance(out, tuple) else out
        if first.is_floating_point():
            first.view(-1)[::100] += 0.01 * first.abs().max().clamp_min(1)
        else:
            first += 1
        return out

    return wrong


@pytest.mark.parametrize(
    ("module", "op", "name"),
    [
        (sample, "sample_triton", "sample"),
        (token_logprobs, "token_logprobs_triton", "token_logprobs"),
        (linear_logprob, "linear_logprob_triton", "linear_logprob"),
        (paged_attention, "paged_attention_triton", "paged_attention"),
        (paged_attention, "paged_attention", "paged_attention (C++)"),
        (kv_cache, "mrope_write_kv_triton", "mrope_write_kv"),
        (mrope, "mrope_triton", "mrope"),
        (rmsnorm, "rmsnorm_triton", "rmsnorm"),
        (rmsnorm, "add_rmsnorm_triton", "add_rmsnorm"),
        (swiglu, "swiglu_triton", "swiglu"),
        (sample, "sample_triton", "sample, truncated"),
        (truncated_logprobs, "truncated_logprobs_triton", "truncated_logprobs"),
        (linear_grpo_loss, "linear_grpo_loss_triton", "linear_grpo_loss"),
    ],
)
def test_a_kernel_that_errs_is_named(module: Any, op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, op, off_by_a_little(getattr(module, op)))
    # Of the others only the one is computed: each was above.
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {name: pairs(device)[name]})
    assert failing(kernel_checks()) == [name]


@pytest.mark.parametrize("forgotten", [{"vocab_size": 999}, {"vocab_size": 1_003}, {"banned_ids": ()}])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (sample, "sample"),
        (token_logprobs, "token_logprobs"),
        (truncated_logprobs, "truncated_logprobs"),
        (grpo_loss, "grpo_loss"),
        (linear_logprob, "linear_logprob"),
        (linear_grpo_loss, "linear_grpo_loss"),
    ],
)
def test_an_id_too_many_or_too_few_is_named(
    module: Any, name: str, forgotten: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that mistakes the end of the vocabulary by one, or reads what is banned: a thousandth of the ids."""
    real, name = getattr(module, f"{name}_triton"), "sample, truncated" if module is sample else name
    monkeypatch.setattr(module, real.__name__, lambda *args, **more: real(*args, **more | forgotten))
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {name: pairs(device)[name]})
    assert failing(kernel_checks()) == [name]


def test_a_cut_among_equal_ids_that_is_off_by_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real, name = sample.sample_triton, "sample, truncated in ties"
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {name: pairs(device)[name]})
    for wrong in ({"top_k": -1}, {"top_k": 1}, {"top_p": 0.04}):

        def mistaken(*args: Any, wrong: dict[str, Any] = wrong, **more: Any) -> Any:
            ((which, by),) = wrong.items()
            on = more[which] > 1 if which == "top_k" else more[which] < 1
            return real(*args, **more | {which: more[which] + by * on})

        monkeypatch.setattr(sample, "sample_triton", mistaken)
        assert failing(kernel_checks()) == [name], wrong


@pytest.mark.parametrize(
    ("by_backend", "gradient", "name"),
    [
        (rmsnorm._BACKWARD, 3, "rmsnorm"),
        (rmsnorm._BACKWARD, 3, "add_rmsnorm"),
        (swiglu._BACKWARD, 2, "swiglu"),
    ],
)
def test_a_backward_pass_that_errs_is_named(
    by_backend: dict[str, Any], gradient: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out is right, and its gradient is not."""
    real = by_backend["triton"]

    def wrong(*args: Any) -> Any:
        return real(*args[:gradient], 1.02 * args[gradient], *args[gradient + 1 :])

    monkeypatch.setitem(by_backend, "triton", wrong)
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {name: pairs(device)[name]})
    assert failing(kernel_checks()) == [name]


def test_a_gradient_that_turns_the_wrong_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mrope._TURN["triton"]
    monkeypatch.setitem(mrope._TURN, "triton", lambda heads, cos, sin, sign: real(heads, cos, sin, 1))
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {"mrope": pairs(device)["mrope"]})
    assert failing(kernel_checks()) == ["mrope"]


def test_a_kernel_that_does_not_run_at_all_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = doctor_kernels._pairs
    monkeypatch.setattr(doctor_kernels, "_pairs", lambda device: {"swiglu": pairs(device)["swiglu"]})
    monkeypatch.setattr(swiglu, "swiglu_triton", lambda _: 1 / 0)
    [check] = kernel_checks()
    assert not check.ok and "ZeroDivisionError" in check.found
    monkeypatch.setattr(swiglu, "swiglu_triton", lambda x: torch.full_like(x[:, ::2], torch.nan))
    assert failing(kernel_checks()) == ["swiglu"]


def test_kernels_run_in_a_process_whose_death_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert command[1:] == ["-m", "thyme.verbs.doctor_kernels"]
        return subprocess.CompletedProcess(command, -11, stdout="", stderr="x\nSegmentation fault\n")

    monkeypatch.setattr(doctor_kernels.subprocess, "run", run)
    [check] = kernels_in_child()
    assert not check.ok and check.needed and "-11: Segmentation fault" in check.found

    def forever(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor_kernels.subprocess, "run", forever)
    [check] = kernels_in_child()
    assert not check.ok and "no answer within" in check.found


def test_an_engine_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.step

    def moved(self: Engine) -> Any:
        done = real(self)
        self.runner.kv_cache.mul_(1.02)  # as a cache that is read from the wrong place
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", moved)
        assert "log-probs" in failing(parity_checks())
    with monkeypatch.context() as patch:
        patch.setattr(Model, "encode_images", lambda self, pixels, grids: 1 / 0)
        [check] = parity_checks()
        assert not check.ok and "ZeroDivisionError" in check.found


def test_every_extra_that_a_user_may_lack_is_looked_at() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor_machine.EXTRAS) == set(said) - {"dev"}


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "EXTRAS", {"serve": ("starlette", "no_such_module"), "gpu": ("flash_attn",)})
    [check] = package_checks()
    assert (check.ok, check.found, check.remedy) == (False, "missing: no_such_module", "pip install 'thyme[serve]'")
    monkeypatch.setattr(doctor_machine, "_OLDEST", (9, 9))
    monkeypatch.setattr(importlib.metadata, "version", _not_installed)
    monkeypatch.setitem(sys.modules, "thyme._native", None)
    found = {check.name: check for check in machine_checks()}
    for name, command in (
        ("Python", "install Python 9.9"),
        ("torch", "pip install torch=="),
        ("Triton", "pip install triton=="),
        ("C++ extension", "pip install -e ."),
    ):
        assert not found[name].ok and found[name].needed and command in found[name].remedy


def test_a_package_that_is_installed_and_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacks_a_library.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    (tmp_path / "kills_its_process.py").write_text("import os\nprint('imported: csv no')\nos.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    extras = {"sound": ("json",), "data": ("csv", "lacks_a_library"), "gone": ("not_there", "kills_its_process")}
    monkeypatch.setattr(doctor_machine, "EXTRAS", extras)
    sound, data, gone = package_checks()
    assert sound.ok and sound.found == "json" and not sound.remedy
    assert not data.ok and data.remedy == "pip install --force-reinstall 'thyme[data]'"
    assert data.found == "lacks_a_library cannot be imported: ImportError: libGL.so.1: cannot open shared object file"
    assert not gone.ok and gone.found.startswith(
        "missing: not_there; kills_its_process cannot be imported: its process"
    )


def _not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_sees_gpu", lambda: True)
    monkeypatch.setattr(doctor_machine, "_driver", lambda: "550.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = {check.name: check for check in machine_checks()}
    assert not found["GPU"].ok and "driver 550.1" in found["GPU"].found and "driver" in found["GPU"].remedy
    assert not found["torch"].ok and "CPU only" in found["torch"].found and "CUDA" in found["torch"].remedy


def test_the_exit_code_says_whether_it_is_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [Layer("seccomp", True, True, "on"), Layer("sandbox", False, True, "no [bold]namespaces")]
    monkeypatch.setattr("thyme.sandbox.doctor.report", lambda: layers)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--kernels", "false", "--parity", "false"])
    out = capsys.readouterr().out
    assert ended.value.code == 2 and "FAILS" in out and "[bold]" in out and "SECURITY.md" in out
    monkeypatch.setattr("thyme.sandbox.doctor.report", lambda: layers[:1])
    main(["doctor", "--kernels", "false", "--parity", "false", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in rows} == {"machine", "packages", "sandbox"}
    assert [row["found"] for row in rows if row["name"] == "seccomp"] == ["on"]
    assert doctor.Config().kernels and doctor.Config().parity
