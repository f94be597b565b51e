"""Profile rollouts with their rewards: a trace for Perfetto, a record of each engine step, ops, a page of verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from thyme.result import Result
from thyme.verbs import rollout
from thyme.verbs.profile import ProfileKeys, refuse_without_gpu


@dataclass(frozen=True, kw_only=True)
class Config(ProfileKeys, rollout.Config):
    """Steps of rollouts of `count` questions each, those of `data.train` or the toy world's."""

    name: str = "profile"

    def __post_init__(self) -> None:
        rollout.Config.__post_init__(self)
        self.check()


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    yield f"steps of {config.count} questions, {config.rollout.group_size} rollouts each: {', '.join(config.passes())}"


def run(config: Config) -> Result:
    """Samples, writes runs/<name>/trace/, and prints the verdict."""
    from thyme import trace
    from thyme.rewards.opening import open_scorer
    from thyme.train.distributed import World
    from thyme.train.rl import ask_round
    from thyme.train.rl_metrics import Laps
    from thyme.verbs.folders import run_dir
    from thyme.verbs.live_line import rate_line
    from thyme.verbs.opening import open_loop, open_model
    from thyme.verbs.profile import Profiler, frame_of
    from thyme.verbs.rows import prepared_questions, require_rows

    require_rows(config, "train")
    refuse_without_gpu(config)
    with run_dir(config) as folder:
        opened = open_model(config)
        once = replace(config, data=replace(config.data, ahead_steps=0))
        with (
            prepared_questions(once, opened) as questions,
            open_loop(config, opened) as loop,
            open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
            rate_line("profile rollout") as tell,
            Profiler(config, opened.model, folder, loop.engine, tell) as profiler,
        ):
            for step in range(profiler.num_steps):
                asked = questions.stream(step * config.count, config.count)
                with trace.span("steps", f"step {step}"):
                    ask_round(loop, scorer, Laps(), World(), asked, config.seed * 1_000_003 + step)
                profiler.advance()
            frame = frame_of("profile rollout", config, opened.model, loop.engine)
        print(profiler.write(f"Rollouts of {config.model}", frame), end="")
    print(f"\ntrace for ui.perfetto.dev: {profiler.folder / 'trace.json'}; this page: {profiler.folder / 'verdict.md'}")
    return profiler.result()
