"""Limits, prompt style and sampling of rollouts. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from thyme.limits import check_number, check_numbers
from thyme.rollout.phases import BUILT_IN, PhaseConfig, Phases, PhaseSampling, check_limits, phases_of, truncates
from thyme.rollout.prompts import PromptStyle
from thyme.rollout.sampling import Sampling
from thyme.rollout.tree import TreeConfig

Compat = Literal["none", "released"]

_DERIVED: Any = None
"""Stands in for a default that depends on another field until __post_init__ puts it in."""
_TOKENS_PER_ROUND = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How a question becomes rollouts: what ends one, what the model is told, how tokens are drawn."""

    max_rounds: int = 5
    """Code blocks run in one rollout; a further block ends it with MAX_ROUNDS (Thyme's evaluation runs 5 steps)."""
    max_images: int = 10
    """Images in one rollout, the question's own included; an output with more ends it with MAX_IMAGES (Thyme)."""
    max_tokens: int = 6144
    """Sampled tokens in one rollout over all its rounds; the last one ends it with LENGTH."""
    max_tokens_per_round: int = _DERIVED
    """Sampled tokens in one round; the last one ends the rollout with LENGTH. Left out: 2048 (as Thyme's evaluation),
    or max_tokens if that is less."""
    max_output_chars: int = 8192
    """Characters of printed output the model is shown; the rest is cut and counted in a marker."""
    group_size: int = 4
    """Rollouts per question (Thyme's RL stage: 4)."""
    prompt_style: PromptStyle = "thyme"
    """"thyme": the prompts the released checkpoints were trained on. "short": image and question alone (toy models).
    "direct": those with which Thyme's evaluation answers without tools."""
    compat: Compat = "none"
    """"released" words errors as Thyme's released sandbox does; "none" names type, message and line."""
    temperature: float = 1.0
    """Temperature of text (GRPO-ATS: 1)."""
    code_temperature: float = 0.0
    """Temperature inside a code block when `adaptive` (GRPO-ATS: 0, greedy)."""
    adaptive: bool = True
    """Switch to `code_temperature` inside code; off, every token is drawn as text is."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """By phase: text and code (the same as the two above), number and string (literals in code; left out: as code),
    answer and every declared phase (left out: as text)."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """Declared phases by name, with their tags; truncation of their own, also of code, number, string and answer."""
    top_k: int | None = None
    """Draw among this many most likely tokens; None: all. RL then trains what is drawn from, without `fused_head`."""
    top_p: float | None = None
    """Draw among the most likely tokens that hold this mass; None: all. In RL as `top_k`."""
    min_p: float | None = None
    """Draw among tokens at least this likely relative to the most likely one; None: all. In RL as `top_k`."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens already seen; 1 is off. Biases log-probs in RL."""
    max_in_flight: int | None = None
    """Rollouts open at once; None: as many as the sandbox keeps sessions, the most that can never wait in a circle."""
    tree: TreeConfig = field(default_factory=TreeConfig)
    """In training: groups in which some rollouts branch off others, at the start of a round."""
    result_delay_steps: int = 8
    """Under a deterministic engine a code result is admitted this many engine steps after its code ended (or when
    nothing else is left to decode), never earlier: the order is then the same in each run."""

    def __post_init__(self) -> None:
        check_numbers(self, "RolloutConfig")
        if self.max_tokens_per_round is None:
            object.__setattr__(self, "max_tokens_per_round", min(_TOKENS_PER_ROUND, self.max_tokens))
        for name in ("max_tokens", "max_tokens_per_round", "max_output_chars", "group_size", "result_delay_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("max_rounds", "max_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0")
        if self.max_tokens_per_round > self.max_tokens:
            raise ValueError(
                f"max_tokens_per_round: {self.max_tokens_per_round} cannot be reached with max_tokens = "
                f"{self.max_tokens}: lower it, or leave it out"
            )
        self._move("text", "temperature", 1.0)
        self._move("code", "code_temperature", 0.0)
        for name, phase in self.phases.items():
            if name == "text":
                raise ValueError("phases.text: what holds for text stands in rollout.top_k, top_p and min_p")
            if name in BUILT_IN and (phase.start or phase.end):
                raise ValueError(f"phases.{name}: a built-in phase has its own tags: leave start and end out")
            if name not in BUILT_IN and not (phase.start and phase.end):
                raise ValueError(f"phases.{name}: start and end, its tags, are missing")
        known = {name for name in self.known_phases.names if name not in ("text", "code")}
        for name in self.temperatures:
            if name not in known:
                raise ValueError(
                    f"temperatures.{name}: no such phase: text, code, {', '.join(sorted(known))} are known, and "
                    f"rollout.phases.{name} with its start and end declares one"
                )
            check_number(self.temperatures[name], f"temperatures.{name}")
            if not 0.0 <= self.temperatures[name] < float("inf"):
                raise ValueError(f"temperatures.{name}: {self.temperatures[name]} must be finite and at least 0")
        self.sampling()  # checks the temperatures
        check_limits(self.top_k, self.top_p, self.min_p)
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty: {self.repetition_penalty} must be positive and finite")
        if self.tree.trunks and self.tree.trunks >= self.group_size:
            raise ValueError(f"tree.trunks: {self.tree.trunks} must be fewer than group_size ({self.group_size}), or 0")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max_in_flight: {self.max_in_flight} must be at least 1, or absent")
        for name, allowed in (("prompt_style", get_args(PromptStyle)), ("compat", get_args(Compat))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be one of {', '.join(allowed)}")

    def _move(self, name: str, key: str, default: float) -> None:
        """`temperatures` says the field `key` too: it is kept there alone."""
        if name not in self.temperatures:
            return
        said = self.temperatures[name]
        if getattr(self, key) not in (default, said):
            raise ValueError(
                f"temperatures.{name}: {said}, but {key} is {getattr(self, key)}: they are the same, say one of them"
            )
        object.__setattr__(self, key, said)
        object.__setattr__(self, "temperatures", {n: t for n, t in self.temperatures.items() if n != name})

    @property
    def known_phases(self) -> Phases:
        """The phases that an engine must tell apart to draw these rollouts."""
        return phases_of(self.phases, {*self.phases, *self.temperatures})

    @property
    def phase_names(self) -> dict[int, str]:
        """By number, the phases that metrics tell apart; none where only text and code are drawn in their own ways."""
        if not self.adaptive or not {*self.phases, *self.temperatures}:
            return {}
        known = self.known_phases
        literals = () if known.literals else ("number", "string")
        return {number: name for number, name in enumerate(known.names) if name not in literals}

    def sampling(self, **changes: Any) -> Sampling:
        """How this config draws rollouts: `group_size` per question, seed 0. `changes` replace fields of `Sampling`."""
        drawn: dict[str, Any] = {
            "n": self.group_size,
            "temperature": self.temperature,
            "code_temperature": self.code_temperature,
            "adaptive": self.adaptive,
            "phases": {
                name: self.phases.get(name, PhaseConfig()).sampling(self.temperatures.get(name))
                for name in {**self.phases, **self.temperatures}
            },
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return Sampling(**drawn | changes)

    @property
    def truncates(self) -> bool:
        """Whether top_k, top_p or min_p is on, in some phase at least."""
        own = self.phases.values() if self.adaptive else ()
        return truncates(self.top_k, self.top_p, self.min_p) or any(phase.sampling().truncates for phase in own)

    def limits_by_phase(self) -> tuple[tuple[int, float, float], ...]:
        """(top_k, top_p, min_p) of each phase, by number; a limit that is off is 0, 1, 0."""
        text = PhaseSampling(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        own = self.sampling().phases if self.adaptive else {}
        found = self.known_phases.resolved(own, text, PhaseSampling())
        return tuple((top_k, top_p, min_p) for _, top_k, top_p, min_p in found)

    @property
    def biases_logprobs(self) -> bool:
        """Whether tokens are drawn from something else than the policy whose log-probs are recorded."""
        return self.repetition_penalty != 1.0
