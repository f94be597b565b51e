"""Configs refuse what makes no sense and say which field it is."""

import subprocess
import sys

import pytest

from thyme.toy.config import BaseStageConfig
from thyme.train.config import AnnealConfig, RlConfig, SftConfig, StageConfig


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
    ],
)
def test_bad_values(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_config_module_imports_the_standard_library_only() -> None:
    code = "import sys, thyme.train.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
