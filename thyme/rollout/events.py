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


class TextStream:
    """Cuts one round's growing text into pieces to show: up to a code block or an answer, never half a tag."""

    _TAGS = ("<code>", "<answer>")

    def __init__(self) -> None:
        self.text = ""
        self._shown = 0

    def feed(self, piece: str) -> str:
        """Takes more text, returns what may be shown now."""
        self.text += piece
        starts = [at for tag in self._TAGS if (at := self.text.find(tag)) >= 0]
        end = min(starts) if starts else len(self.text) - self._partial_tag()
        shown, self._shown = self.text[self._shown : end], max(self._shown, end)
        return shown

    def rest(self) -> str:
        """What was held back, for a round that ended with neither code nor an answer."""
        shown, self._shown = self.text[self._shown :], len(self.text)
        return shown

    def _partial_tag(self) -> int:
        return max(
            (n for tag in self._TAGS for n in range(1, len(tag)) if self.text.endswith(tag[:n])),
            default=0,
        )
