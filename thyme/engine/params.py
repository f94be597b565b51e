"""What a request says: the prompt, and how tokens are drawn and when to stop. Standard library only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from thyme.engine.phases import Phases, PhaseSampling, check_limits, truncates

_INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a sequence begins with."""

    token_ids: Sequence[int] | str
    """Ids, or trusted text (special tokens in it become tokens). An image has one image id, or all its ids already."""
    images: Sequence[Any] = ()
    """PIL images or ImageInputs, in the order of their image ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a round ends. Nothing here is ever taken from a checkpoint's generation_config."""

    n: int = 1
    """Sequences drawn from the prompt; they share its KV cache."""
    max_tokens: int = 2048
    """Tokens sampled in one round."""
    temperature: float = 1.0
    """Temperature of text; 0 is greedy."""
    code_temperature: float = 0.0
    """Temperature between `<code>` and `</code>` when adaptive (GRPO-ATS: 0). The token that completes `<code>` is
    drawn at `temperature`, the one that completes `</code>` at this one."""
    adaptive: bool = True
    """Switch temperatures inside code; off, every token is drawn as text is."""
    phases: Mapping[str, PhaseSampling] = field(default_factory=dict)
    """By name, the phases that have a temperature or a truncation of their own where adaptive. The engine is made with
    the phases there are (`thyme.engine.phases`)."""
    top_k: int | None = None
    """Draw among the k largest logits. Biases log-probs in RL."""
    top_p: float | None = None
    """Draw among the most probable ids that reach this mass. Biases log-probs in RL."""
    min_p: float | None = None
    """Draw among ids at least this probable, relative to the most probable. Biases log-probs in RL."""
    repetition_penalty: float = 1.0
    """Logits of ids already in the sequence are divided by it where positive, multiplied where negative (CTRL, Keskar
    et al. 2019); it changes every log-prob. 1 is off. Biases log-probs in RL."""
    seed: int | None = None
    """Seeds the draws; sequence i of n uses seed + i. None: drawn, and recorded in the sequence's params."""
    stop: tuple[str, ...] = ()
    """Texts that end the round as soon as they are complete; they are kept."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the round; they are kept."""
    stop_at_tags: bool = True
    """End the round when `</code>` closes a code block, at `</answer>`, and at a forged `<sandbox_output>`."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence id."""
    banned_ids: Literal["default"] | tuple[int, ...] = "default"
    """Ids with probability 0. "default": the processor's never_sampled_ids and the ids beyond the tokenizer's. A tuple:
    these, and the ids beyond the tokenizer's. Empty: none at all, which is what transformers does."""
    repetition: Literal["default"] | None = "default"
    """End a round that falls into a loop, as the engine's RepetitionConfig defines one; None: never."""

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"SamplingParams.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "code_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"SamplingParams.{name} must be finite and at least 0, got {value}")
        check_limits(self.top_k, self.top_p, self.min_p, "SamplingParams.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise ValueError(f"SamplingParams.repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.seed is not None and not -_INT64 <= self.seed <= _INT64 - self.n:
            raise ValueError(f"SamplingParams.seed + n must fit 64 bits, got seed {self.seed}, n {self.n}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"SamplingParams.stop must be a tuple of texts, none empty, got {self.stop!r}")
        if self.banned_ids != "default" and isinstance(self.banned_ids, str):
            raise ValueError(f"SamplingParams.banned_ids must be 'default' or a tuple of ids, got {self.banned_ids!r}")
        if self.repetition not in ("default", None):
            raise ValueError(f"SamplingParams.repetition must be 'default' or None, got {self.repetition!r}")

    @property
    def truncates(self) -> bool:
        """Top-k, top-p or min-p is on, in some phase at least."""
        own = self.phases.values() if self.adaptive else ()
        return truncates(self.top_k, self.top_p, self.min_p) or any(phase.truncates for phase in own)

    def by_phase(self, phases: Phases) -> list[tuple[float, int, float, float]]:
        """(temperature, top_k, top_p, min_p) of each phase, by number; a limit that is off is 0, 1, 0.

        Raises:
            ValueError: a phase that is not among `phases`.
        """
        phases.check_names(self.phases)
        text = PhaseSampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        if not self.adaptive:
            return phases.resolved({}, text, text)
        return phases.resolved(self.phases, text, PhaseSampling(temperature=self.code_temperature))

    @property
    def biases_logprobs(self) -> bool:
        """The log-probs that are reported are not the model's."""
        return self.repetition_penalty != 1.0
