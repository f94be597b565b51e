"""Sample rollouts of training questions and write them with their rewards, as JSONL and images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thyme.verbs.config import ScoredConfig


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


def run(config: Config) -> None:
    """Samples, writes, and says where."""
    from thyme.rewards.opening import open_scorer
    from thyme.train.engine_mismatch import engine_mismatch
    from thyme.train.group_scores import GroupScores
    from thyme.train.rl import record
    from thyme.verbs.folders import run_dir
    from thyme.verbs.opening import open_loop, open_model
    from thyme.verbs.rows import prepared_questions, require_rows

    require_rows(config, "train")
    folder, opened = run_dir(config), open_model(config)
    once = replace(config, data=replace(config.data, ahead_steps=0))  # nothing is asked for a second time
    with (
        prepared_questions(once, opened) as questions,
        open_loop(config, opened) as loop,
        open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
    ):
        sampling = loop.config.sampling(seed=config.seed)
        scores = GroupScores(scorer, sampling.n)
        groups = scores.collect(loop.run(questions.stream(0, config.count), sampling, on_end=scores.ended))
    path = folder / "rollouts" / "step_0.jsonl"
    record(path, groups)
    print(f"{sum(len(group.rollouts) for group in groups)} rollouts of {len(groups)} questions: {path}")
    if "fp8" in (config.engine.weight_dtype, config.engine.kv_dtype):
        drawn = [rollout for group in groups for rollout in group.rollouts]
        print(engine_mismatch(opened.model, opened.processor, drawn, loop.config) or "nothing was drawn")
