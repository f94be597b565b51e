"""Measure held-out accuracy with 95 % intervals, overall and by scenario."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thyme.evals.config import EvalConfig
from thyme.verbs.config import LoopConfig, ToyRunConfig

if TYPE_CHECKING:
    from thyme.evals import EvalResult
    from thyme.rollout.types import Question
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(LoopConfig, ToyRunConfig):
    """An evaluation on the toy world's held-out questions."""

    name: str = "eval"
    eval: EvalConfig = field(default_factory=EvalConfig)


def run(config: Config) -> None:
    """Evaluates, prints the figures and writes eval.json."""
    from thyme.verbs.folders import run_dir
    from thyme.verbs.opening import open_model

    folder = run_dir(config)
    result = measure(config, open_model(config))
    (folder / "eval.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    for name, summary in [*result.scenarios.items(), ("all", result.overall)]:
        code = "no code" if summary.code_ok is None else f"code {summary.code_share:.0%}, ok {summary.code_ok:.0%}"
        interval = f"[{summary.low:.1%}, {summary.high:.1%}]"
        print(f"{name:<12} n {summary.n:>4}   accuracy {summary.accuracy:6.1%} {interval:<17} {code}")
    print(f"figures: {folder}/eval.json")


def measure(config: Config, opened: Opened) -> EvalResult:
    """Held-out accuracy of the model."""
    from thyme.evals import evaluate
    from thyme.verbs.opening import open_loop

    with open_loop(config, opened) as loop:
        sampling = loop.config.sampling(
            n=config.eval.samples,
            temperature=config.eval.temperature,
            code_temperature=config.eval.code_temperature,
            seed=config.eval.seed,
        )
        return evaluate(loop, heldout_questions(config), sampling)


def heldout_questions(config: Config) -> list[Question]:
    """The questions of the evaluation; none of them is trained on."""
    from thyme.toy.streams import question_stream

    return list(question_stream(config.toy, "heldout")(0, config.eval.num_questions))
