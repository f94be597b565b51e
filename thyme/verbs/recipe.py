"""What a recipe may say: the tables of every verb that takes one. A verb reads those that its own Config has."""

from dataclasses import dataclass

from thyme.verbs import anneal, base, data_build, eval, rl, rollout, sft
from thyme.verbs.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe(base.Config, sft.Config, anneal.Config, rl.Config, rollout.Config, eval.Config, data_build.Config):
    """Every table a recipe may have."""

    name: str = "run"

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)  # what one verb refuses another may take
