"""One rollout on its way, and what becomes of it at the end of each round and of each code block.

A flight decides and records; it starts nothing. Engine and sandbox are told by `thyme.rollout.scheduler`.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from thyme import trace
from thyme.engine import Completion
from thyme.engine import Sequence as EngineSequence
from thyme.engine.tags import TokenKind
from thyme.rollout.config import RolloutConfig
from thyme.rollout.output import Output
from thyme.rollout.prompts import extract_answer, extract_code, until_answer
from thyme.rollout.text_stream import TextStream
from thyme.rollout.trajectory import Trajectory
from thyme.rollout.types import Parent, Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import SandboxResult

CODE_START, CODE_END = "<code>", "</code>"


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One rollout that has not ended: its sequence in the engine, its token record, its rounds so far."""

    question: Question
    group: int
    index: int
    seed: int
    sequence: EngineSequence
    trajectory: Trajectory
    parent: Parent | None = None
    first_round: int = 0
    """The round that the engine's sequence has as its first: those before are in its prompt."""
    before: tuple[Turn, ...] = ()
    """Turns whose code its session, when it is opened, runs first: those of a parent."""
    stream: TextStream | None
    """The current round's text where it is shown as it is decoded, else None."""
    started: float = field(default_factory=time.perf_counter)
    turns: list[Turn] = field(default_factory=list)
    num_sampled: int = 0
    """Tokens sampled so far, over all rounds."""
    round_text: str = ""
    """Text of the round whose code is being run."""
    code: str = ""
    """That code."""
    future: Future[tuple[SandboxResult, Output]] | None = None
    """Its result, None when no code is being run."""
    due_step: int = 0
    """Engine step before which a deterministic run does not admit the result."""
    marks: list[int] = field(default_factory=lambda: [trace.now()])
    """When it began, and when each part of it ended that is in the trace."""

    def end_round(self, completion: Completion, text: str, max_rounds: int) -> RolloutStatus | None:
        """Records a round that has ended, with its text.

        Returns:
            Why the rollout is over; None if the round closed a code block that may be run, which is then in `code`.
        """
        self.trajectory.add_round(completion, round_index=len(self.turns))
        self.num_sampled += len(completion.token_ids)
        if completion.stop_reason == CODE_END and len(self.turns) < max_rounds:
            self.round_text = text
            self.code = extract_code(text) or ""
            return None
        self.turns.append(Turn(text=until_answer(text), code=None, result=None, output_text="", num_images=0))
        return _status(completion, is_answered=self.is_answered)

    def end_code(
        self, result: SandboxResult, output: Output, config: RolloutConfig, max_context: int
    ) -> RolloutStatus | None:
        """Records what the code gave, and its output as far as there is room for it.

        Args:
            result: what the sandbox returned.
            output: the same as the model is to be shown it.
            config: the limits.
            max_context: tokens the engine allows in one sequence.

        Returns:
            Why the rollout is over, the output not shown; None if the output is now to be appended to the sequence.
        """
        ended = None
        if len(self.sequence.images) + len(output.images) > config.max_images:
            ended = RolloutStatus.MAX_IMAGES
        elif self.num_sampled >= config.max_tokens:
            ended = RolloutStatus.LENGTH
        elif len(self.sequence) + len(output.token_ids) >= max_context:
            ended = RolloutStatus.CONTEXT
        if ended is None:
            self.trajectory.add_given(output.token_ids, TokenKind.SANDBOX, round_index=len(self.turns))
        self.turns.append(
            Turn(
                text=self.round_text,
                code=self.code,
                result=result,
                output_text="" if ended else output.text,
                num_images=0 if ended else len(output.images),
            )
        )
        return ended

    def mark(self, part: str) -> None:
        """Adds what it did since the last part to the trace."""
        trace.add("rollouts", part, self.marks[-1], self.sequence.id)
        self.marks.append(trace.now())

    @property
    def session_seed(self) -> int:
        """Seed of its sandbox session."""
        return self.seed if self.parent is None else self.parent.session_seed

    @property
    def is_answered(self) -> bool:
        """Whether an answer stands in the text so far."""
        return extract_answer(_text(self.turns)) is not None

    def finished(self, status: RolloutStatus) -> Rollout:
        """The rollout as it is now, ended for the reason given."""
        text = until_answer(_text(self.turns))
        return Rollout(
            question=self.question,
            group=self.group,
            index=self.index,
            seed=self.seed,
            **self.trajectory.columns(),
            images=list(self.sequence.images),
            turns=self.turns,
            text=text,
            answer=extract_answer(text),
            status=status,
            wall_s=time.perf_counter() - self.started,
            sandbox_s=sum(turn.result.wall_s for turn in self.turns if turn.result is not None),
            parent=self.parent,
        )


def _text(turns: Sequence[Turn]) -> str:
    return "".join(turn.text + turn.output_text for turn in turns)


def _status(completion: Completion, *, is_answered: bool) -> RolloutStatus:
    """Why a rollout ended with this round."""
    if completion.finish_reason == "stop":
        if completion.stop_reason == "forged":
            return RolloutStatus.FORGED
        if completion.stop_reason in (CODE_START, CODE_END):
            return RolloutStatus.MAX_ROUNDS
    by_reason = {
        "length": RolloutStatus.LENGTH,
        "context": RolloutStatus.CONTEXT,
        "repetition": RolloutStatus.REPETITION,
        "abort": RolloutStatus.ABORTED,
    }
    ended = RolloutStatus.ANSWERED if is_answered else RolloutStatus.EOS_WITHOUT_ANSWER
    return by_reason.get(completion.finish_reason, ended)
