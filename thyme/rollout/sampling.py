"""How the rollouts of one run are drawn, as one value. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from thyme.engine.params import SamplingParams
from thyme.engine.phases import PhaseSampling
from thyme.rollout.tree import TreeConfig

if TYPE_CHECKING:
    from thyme.model.processor import Processor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How many rollouts a question gets and how their tokens are drawn. `RolloutConfig.sampling` makes one."""

    n: int = 1
    """Rollouts per question."""
    temperature: float = 1.0
    """Temperature of text; 0 is greedy."""
    code_temperature: float = 0.0
    """Temperature inside a code block when `adaptive`; 0 is greedy."""
    adaptive: bool = True
    """Switch to `code_temperature` inside code; off, every token is drawn as text is."""
    phases: Mapping[str, PhaseSampling] = field(default_factory=dict)
    """By name, the phases that have a temperature or a truncation of their own where `adaptive`."""
    top_k: int | None = None
    """Draw among this many most likely tokens; None: all."""
    top_p: float | None = None
    """Draw among the most likely tokens that hold this mass; None: all."""
    min_p: float | None = None
    """Draw among tokens at least this likely relative to the most likely one; None: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens already seen; 1 is off."""
    seed: int = 0
    """Other seeds give other rollouts. What a rollout draws depends on this, the question's id and its index in the
    group alone, not on the batch around it."""
    allow_code: bool = True
    """False is the no-code control: no token that completes `<code>` can be drawn, and where the tokenizer spells the
    tag in several tokens the rollout ends with MAX_ROUNDS at the tag, unanswered."""
    tree: TreeConfig = field(default_factory=TreeConfig)
    """Whether some of the n branch off the others."""
    show_results: bool = True
    """False is the format-only control: code runs, but the model is shown that it had no output, whatever it had."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: {self.n} rollouts per question, must be at least 1")
        if self.tree.trunks >= self.n > 1:
            raise ValueError(f"tree.trunks: {self.tree.trunks} must be fewer than the {self.n} rollouts of a question")
        for name in ("temperature", "code_temperature"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be finite and at least 0")

    def greedy(self) -> Sampling:
        """The same with one rollout per question and temperature 0 everywhere: what evaluations report."""
        return replace(self, n=1, temperature=0.0, code_temperature=0.0, phases={}, tree=TreeConfig())

    def engine_params(self, processor: Processor, max_tokens: int) -> SamplingParams:
        """What the engine is told for a round of at most `max_tokens` tokens; n and seed are left to the caller."""
        stop: tuple[str, ...] = ()
        banned: tuple[int, ...] | None = None
        if not self.allow_code:
            stop = ("<code>",)
            # Every token that completes the tag alone, whatever follows the tag in it.
            completing = (i for i in range(processor.vocab_size) if b"<code>" in processor.token_bytes(i))
            banned = (*processor.never_sampled_ids, *completing)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            code_temperature=self.code_temperature,
            adaptive=self.adaptive,
            phases=self.phases,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=stop,
            banned_ids="default" if banned is None else banned,
        )
