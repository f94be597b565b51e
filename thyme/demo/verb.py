"""Learn to write code, from random weights: base stage, weak SFT cold start, GRPO-ATS, evaluation, in minutes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from thyme.toy.config import Material
from thyme.verbs.recipe import Recipe
from thyme.verbs.rl import check_trainable


@dataclass(frozen=True, kw_only=True)
class Config(Recipe):
    """The demo: a recipe, and which story it tells."""

    name: str = "demo"
    compare: bool = False
    """Instead of the main curve, run the fragile cold start twice: ATS, and temperature 1 everywhere."""
    material: Material | None = None
    """What is on the signs and behind them: glyphs (drawn), digits (handwritten), photos; none: toy.material."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainable(self.rollout, self.rl)
        if self.lora.rank:
            raise ValueError(f"lora.rank: {self.lora.rank}, but the demo begins at random weights, which all must move")


def default_recipe(args: list[str]) -> str:
    """The shipped recipe that the arguments ask for."""
    return "compare" if "--compare" in args else "demo"


def run(config: Config) -> None:
    """Tells the story."""
    from thyme.demo.compare import run_compare
    from thyme.demo.story import run_demo

    (run_compare if config.compare else run_demo)(settled(config))


def settled(config: Config) -> Recipe:
    """The recipe that is run: the seed wherever something is drawn, the material in its place, a folder for each."""
    toy = config.toy
    if "toy.seed" not in config.origins:
        toy = replace(toy, seed=config.seed)
    if config.material is not None:
        toy = replace(toy, material=config.material)
    name = "compare" if config.compare and "name" not in config.origins else config.name
    values = {f.name: getattr(config, f.name) for f in fields(Recipe)}
    return Recipe(**values | {"toy": toy, "name": name})
