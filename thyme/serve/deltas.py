"""What the engine's thread tells the front of a request: plain records."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from thyme.engine import Completion
from thyme.rollout.types import Rollout
from thyme.serve.errors import ApiError


@dataclass(frozen=True, slots=True)
class Drawn:
    """Some tokens as they were drawn."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """At the temperature used, over the ids that truncation kept."""
    logprobs_raw: Sequence[float] = ()
    """At temperature 1."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The request is in the engine. `prompt_ids`: of each prompt, images expanded."""

    prompt_ids: tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class End:
    """A choice is over."""

    finish_reason: str
    """OpenAI's word: stop, length or abort."""
    stop_reason: str | int | None
    """Ours."""
    completion: Completion | None = None
    """Of a choice without tools."""
    rollout: Rollout | None = None
    """Of one with tools."""


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice."""

    choice: int
    content: str = ""
    reasoning: str = ""
    """What the model wrote on its way to the answer, with code and outputs; only with tools."""
    drawn: Drawn = field(default_factory=Drawn)
    end: End | None = None

    def joined(self, after: "Delta") -> "Delta":
        """This one and the one after it, of the same choice, as one."""
        one, two = self.drawn, after.drawn
        drawn = Drawn(
            [*one.token_ids, *two.token_ids],
            [*one.logprobs, *two.logprobs],
            [*one.logprobs_raw, *two.logprobs_raw],
        )
        content, reasoning = self.content + after.content, self.reasoning + after.reasoning
        return Delta(self.choice, content, reasoning, drawn, after.end)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over without an answer."""

    error: ApiError


Event = Begun | Delta | Failed
