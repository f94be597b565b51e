"""Every variant of the loss, reached from the recipe's table `rl.loss`."""

import copy
import tomllib
from typing import Any

import pytest

from tests.train.rl_material import by_index, make_loop
from thyme.cli import main
from thyme.data.streams import endless
from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model import Model, Processor
from thyme.rewards import RuleScorer
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox
from thyme.train.config import LossConfig, RlConfig
from thyme.train.policy_update import loss_of
from thyme.train.rl import train_rl

EVERYTHING: dict[str, Any] = {
    "loss": "gspo_token",
    "clip_eps_low": 0.1,
    "clip_eps_high": 0.3,
    "ratio_cap": 4.0,
    "kl": "k2",
    "kl_times_ratio": True,
    "entropy_coef": 0.01,
    "rollout_ratio_cap": 2.0,
}


def test_every_key_reaches_the_loss() -> None:
    config = RlConfig(kl_coef=0.5, greedy_tokens="is_pi", loss=LossConfig(**EVERYTHING))
    assert loss_of(config) == GrpoLossConfig(kl_coef=0.5, greedy_tokens="is_pi", **EVERYTHING)


def test_every_key_can_be_said_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = [word for key, value in EVERYTHING.items() for word in (f"--rl.loss.{key}", str(value).lower())]
    main(["rl", "demo", *said, "--dry-run"])
    assert tomllib.loads(capsys.readouterr().out)["rl"]["loss"] == EVERYTHING


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["--rl.loss.loss", "reinforce"], "'reinforce' is not one of"),
        (["--rl.loss.ratio-cap", "1"], "ratio_cap: 1.0 must be at least"),
        (["--rl.loss.entropy", "1"], "did you mean --rl.loss.entropy-coef"),
        (
            ["--rl.loss.rollout-ratio-cap", "2", "--rollout.repetition-penalty", "1.1"],
            "rl.loss.rollout_ratio_cap compares with",
        ),
        (
            ["--rl.mismatch.mask", "token", "--rollout.repetition-penalty", "1.1"],
            "rl.mismatch.mask compares with",
        ),
        (["--rl.fused-head", "true", "--rollout.top-p", "0.9"], "rl.fused_head: the fused LM head has no logits to"),
    ],
)
def test_what_no_loss_can_be_is_refused_before_anything_is_loaded(
    said: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["rl", "demo", "--model", "no-such-folder", *said])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "table",
    [
        {"loss": "gspo"},
        {"loss": "gspo_token"},
        {"loss": "cispo"},
        {"kl": "k2", "kl_times_ratio": True, "ratio_cap": 3.0},
        {"entropy_coef": 0.01},
        {"rollout_ratio_cap": 2.0},
    ],
    ids=lambda table: "_".join(map(str, table.values())),
)
@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_every_variant_trains(
    table: dict[str, Any],
    fused_head: bool,
    taught: Model,
    processor: Processor,
    sandbox: Sandbox,
    asked: list[Question],
) -> None:
    model = copy.deepcopy(taught)
    config = RlConfig(
        steps=1, batch_size=2, learning_rate=1e-3, fused_head=fused_head, record_steps=0, loss=LossConfig(**table)
    )
    (metrics,) = train_rl(
        model, processor, make_loop(model, sandbox), endless(asked), config, scorer=RuleScorer(by_index)
    )
    assert metrics["optim/skipped"] == 0.0 and metrics["optim/grad_norm"] > 0
    assert metrics["actor/ratio"] == 1.0
