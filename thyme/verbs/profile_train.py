"""Profile steps of RL (rollouts and updates) or of SFT: a trace for Perfetto, engine steps, ops, a page of verdict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from thyme.config import RARE
from thyme.result import Result
from thyme.verbs import rl, sft
from thyme.verbs.config import TrainingConfig
from thyme.verbs.profile import ProfileKeys, refuse_without_gpu

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.profile.parts import Training
    from thyme.verbs.opening import Opened
    from thyme.verbs.profile import Profiler


@dataclass(frozen=True, kw_only=True)
class Config(ProfileKeys, rl.Config, sft.Config):
    """Steps as `thyme rl` or `thyme sft` takes them, without checkpoints: the model that comes out is not kept."""

    name: str = "profile"
    stage: Literal["auto", "rl", "sft"] = field(default="auto", metadata=RARE)
    """Which stage; auto: sft where recipe and command line say something of `sft` and nothing of `rl`, else rl."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)  # what rl refuses sft may take
        self.check()

    def chosen(self) -> Literal["rl", "sft"]:
        """The stage that is profiled.

        Raises:
            ValueError: it is rl, with settings that nothing can be learned under.
        """
        said = {key.partition(".")[0] for key in self.origins}
        stage = self.stage if self.stage != "auto" else "sft" if "sft" in said and "rl" not in said else "rl"
        if stage == "rl":
            rl.check_trainable(self.rollout, self.rl)
        return stage


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    passes = ", ".join(config.passes())
    if config.chosen() == "sft":
        yield f"steps of {config.sft.batch_size} rows: {passes}"
    else:
        yield f"steps of {config.rl.batch_size} questions, {config.rollout.group_size} rollouts each: {passes}"


def run(config: Config) -> Result:
    """Trains a few steps, writes runs/<name>/trace/, and prints the verdict."""
    from thyme.verbs.folders import run_dir
    from thyme.verbs.opening import adapted, open_model
    from thyme.verbs.profile import frame_of
    from thyme.verbs.rows import require_training_rows

    stage = config.chosen()
    require_training_rows(config)
    refuse_without_gpu(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("profile train: one process only: start it without torchrun")
    with run_dir(config) as folder:
        opened = adapted(open_model(config), config)
        profiler = _of_rl(config, opened, folder) if stage == "rl" else _of_sft(config, opened, folder)
        frame = frame_of("profile train", config, opened.model, profiler.engine)
        print(profiler.write(f"{stage.upper()} of {config.model}", frame, _trained(config, opened, stage)), end="")
    print(f"\ntrace for ui.perfetto.dev: {profiler.folder / 'trace.json'}; this page: {profiler.folder / 'verdict.md'}")
    return profiler.result()


def _of_rl(config: Config, opened: Opened, folder: Path) -> Profiler:
    """Takes steps of RL under a profiler."""
    from thyme.rewards.opening import open_scorer
    from thyme.train.rl import train_rl
    from thyme.verbs.kv_size import beside_training
    from thyme.verbs.live_line import rate_line
    from thyme.verbs.opening import open_loop
    from thyme.verbs.profile import Profiler
    from thyme.verbs.rows import prepared_questions

    engine = beside_training(config.engine, opened.model, config.rl, config.lora)
    with (
        prepared_questions(config, opened) as questions,
        open_loop(replace(config, engine=engine), opened) as loop,
        open_scorer(config.reward, config.judge, max_tokens=config.rollout.max_tokens) as scorer,
        rate_line("profile train") as tell,
        Profiler(config, opened.model, folder, loop.engine, tell) as profiler,
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
    return profiler


def _of_sft(config: Config, opened: Opened, folder: Path) -> Profiler:
    """Takes steps of SFT under a profiler."""
    from thyme.verbs.profile import Profiler

    with Profiler(config, opened.model, folder) as profiler:
        settings = replace(config.sft, steps=profiler.num_steps, epochs=0, save_steps=0)
        sft.train(replace(config, sft=settings), opened, None, label="profile train", on_step=profiler.advance)
    return profiler


def _trained(config: Config, opened: Opened, stage: Literal["rl", "sft"]) -> Training:
    """What a step trains."""
    from thyme.profile.parts import Training
    from thyme.train.trainable import frozen_parts

    model = opened.model
    frozen = {id(p) for part in frozen_parts(model, getattr(config, stage)) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    tower = [] if model.visual is None else list(model.visual.parameters())
    return Training(
        numbers=sum(p.numel() for p in trained),
        is_whole=config.lora.rank == 0,
        with_pictures=config.lora.rank == 0 and any(id(p) not in frozen for p in tower),
        stage=stage,
    )
