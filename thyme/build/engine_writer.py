"""This project's own engine as the writer: rows that wait are run together as rollouts, on a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from thyme.build.draft import Draft, Ran
from thyme.build.prompts import writer_turn
from thyme.build.scenarios import Assignment
from thyme.rollout.types import Question
from thyme.sandbox import Status

if TYPE_CHECKING:
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.types import Rollout


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    question: Question
    samples: int
    rollouts: Future[list[Rollout]]


class EngineWriter:
    """A `Writer` on a rollout loop, which nothing else may use meanwhile.

    Args:
        loop: engine and sandbox.
        bare: ask with the question alone, in place of the scenario's instructions.
        temperature: of the text of demonstrations.
        seed: of their sampling.
        most: rows of one batch.
    """

    def __init__(self, loop: RolloutLoop, *, bare: bool, temperature: float, seed: int, most: int) -> None:
        self._loop, self._bare, self._temperature, self._seed, self._most = loop, bare, temperature, seed, most
        self._wanted: SimpleQueue[_Wanted | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="thyme-writer", daemon=True)
        self._thread.start()

    async def write(self, assignment: Assignment) -> Draft:
        asked = _question(assignment, assignment.raw.question if self._bare else writer_turn(assignment))
        (rollout,) = await self._rollouts(asked, 1)
        return _draft(rollout)

    async def answers(self, assignment: Assignment, samples: int) -> Sequence[str | None]:
        rollouts = await self._rollouts(_question(assignment, assignment.raw.question), samples)
        return [rollout.answer for rollout in rollouts]

    async def close(self) -> None:
        self._wanted.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _rollouts(self, question: Question, samples: int) -> list[Rollout]:
        future: Future[list[Rollout]] = Future()
        self._wanted.put(_Wanted(question, samples, future))
        return await asyncio.wrap_future(future)

    def _serve(self) -> None:
        while (first := self._wanted.get()) is not None:
            batch = [first]
            while len(batch) < self._most and not self._wanted.empty():
                further = self._wanted.get()
                if further is None:
                    self._wanted.put(None)
                    break
                batch.append(further)
            self._run(batch)

    def _run(self, batch: list[_Wanted]) -> None:
        """Rows of as many samples side by side. What a row draws depends on its question's id and on the seed alone,
        so rows may be batched as they come."""
        for samples in sorted({wanted.samples for wanted in batch}):
            self._run_alike([wanted for wanted in batch if wanted.samples == samples], samples)

    def _run_alike(self, batch: list[_Wanted], samples: int) -> None:
        sampling = self._loop.config.sampling(n=samples, temperature=self._temperature, seed=self._seed)
        try:
            groups = self._loop.run([wanted.question for wanted in batch], sampling)
        except ValueError as error:  # one row that cannot be asked: the others can
            if len(batch) == 1:
                batch[0].rollouts.set_exception(error)
            else:
                for wanted in batch:
                    self._run_alike([wanted], samples)
            return
        except BaseException as error:
            for wanted in batch:
                wanted.rollouts.set_exception(error)
            return
        for wanted, group in zip(batch, groups, strict=True):
            wanted.rollouts.set_result(group)


def _question(assignment: Assignment, text: str) -> Question:
    raw = assignment.raw
    return Question(id=assignment.id, image=assignment.image, image_path=raw.image_path, question=text, solution="")


def _draft(rollout: Rollout) -> Draft:
    rounds = []
    for turn in rollout.turns:
        result = turn.result
        if result is None:
            rounds.append(Ran(turn.text, None))
            continue
        error = "" if result.error is None else f"{result.error.type}: {result.error.message}"
        rounds.append(
            Ran(
                said=turn.text,
                code=turn.code,
                ok=result.status is Status.OK,
                stdout=result.stdout.strip(),
                error=error or ("" if result.status is Status.OK else result.status.value),
                images=result.images,
                output=turn.output_text,
            )
        )
    return Draft(tuple(rounds))
