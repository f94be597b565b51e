"""What a question and a finished rollout are: plain records, shared by rollout, rewards, data, training and reports.

A trajectory is a list of token ids with one entry per token for everything known about it; it is never decoded and
encoded again. Nothing here computes anything that needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thyme.engine.phases import ANSWER, CODE
from thyme.engine.tags import TokenKind
from thyme.pictures import upright

if TYPE_CHECKING:
    from PIL import Image

    from thyme.model.image_processor import ImageInputs
    from thyme.sandbox import SandboxResult


__all__ = ["Parent", "Question", "Rollout", "RolloutStatus", "TokenKind", "Turn"]


class RolloutStatus(Enum):
    """Why a rollout ended."""

    ANSWERED = "answered"
    """The model closed `</answer>`."""
    EOS_WITHOUT_ANSWER = "eos_without_answer"
    """The model ended its turn and never answered."""
    LENGTH = "length"
    """The token limit of a round or of the whole response was reached."""
    CONTEXT = "context"
    """The model's context, or the cache, is full."""
    MAX_ROUNDS = "max_rounds"
    """One more code execution than allowed was asked for."""
    MAX_IMAGES = "max_images"
    """The next sandbox output would carry more images than allowed."""
    REPETITION = "repetition"
    """The repetition detector fired."""
    FORGED = "forged"
    """The model wrote a sandbox tag itself."""
    ABORTED = "aborted"
    """Cancelled from outside."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """One question, with or without a picture, and the solution that rewards compare with."""

    id: str
    """Unique within its data set."""
    image: Image.Image | None
    """In any mode and its original size; turned upright here by its EXIF tag, so that sizes and crops mean the same to
    the model and its code. None for a text-only question."""
    image_path: str
    """The path the model is told and its code may open; "" without an image."""
    question: str
    """The bare question, without prompt template."""
    solution: str
    """The reference answer."""
    scenario: str = ""
    """What figures are told apart by: a scenario of the toy world, the name of a data set, or "" for nothing."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts about how the question was made: boxes in pixels, angle in degrees, ..."""
    more_images: tuple[tuple[str, Image.Image], ...] = ()
    """Pictures after the first, each behind the path the model is told for it; turned upright here too."""

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "image", upright(self.image))
        if self.more_images:
            if self.image is None:
                raise ValueError(f"question {self.id!r}: more_images without an image: the first picture is `image`")
            more = tuple((path, upright(picture)) for path, picture in self.more_images)
            object.__setattr__(self, "more_images", more)
            if len({path for path, _ in self.pictures}) <= len(more):
                raise ValueError(f"question {self.id!r}: two pictures under one path: each needs its own")

    @property
    def pictures(self) -> tuple[tuple[str, Image.Image], ...]:
        """Every picture behind its path, in order."""
        return () if self.image is None else ((self.image_path, self.image), *self.more_images)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(width, height) in original pixels, None without an image."""
        return None if self.image is None else (self.image.width, self.image.height)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """One round: what the model wrote and, if it closed a code block, what the sandbox sent back."""

    text: str
    """What the model wrote in this round, up to and including `</code>` or its end."""
    code: str | None
    """The snippet that was run, None if the round had none."""
    result: SandboxResult | None
    """None if nothing was run."""
    output_text: str
    """The text appended after the round, `<sandbox_output>` tags included, images as `<image>`; "" if nothing."""
    num_images: int
    """Images in `output_text`."""


@dataclass(frozen=True, slots=True)
class Parent:
    """Where a rollout branched off another one of its group."""

    index: int
    """Within the group, of the rollout that it branched off."""
    round: int
    """The first round of its own; tokens, turns and images before that round are those of the other."""
    session_seed: int
    """Seed of the sandbox session that both come from."""


@dataclass(slots=True, kw_only=True, eq=False)
class Rollout:
    """One finished trajectory. Every array has one entry per token of `token_ids`, prompt included, T in all."""

    question: Question
    group: int
    """Index of the question in its batch; rollouts with equal group form the group of GRPO."""
    index: int
    """Index within the group."""
    seed: int
    """Seed of the sampler for this rollout."""
    token_ids: NDArray[np.int64] = field(repr=False)
    """[T] image pads expanded, as sampled."""
    kinds: NDArray[np.uint8] = field(repr=False)
    """[T] TokenKind."""
    rounds: NDArray[np.int16] = field(repr=False)
    """[T] round the token belongs to, from 0; a sandbox output belongs to the round whose code made it."""
    sampled: NDArray[np.bool_] = field(repr=False)
    """[T] True where the policy drew the token: False for prompt, sandbox output and images."""
    temperatures: NDArray[np.float32] = field(repr=False)
    """[T] temperature used, 0 = greedy; 0 where not sampled."""
    logprobs: NDArray[np.float32] = field(repr=False)
    """[T] log-probability at the temperature used, over the ids that truncation kept; 0 where greedy or not sampled."""
    logprobs_raw: NDArray[np.float32] = field(repr=False)
    """[T] log-probability at temperature 1; 0 where not sampled."""
    entropies: NDArray[np.float32] = field(repr=False)
    """[T] entropy in nats at temperature 1 of the distribution the token was drawn from; 0 where not sampled."""
    weight_versions: NDArray[np.int32] = field(repr=False)
    """[T] version of the weights that drew the token; -1 where not sampled."""
    images: list[ImageInputs] = field(repr=False)
    """In order of appearance: the question's, then what the sandbox returned."""
    turns: list[Turn]
    text: str
    """The assistant text up to the first `</answer>`, image spans shown as `<image>`."""
    answer: str | None
    """extract_answer(text)."""
    status: RolloutStatus
    wall_s: float = 0.0
    """Seconds from admission to the end, waiting included."""
    sandbox_s: float = 0.0
    """Seconds of it in which the sandbox ran this rollout's code."""
    parent: Parent | None = None
    """None where it began at the prompt."""

    phases: NDArray[np.uint8] = field(repr=False, default_factory=lambda: np.empty(0, dtype=np.uint8))
    """[T] number of the phase it was drawn in (`thyme.engine.phases`); left out, as in records from before there were
    phases, what the kinds tell: code, answer, or text."""

    def __post_init__(self) -> None:
        if not len(self.phases):
            self.phases = np.zeros(len(self.kinds), dtype=np.uint8)
            self.phases[self.kinds == TokenKind.CODE] = CODE
            self.phases[self.kinds == TokenKind.ANSWER] = ANSWER

    @property
    def first_round(self) -> int:
        """The first round that it drew itself."""
        return 0 if self.parent is None else self.parent.round

    @property
    def session_seed(self) -> int:
        """Seed of its sandbox session."""
        return self.seed if self.parent is None else self.parent.session_seed

    @property
    def num_code(self) -> int:
        """Code blocks that were run."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def code_ok(self) -> bool:
        """True if every code block that was run ended OK (also true if none was)."""
        return all(turn.result is None or turn.result.status.name == "OK" for turn in self.turns)

    @property
    def num_sampled(self) -> int:
        """Tokens the policy drew, those of a parent included."""
        return int(self.sampled.sum())

    @property
    def num_drawn(self) -> int:
        """Tokens that were drawn for this rollout alone."""
        return int((self.sampled & (self.rounds >= self.first_round)).sum())
