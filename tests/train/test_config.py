"""Configs refuse what makes no sense and say which field it is."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.toy.config import BaseStageConfig
from thyme.train.config import AnnealConfig, LossConfig, RlConfig, SftConfig, StageConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(steps=0), "StageConfig.steps: 0 must be at least 1"),
        (lambda: StageConfig(learning_rate=0.0), "learning_rate: 0.0 must be positive"),
        (lambda: StageConfig(decay_share=1.5), r"decay_share: 1.5 must be in \[0, 1\]"),
        (lambda: SftConfig(optimizer="sgd"), "SftConfig.optimizer: 'sgd' must be one of 'muon', 'adamw'"),  # type: ignore[arg-type]
        (lambda: SftConfig(loss_rule="last"), "'paper', 'code', 'all'"),  # type: ignore[arg-type]
        (lambda: BaseStageConfig(steps=100, max_steps=50), r"max_steps: 50 must be at least steps \(100\)"),
        (lambda: AnnealConfig(gate_accuracy=2.0), "gate_accuracy"),
        (lambda: RlConfig(greedy_tokens="never"), "'raw', 'exclude', 'is_pi', 'soft'"),  # type: ignore[arg-type]
        (lambda: RlConfig(kl_coef=-1.0), "RlConfig.kl_coef: -1.0 must be at least 0"),
        (lambda: LossConfig(loss="reinforce"), "'ppo', 'gspo', 'gspo_token', 'cispo'"),  # type: ignore[arg-type]
        (lambda: LossConfig(kl="k4"), "'k1', 'k2', 'k3'"),  # type: ignore[arg-type]
        (lambda: LossConfig(clip_eps_low=-0.1), "clip_eps_low: -0.1 must be finite and at least 0"),
        (lambda: LossConfig(entropy_coef=float("nan")), "entropy_coef: nan must be finite"),
        (lambda: LossConfig(rollout_ratio_cap=0.0), "rollout_ratio_cap: 0.0 must be finite and positive, or none"),
        (lambda: LossConfig(ratio_cap=1.1), r"ratio_cap: 1.1 must be at least 1 \+ clip_eps_high \(1.2\)"),
        (lambda: LossConfig(loss="cispo", ratio_cap=3.0), "ratio_cap: 3.0 must be none where loss is 'cispo'"),
    ],
)
def test_bad_values(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_config_module_imports_the_standard_library_only() -> None:
    code = "import sys, thyme.train.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_loss_table_and_the_loss_itself_cannot_drift_apart() -> None:
    """Every field of the loss can be said in a recipe, once, under its own name, type and default."""
    table = {f.name: f for f in dataclasses.fields(LossConfig)}
    top = {name: f for f in dataclasses.fields(RlConfig) if (name := f.name) in ("kl_coef", "greedy_tokens")}
    loss = {f.name: f for f in dataclasses.fields(GrpoLossConfig)}
    assert not table.keys() & top.keys()
    assert table.keys() | top.keys() == loss.keys()
    said = typing.get_type_hints(LossConfig) | {name: typing.get_type_hints(RlConfig)[name] for name in top}
    assert said == typing.get_type_hints(GrpoLossConfig)
    assert {name: f.default for name, f in (table | top).items()} == {name: f.default for name, f in loss.items()}
