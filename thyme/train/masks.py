"""Which characters of an assistant response are trained.

The sandbox wrote `<sandbox_output>...</sandbox_output>`, not the model: neither the tags nor what stands
between them is ever trained, and no `<image>` placeholder is. Which part of the rest counts in a response
with several outputs is the rule:

* "paper": two or more outputs train only what follows the last one (as the Thyme paper, arXiv 2508.11630,
  describes it: only the final round);
* "code": two or more outputs train only what follows the second-to-last one, so the last code block and what
  the model makes of its result (what Thyme's released training code does);
* "all": every round is trained (for arithmetic rows, whose rounds are all exact).

With one output or none the three rules agree.
"""

import re
from typing import get_args

from thyme.train.config import LossRule

LOSS_RULES: tuple[LossRule, ...] = get_args(LossRule)

# An output that was never closed runs to the end of the text; a stray closing tag is the sandbox's as well.
_NOT_TRAINED = re.compile(r"<sandbox_output>.*?(?:</sandbox_output>|\Z)|</sandbox_output>|<image>", re.DOTALL)


def loss_spans(response: str, rule: LossRule) -> list[tuple[int, int]]:
    """Character spans `[start, end)` of `response` that are trained: ascending, disjoint, none empty.

    Args:
        response: the whole assistant turn after the prompt, with `<image>` where an image stands.
        rule: "paper", "code" or "all" (see the module).

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in LOSS_RULES:
        raise ValueError(f"loss rule is {rule!r}; it must be one of {', '.join(LOSS_RULES)}")
    gaps = [match.span() for match in _NOT_TRAINED.finditer(response)]
    outputs = [gap for gap in gaps if response.startswith("<sandbox_output>", gap[0])]
    first = 0
    if len(outputs) >= 2 and rule != "all":
        first = outputs[-1 if rule == "paper" else -2][1]
    spans = []
    start = first
    for gap_start, gap_end in gaps:
        if gap_end <= first:
            continue
        spans.append((start, gap_start))
        start = gap_end
    spans.append((start, len(response)))
    return [(start, end) for start, end in spans if start < end]
