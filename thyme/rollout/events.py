"""What happens in a rollout, as it happens: the events of `RolloutLoop.stream`."""

from dataclasses import dataclass

from thyme.rollout.types import Rollout
from thyme.sandbox import SandboxResult


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Some more of the model's own words; code blocks and the answer come as events of their own."""

    text: str


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A closed code block, about to be run."""

    code: str


@dataclass(frozen=True, slots=True)
class CodeResult:
    """What the sandbox returned and what the model is shown of it."""

    result: SandboxResult
    output_text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer the model gave."""

    answer: str


@dataclass(frozen=True, slots=True)
class End:
    """The rollout is over; always the last event of a rollout."""

    rollout: Rollout


Event = TextPiece | CodeBlock | CodeResult | Answer | End
