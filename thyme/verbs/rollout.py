"""Sample rollouts of training questions and write them with their rewards, as JSONL and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thyme.progress import progress
from thyme.result import Result
from thyme.verbs.config import ScoredConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.types import Rollout
    from thyme.train.group_scores import ScoredGroup
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(ScoredConfig):
    """Rollouts of the questions of `data.train`, or the toy world's."""

    name: str = "rollout"
    count: int = 16
    """Questions; each gets rollout.group_size rollouts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"count: {self.count} must be at least 1")


def run(config: Config) -> Result:
    """Samples, writes, and says where."""
    from thyme.verbs.folders import run_dir
    from thyme.verbs.opening import open_model
    from thyme.verbs.rows import require_rows

    require_rows(config, "train")
    with run_dir(config) as folder:
        return _sampled(config, folder / "rollouts" / "step_0.jsonl", open_model(config))


def _sampled(config: Config, path: Path, opened: Opened) -> Result:
    from thyme.rewards.opening import open_scorer
    from thyme.train.engine_mismatch import engine_mismatch
    from thyme.train.group_scores import GroupScores
    from thyme.train.rl import record
    from thyme.verbs.live_line import roof_told
    from thyme.verbs.opening import open_loop
    from thyme.verbs.rows import prepared_questions

    once = replace(config, data=replace(config.data, ahead_steps=0))  # nothing is asked for a second time
    with (
        prepared_questions(once, opened) as questions,
        open_loop(config, opened) as loop,
        open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
        progress(config.count * config.rollout.group_size, "rollout", "rollout") as line,
    ):
        sampling = loop.config.sampling(seed=config.seed)
        scores = GroupScores(scorer, sampling.n)

        def on_end(rollout: Rollout) -> None:
            scores.ended(rollout)
            line.advance()

        try:
            with roof_told(loop.engine, line):
                rollouts = loop.run(questions.stream(0, config.count), sampling, on_end=on_end)
            groups = scores.collect(rollouts)
        except KeyboardInterrupt as error:
            record(path, groups := scores.so_far())
            error.add_note(f"{_said(groups)}, whole groups alone, are kept: {path}")
            raise
    record(path, groups)
    print(f"{_said(groups)}: {path}")
    print(spent(loop))
    mismatch = None
    if "fp8" in (config.engine.weight_dtype, config.engine.kv_dtype):
        drawn = [rollout for group in groups for rollout in group.rollouts]
        mismatch = engine_mismatch(opened.model, opened.processor, drawn, loop.config)
        print(mismatch or "nothing was drawn")
    counts = {"rollouts": sum(len(group.rollouts) for group in groups), "questions": len(groups)}
    return Result({"path": path, **counts, "timing": loop.timing, "mismatch": mismatch})


def spent(loop: RolloutLoop) -> str:
    """A line on the last run: throughput, how much of the sandbox's time was hidden, how much was computed twice, and
    what came of guessed tokens where there are any."""
    timing, unique = loop.timing, loop.engine.stats()["unique_tokens"]
    assert timing is not None
    rate = timing.sampled_tokens / timing.wall_s
    code = f"{timing.code_blocks} code blocks ran for {timing.sandbox_s:.1f} s, decoding waited {timing.idle_s:.1f} s"
    shared = f"{timing.prefilled_tokens / max(1, unique):.3f} given tokens computed for each there was"
    line = f"{timing.sampled_tokens:,} tokens in {timing.wall_s:.1f} s: {rate:,.0f} tok/s; {code}; {shared}"
    if loop.engine.speculation is None:
        return line
    accepted = f"{timing.accepted_tokens:,} of {timing.drafted_tokens:,} guessed tokens were drawn"
    return f"{line}; {timing.verifications:,} drafts verified, {accepted}"


def _said(groups: Sequence[ScoredGroup]) -> str:
    return f"{sum(len(group.rollouts) for group in groups)} rollouts of {len(groups)} questions"
