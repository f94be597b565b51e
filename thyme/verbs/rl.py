"""Train by GRPO-ATS from a cold start: rollouts with code in the sandbox, rewards, updates of the policy, and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Unpack

from thyme.result import Result
from thyme.train.config import RlConfig
from thyme.verbs.config import TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.rewards import Reward
    from thyme.rollout.config import RolloutConfig
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.types import Rollout
    from thyme.train.metrics import Metrics
    from thyme.train.stage import RunOptions
    from thyme.verbs.opening import Opened

SHOWN = {
    "reward/mean": "reward",
    "rollout/code_share": "code",
    "sandbox/success_rate": "code ok",
    "perf/rollout_tok_per_s": "tok/s drawn",
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """GRPO-ATS on the questions of `data.train`, or the toy world's."""

    name: str = "rl"
    rl: RlConfig = field(default_factory=RlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainable(self.rollout, self.rl)


def check_trainable(rollout: RolloutConfig, rl: RlConfig) -> None:
    """Refuses, before a model is loaded, rollouts that nothing can be learned from.

    Raises:
        ValueError: groups of one; groups whose rollouts are all the same; greedy tokens under "soft"; a correction by
            log-probs that are not those of what was drawn.
    """
    greedy_code = rollout.adaptive and rollout.code_temperature == 0
    own = rollout.temperatures if rollout.adaptive else {}
    greedy_phase = next((name for name, temperature in own.items() if temperature == 0), None)
    if rollout.group_size < 2:
        raise ValueError(
            f"rollout.group_size: {rollout.group_size} must be at least 2 to train by: an advantage is what a rollout "
            "earned beyond the others of its question"
        )
    if rollout.temperature == 0 and (greedy_code or not rollout.adaptive) and not any(own.values()):
        raise ValueError(
            "rollout.temperature: 0 draws the same rollout for a whole group, whose advantages are all 0: raise it"
        )
    if rl.greedy_tokens == "soft" and (greedy_code or rollout.temperature == 0 or greedy_phase is not None):
        key = "code_temperature" if greedy_code else "temperature"
        if not greedy_code and rollout.temperature > 0:
            key = f"temperatures.{greedy_phase}"
        raise ValueError(
            f"rollout.{key}: 0, but rl.greedy_tokens is 'soft', the gradient of tokens drawn at a temperature "
            f"above 0: raise rollout.{key}, or say rl.greedy_tokens raw, exclude or is_pi"
        )
    corrects = "rl.mismatch.mask" if rl.mismatch.mask != "none" else "rl.loss.rollout_ratio_cap"
    if rollout.biases_logprobs and (rl.mismatch.mask != "none" or rl.loss.rollout_ratio_cap is not None):
        raise ValueError(
            f"{corrects} compares with the log-probs that the engine recorded, which are of penalized logits "
            "under rollout.repetition_penalty: turn one of the two off"
        )
    if rollout.truncates and rl.fused_head:
        raise ValueError(
            "rl.fused_head: the fused LM head has no logits to truncate, but rollout.top_k, top_p or min_p is on: "
            "say rl.fused_head false, or turn these off"
        )


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    from thyme.verbs.dry_run import described

    return described(config, "rl")


def run(config: Config) -> Result:
    """Trains and saves the model."""
    from thyme.verbs.kv_size import beside_training
    from thyme.verbs.opening import adapted, open_loop, open_model
    from thyme.verbs.rows import data_digest, require_training_rows
    from thyme.verbs.training_run import open_run

    require_training_rows(config)
    with open_run(config, "rl", config.distributed, data_digest=data_digest(config)) as run:
        opened = adapted(open_model(config, run.world.device), config)
        engine = beside_training(config.engine, opened.model, config.rl, config.lora, gpus=run.world.size)
        with open_loop(replace(config, engine=engine), opened) as loop:
            history = train(config, opened, loop, run.folder, **run.stage("rl"))
    return run.result("rl", history)


def train(
    config: Config,
    opened: Opened,
    loop: RolloutLoop,
    folder: Path,
    *,
    label: str | None = "rl",
    **options: Unpack[RunOptions],
) -> list[Metrics]:
    """GRPO-ATS, in place.

    Args:
        config: its tables `rl`, `data`, `toy`, `reward`, `judge`, `eval` and `track`, and the seed.
        opened: the model that the loop's engine runs.
        loop: makes the rollouts.
        folder: gets metrics.jsonl, rollouts/ and checkpoints/.
        label: of the progress line; None shows none.
        options: where the run stands.
    """
    from thyme.rewards.opening import open_scorer
    from thyme.train.rl import train_rl
    from thyme.verbs.rows import prepared_questions
    from thyme.verbs.training import stage_options, told, with_epochs

    with (
        prepared_questions(config, opened) as questions,
        open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
    ):
        settings = with_epochs(config.rl, questions.count)
        with told(config, folder, "rl", settings.steps, label, SHOWN, world=options.get("world")) as line:
            return train_rl(
                opened.model,
                opened.processor,
                loop,
                questions.stream,
                settings,
                scorer=scorer,
                seed=config.seed,
                **stage_options(config, opened, folder, line, loop, **options),
            )


def reward(rollout: Rollout) -> Reward:
    """The reward by rules alone, as the toy world's questions need no judge."""
    from thyme.rewards import RuleJudge, score

    return score(rollout, RuleJudge())
