"""The protocol behind the paper's figures: what gave no answer is drawn again, and at last answered without tools.

Thyme's evaluation (its branch of VLMEvalKit, `max_iterations` and `max_retry`) draws up to five generations of up to
five rounds each, the first greedily. A generation has failed when no answer came of it. A call that returned neither a
picture nor text is not shown to the model: that round is drawn again, which greedily gives the same code until the
rounds are used up, so here it has failed with its first such call. Then the bare question is asked without tools, and
whatever comes is the answer.

The released code sets the temperature of its retries to 1 and leaves `top_k` at 1, so that they draw what the first
generation drew; `retries=0` is what it amounts to. Here they are drawn at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thyme.evals.benchmarks.answers import Answered
from thyme.rollout.prompts import boxed_or_all
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Rollout

ROUNDS = 5
"""Decoded rounds of a generation."""
TEMPERATURE = 1.0
"""Of the retries, in text and in code."""
PROTOCOL_COLUMN = "paper's protocol: by retry / without tools"
"""Of tables that show `ProtocolFigures`."""
_SEEDS = 1 << 32
"""Between the seeds of two generations, so that no other evaluation's seed gives the same draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolFigures:
    """What the protocol did on some rows."""

    retries: int
    """How often a row may be drawn again."""
    from_retry: int
    """Rows whose answer is a retry's."""
    from_fallback: int
    """Rows answered without tools, as every generation had failed."""

    def shown(self) -> str:
        """The counts, as tables show them."""
        return f"{self.from_retry} / {self.from_fallback}"

    def told(self) -> str:
        """The same in words, for a line of print."""
        return (
            f"by the paper's protocol ({self.retries} retries, then without tools): {self.from_retry} answers of a "
            f"retry, {self.from_fallback} without tools"
        )


@dataclass(frozen=True, slots=True)
class PaperProtocol:
    """How a question is asked until there is an answer: once, `retries` times more, and without tools."""

    retries: int

    @property
    def attempts(self) -> int:
        """The most that is drawn of a question."""
        return self.retries + 2

    def is_fallback(self, attempt: int) -> bool:
        """Whether attempt `attempt`, from 0, is the one without tools."""
        return attempt == self.retries + 1

    def of(self, attempt: int, loop: RolloutLoop, sampling: Sampling) -> tuple[RolloutLoop, Sampling]:
        """What runs an attempt, and how it is drawn.

        Args:
            attempt: from 0.
            loop: of the first attempt.
            sampling: of the first attempt.
        """
        sampling = replace(sampling, seed=sampling.seed + _SEEDS * attempt)
        if self.is_fallback(attempt):
            style = "direct" if loop.config.prompt_style == "thyme" else loop.config.prompt_style
            config = replace(loop.config, prompt_style=style)
            return RolloutLoop(loop.engine, loop.sandbox, loop.processor, config), replace(sampling, allow_code=False)
        if attempt:
            sampling = replace(sampling, temperature=TEMPERATURE, code_temperature=TEMPERATURE, phases={})
        return loop, sampling

    def ended(self, rollout: Rollout, attempt: int) -> Rollout:
        """The rollout; without tools all that was said is its answer, where no part of it is marked as one."""
        if rollout.answer is None and self.is_fallback(attempt):
            return replace(rollout, answer=boxed_or_all(rollout.text))
        return rollout

    def has_failed(self, rollout: Rollout, attempt: int) -> bool:
        """Whether the question is to be asked once more."""
        if self.is_fallback(attempt):
            return False
        in_vain = any(
            turn.result.status.name != "OK" or not (turn.result.images or turn.result.stdout.strip())
            for turn in rollout.turns
            if turn.result is not None
        )
        return rollout.answer is None or len(rollout.turns) > ROUNDS or in_vain

    def figures(self, answered: Sequence[Answered]) -> ProtocolFigures:
        """Where the answers come from."""
        fallback = sum(self.is_fallback(one.attempt) for one in answered)
        retried = sum(one.attempt > 0 for one in answered) - fallback
        return ProtocolFigures(retries=self.retries, from_retry=retried, from_fallback=fallback)
