"""Profile steps of RL, rollouts and updates: a trace for Perfetto, a record of each engine step, ops, a verdict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thyme.result import Result
from thyme.verbs import rl
from thyme.verbs.profile import ProfileKeys, refuse_without_gpu

if TYPE_CHECKING:
    from thyme.profile.parts import Training
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(ProfileKeys, rl.Config):
    """Steps as `thyme rl` takes them, without its checkpoints: the model that comes out is not kept."""

    name: str = "profile"

    def __post_init__(self) -> None:
        rl.Config.__post_init__(self)
        self.check()


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    size = config.rollout.group_size
    yield f"steps of {config.rl.batch_size} questions, {size} rollouts each: {', '.join(config.passes())}"


def run(config: Config) -> Result:
    """Trains a few steps, writes runs/<name>/trace/, and prints the verdict."""
    from thyme.rewards.opening import open_scorer
    from thyme.train.rl import train_rl
    from thyme.verbs.folders import run_dir
    from thyme.verbs.kv_size import beside_training
    from thyme.verbs.live_line import rate_line
    from thyme.verbs.opening import adapted, open_loop, open_model
    from thyme.verbs.profile import Profiler, frame_of
    from thyme.verbs.rows import prepared_questions, require_training_rows

    require_training_rows(config)
    refuse_without_gpu(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("profile train: one process only: start it without torchrun")
    folder, opened = run_dir(config), adapted(open_model(config), config)
    engine = beside_training(config.engine, opened.model, config.rl, config.lora)
    with (
        prepared_questions(config, opened) as questions,
        open_loop(replace(config, engine=engine), opened) as loop,
        open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
        rate_line("profile train") as tell,
        Profiler(config, loop, folder, tell) as profiler,
    ):
        settings = replace(config.rl, steps=profiler.num_steps, epochs=0, save_steps=0)
        train_rl(
            opened.model,
            opened.processor,
            loop,
            questions.stream,
            settings,
            scorer=scorer,
            seed=config.seed,
            on_step=profiler.advance,
        )
        frame = frame_of("profile train", config, loop)
    print(profiler.write(f"RL of {config.model}", frame, _trained(config, opened)), end="")
    print(f"\ntrace for ui.perfetto.dev: {profiler.folder / 'trace.json'}; this page: {profiler.folder / 'verdict.md'}")
    return profiler.result()


def _trained(config: Config, opened: Opened) -> Training:
    """What a step trains."""
    from thyme.profile.parts import Training
    from thyme.train.trainable import frozen_parts

    model = opened.model
    frozen = {id(p) for part in frozen_parts(model, config.rl) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    tower = [] if model.visual is None else list(model.visual.parameters())
    return Training(
        numbers=sum(p.numel() for p in trained),
        is_whole=config.lora.rank == 0,
        with_pictures=config.lora.rank == 0 and any(id(p) not in frozen for p in tower),
    )
