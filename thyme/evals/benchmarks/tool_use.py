"""How tools were used: calls, those that ran, repairs, and failed ones that the next round mended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thyme.evals.benchmarks.answers import Answered


def tool_figures(answered: Sequence[Answered], samples: int) -> dict[str, Any]:
    """How tools were used, per question and sample."""
    n, calls = len(answered), sum(one.calls for one in answered)
    figures = {
        "calls": calls / n / samples,
        "with_calls": sum(one.calls > 0 for one in answered) / n,
        "calls_ok": sum(one.calls_ok for one in answered) / calls if calls else None,
        "calls_repaired": sum(one.repairs for one in answered) / calls if calls else None,
        "failed_mended": mending(answered)[1],
        "pictures": sum(one.pictures for one in answered) / n / samples,
        "rounds": sum(one.rounds for one in answered) / n,
        "tokens": sum(one.tokens for one in answered) / n,
        "ended": {status: sum(one.status == status for one in answered) for status in {one.status for one in answered}},
    }
    if samples > 1:
        figures[f"pass_at_{samples}"] = 100 * sum(one.best for one in answered) / n
        figures["majority"] = 100 * sum(one.majority for one in answered) / n
    return figures


def mending(answered: Sequence[Answered]) -> tuple[int, float | None]:
    """How many calls failed, and of which share of them, in percent, the next one ran; None where none failed."""
    failed = sum(one.calls - one.calls_ok for one in answered)
    return failed, 100 * sum(one.mended for one in answered) / failed if failed else None
