"""Values are looked at on a CPU always, on a device only under THYME_VALIDATE=1: nothing else waits for the device.

Tensors of the device "meta" have no values: to look at one raises, as it would make the host wait for a GPU. So the
host's side of each op runs on them with its kernels left out.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from thyme.kernels import (
    linear_gradient,
    linear_tiles,
    policy_tokens,
    row_stats,
    sample_blocks,
    sample_cut,
    token_logprobs,
)
from thyme.kernels.checks import check_range, on_its_device, values_visible
from thyme.kernels.grpo_loss import GrpoLossConfig, grpo_loss_triton
from thyme.kernels.linear_logprob import linear_logprob_triton
from thyme.kernels.sample import sample_triton

LOOKED = (RuntimeError, NotImplementedError)
"""What torch raises when somebody looks at a meta tensor's values."""


class Unlaunched:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[ModuleType] = [linear_gradient, linear_tiles, policy_tokens]
    modules += [row_stats, sample_blocks, sample_cut, token_logprobs]
    for module in modules:
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Unlaunched())


def drawn(**limits: Any) -> None:
    index = torch.zeros(6, dtype=torch.int64)
    banned = torch.zeros(50, dtype=torch.bool)
    sample_triton(torch.zeros(6, 50), torch.ones(6), seed=index, position=index, banned_ids=banned, **limits)


def loss(config: GrpoLossConfig, **tokens: Any) -> None:
    """With everything that may be given, forward and backward, and metrics."""
    logits = torch.zeros(6, 50, requires_grad=True)
    ones = torch.ones(6)
    out, metrics = grpo_loss_triton(
        logits,
        torch.zeros(6, dtype=torch.int64),
        ones,
        ones,
        old_logprobs=ones,
        ref_logprobs=ones,
        rollout_logprobs=ones,
        temperature=ones,
        cu_seqlens=torch.zeros(3, dtype=torch.int32),
        segments=torch.zeros(6, dtype=torch.uint8),
        banned_ids=torch.zeros(50, dtype=torch.bool),
        config=config,
    )
    out.backward()
    assert metrics.values.device.type == "meta"
    assert logits.grad is not None


def head(**options: Any) -> None:
    hidden, weight = (torch.zeros(6, 8, requires_grad=True), torch.zeros(50, 8, requires_grad=True))
    logprob, entropy = linear_logprob_triton(
        hidden,
        weight,
        torch.zeros(6, dtype=torch.int64),
        temperature=torch.ones(6),
        banned_ids=torch.zeros(50, dtype=torch.bool),
        **options,
    )
    (logprob.sum() + options.get("bonus", 0.0) * entropy.sum()).backward()


CALLS: dict[str, Callable[[], None]] = {
    "sample": drawn,
    "sample, training's bits": lambda: drawn(bitwise_logprobs=True),
    "sample, truncated": lambda: drawn(top_k=5, top_p=0.9, min_p=torch.zeros(6)),
    "ppo": lambda: loss(GrpoLossConfig(entropy_coef=0.1, rollout_ratio_cap=2.0, ratio_cap=3.0)),
    "gspo": lambda: loss(GrpoLossConfig(loss="gspo", kl="k2", greedy_tokens="is_pi")),
    "cispo": lambda: loss(GrpoLossConfig(loss="cispo", kl="k1", greedy_tokens="exclude")),
    "soft": lambda: loss(GrpoLossConfig(greedy_tokens="soft", kl_times_ratio=True)),
    "linear": head,
    "linear, kept tiles": lambda: head(backward="kept_tiles"),
    "linear, known gradient": lambda: head(logprob_gradient=torch.ones(6)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_op_waits_for_the_device(
    call: Callable[[], None], no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THYME_VALIDATE", raising=False)
    with torch.device("meta"):
        call()
    monkeypatch.setenv("THYME_VALIDATE", "1")
    with torch.device("meta"), pytest.raises(LOOKED):
        call()


def test_when_values_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = torch.tensor([2.0]), torch.empty(1, device="meta")
    for setting, on_a_device in ((None, False), ("0", False), ("1", True)):
        if setting is None:
            monkeypatch.delenv("THYME_VALIDATE", raising=False)
        else:
            monkeypatch.setenv("THYME_VALIDATE", setting)
        assert values_visible(here)
        assert values_visible(elsewhere) == on_a_device
        with pytest.raises(ValueError, match=r"x must be in \[0.0, 1.0\], got 2.0 \(nats\)"):
            check_range("x", here, 0.0, 1.0, what=" (nats)")
    with pytest.raises(LOOKED):
        check_range("x", elsewhere, 0.0, 1.0)


def test_the_device_of_the_first_tensor_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever device the tensors are on."""
    current = ["cuda:0"]

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(str(of))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)

    @on_its_device
    def launch(*args: Any, **kwargs: Any) -> str:
        return current[-1]

    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(3, device="cuda:1")
    assert launch(there) == launch(2, there) == launch(x=there) == "cuda:1"
    assert launch(torch.zeros(3), there) == launch(3) == "cuda:0"


@pytest.mark.parametrize(
    "op",
    [
        "sample",
        "grpo_loss",
        "linear_logprob",
        "linear_grpo_loss",
        "token_logprobs",
        "paged_attention",
        "mrope_write_kv",
        "mrope",
        "rmsnorm",
        "add_rmsnorm",
        "swiglu",
    ],
)  # each with its Triton form
def test_every_op_launches_on_the_device_of_its_tensors(op: str) -> None:
    homes = {"mrope_write_kv": "kv_cache", "add_rmsnorm": "rmsnorm"}
    module = importlib.import_module(f"thyme.kernels.{homes.get(op, op)}")
    for name in (op, f"{op}_triton"):
        code = {cell.cell_contents for cell in getattr(module, name).__closure__ or () if callable(cell.cell_contents)}
        assert code, f"{name} does not go through on_its_device"
