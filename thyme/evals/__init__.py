"""Evaluation: accuracy with intervals, overall and by scenario, and the controls beside it."""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.evals.config import EvalConfig as EvalConfig
    from thyme.evals.controls import NoCodeControl as NoCodeControl
    from thyme.evals.controls import no_code_control as no_code_control
    from thyme.evals.evaluation import EvalResult as EvalResult
    from thyme.evals.evaluation import evaluate as evaluate
    from thyme.evals.scoring import Summary as Summary
    from thyme.evals.scoring import Verdict as Verdict
    from thyme.evals.scoring import by_scorer as by_scorer
    from thyme.evals.scoring import chance as chance
    from thyme.evals.scoring import is_correct as is_correct
    from thyme.evals.scoring import summarize as summarize
    from thyme.evals.scoring import wilson as wilson
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "config": ["EvalConfig"],
            "controls": ["NoCodeControl", "no_code_control"],
            "evaluation": ["EvalResult", "evaluate"],
            "scoring": ["Summary", "Verdict", "by_scorer", "chance", "is_correct", "summarize", "wilson"],
        },
    )
