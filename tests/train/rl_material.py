"""What the tests of RL share: a loop on the tiny model, rollouts by hand, rewards that spread."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from thyme.engine import Engine, EngineConfig
from thyme.engine.tags import TokenKind
from thyme.model import Model
from thyme.rewards import Reward
from thyme.rollout import RolloutConfig, RolloutLoop
from thyme.rollout.types import Rollout, RolloutStatus, Turn
from thyme.sandbox import Sandbox, SandboxResult
from thyme.toy.scenarios import questions
from thyme.train.group_scores import ScoredGroup

ROLLOUT = RolloutConfig(prompt_style="short", group_size=2, max_tokens_per_round=40, max_tokens=64, max_rounds=1)


def by_index(rollout: Rollout) -> Reward:
    """Every group has a spread, whatever was written."""
    return Reward(total=float(rollout.index), result=float(rollout.index), consistency=0.0, formatting=0.0)


def make_loop(model: Model, sandbox: Sandbox, speculation: Literal["off", "greedy", "all"] = "off") -> RolloutLoop:
    assert model.processor is not None
    config = EngineConfig(
        num_blocks=64,
        max_sequences=8,
        max_batch_tokens=512,
        deterministic=True,
        quiet=True,
        speculation=speculation,
    )
    return RolloutLoop(Engine(model, config), sandbox, model.processor, ROLLOUT)


def hand_rollout(
    temperatures: Sequence[float] = (1.0, 0.0), result: SandboxResult | None = None, **values: object
) -> Rollout:
    """Two given tokens, then one sampled token for each temperature; greedy ones are code."""
    n = len(temperatures)
    sampled = np.asarray([False, False] + [True] * n)
    warm = np.asarray([0.0, 0.0, *temperatures], dtype=np.float32)
    greedy = sampled & (warm == 0)
    fields: dict[str, object] = dict(
        question=questions(0, 1, {"arithmetic": 1.0})[0],
        group=0,
        index=0,
        seed=0,
        token_ids=np.arange(5, 7 + n),
        kinds=np.where(greedy, TokenKind.CODE, TokenKind.TEXT).astype(np.uint8),
        rounds=np.zeros(2 + n, dtype=np.int16),
        sampled=sampled,
        temperatures=warm,
        logprobs=np.where(sampled & ~greedy, -0.5, 0.0).astype(np.float32),
        logprobs_raw=np.where(sampled, -0.75, 0.0).astype(np.float32),
        entropies=np.zeros(2 + n, dtype=np.float32),
        weight_versions=np.where(sampled, 0, -1).astype(np.int32),
        images=[],
        turns=[Turn(text="x", code=None if result is None else "y", result=result, output_text="", num_images=0)],
        text="x",
        answer=None,
        status=RolloutStatus.ANSWERED,
    )
    return Rollout(**(fields | values))  # type: ignore[arg-type]


def scored_as(*rewards: Reward) -> ScoredGroup:
    return ScoredGroup(rollouts=[hand_rollout() for _ in rewards], rewards=list(rewards))


def group_of(*rollouts: Rollout, totals: Sequence[float]) -> ScoredGroup:
    rewards = [Reward(total=total, result=0.0, consistency=0.0, formatting=0.0) for total in totals]
    return ScoredGroup(rollouts=list(rollouts), rewards=rewards)
