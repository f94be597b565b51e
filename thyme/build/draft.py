"""What a writer gives: rounds of text and code, what came back, and all of it as one response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from thyme.build.scenarios import Assignment
from thyme.rollout.prompts import extract_answer, extract_code, until_answer

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """One round: what was said, its code, and what came of it."""

    said: str
    """Up to and with `</code>`, or to the end."""
    code: str | None
    ok: bool = True
    """Whether the code ran to its end."""
    stdout: str = ""
    error: str = ""
    images: tuple[Image.Image, ...] = ()
    output: str = ""
    """The span appended behind the code, `<sandbox_output>` tags included; "" where nothing was run."""


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A response that is not checked yet."""

    rounds: tuple[Ran, ...]

    @property
    def text(self) -> str:
        """The assistant's turn, `<image>` where a picture came back, up to its first `</answer>`."""
        return until_answer("".join(ran.said + ran.output for ran in self.rounds)).strip()

    @property
    def answer(self) -> str | None:
        """As rewards and evaluation read it."""
        return extract_answer(self.text)

    @property
    def prose(self) -> str:
        """What was said outside of code, without outputs."""
        return "\n".join(ran.said.partition("<code>")[0] for ran in self.rounds)

    @property
    def code(self) -> list[str]:
        """Every snippet that was run."""
        return [ran.code for ran in self.rounds if ran.code is not None]

    @property
    def images(self) -> list[Image.Image]:
        """What the code made, in order."""
        return [image for ran in self.rounds for image in ran.images]


class Writer(Protocol):
    """Writes demonstrations, and answers questions as the model under test."""

    async def write(self, assignment: Assignment) -> Draft:
        """A demonstration of a scenario.

        Raises:
            thyme.rewards.judge.JudgeUnavailable: nothing was written, and nothing is known of the row.
        """

    async def answers(self, assignment: Assignment, samples: int) -> Sequence[str | None]:
        """What the model itself answers to a row's question, so many times; None where it does not answer."""

    async def close(self) -> None:
        """Gives back what it holds."""


def split_at_code(said: str) -> tuple[str, str | None]:
    """A round's words up to the end of its first code block, and the code; (said, None) where there is none.

    Servers leave a stop text out of what they return: code that is not closed is taken as closed.
    """
    start = said.find("<code>")
    if start < 0:
        return said, None
    end = said.find("</code>", start)
    block = said[:end] if end >= 0 else said.rstrip()
    block += "</code>"
    return block, extract_code(block)
