"""The sandbox sessions of rollouts that go on in another process, made again by running their code again."""

import logging
from collections.abc import Mapping

from thyme.rollout.executor import Executor
from thyme.rollout.same_result import is_same
from thyme.rollout.types import Question, Rollout

_log = logging.getLogger(__name__)


def replay(executor: Executor, begun: Mapping[int, tuple[Question, Rollout]]) -> set[int]:
    """Runs the code of every round again, those of different rollouts at the same time.

    Args:
        executor: runs it, in the session of each rollout.
        begun: by the number that names the rollout to the executor, its question and what it was so far.

    Returns:
        The numbers of those whose code gave something else this time: their session is not what the model was told.
    """
    differ: set[int] = set()
    turns = {
        number: [turn for turn in rollout.turns if turn.code is not None] for number, (_, rollout) in begun.items()
    }
    for place in range(max(map(len, turns.values()), default=0)):
        running = {
            number: (turn[place], executor.run(number, *_of(begun[number]), turn[place].code or ""))
            for number, turn in turns.items()
            if place < len(turn) and number not in differ
        }
        for number, (turn, future) in running.items():
            result, _ = future.result()
            if not is_same(result, turn):
                differ.add(number)
                rollout = begun[number][1]
                _log.warning(
                    "thyme: rollout %s/%d was interrupted and its code gives something else now: it starts over",
                    rollout.question.id,
                    rollout.index,
                )

    return differ


def _of(begun: tuple[Question, Rollout]) -> tuple[Question, int]:
    question, rollout = begun
    return question, rollout.session_seed
