"""The sandbox sessions of rollouts that go on in another process, made again by running their code again."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from PIL import Image

from thyme.rollout.executor import Executor
from thyme.rollout.types import Question, Rollout, Turn
from thyme.sandbox import SandboxResult

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
            if not _is_same(result, turn):
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
    return question, rollout.seed


def _is_same(result: SandboxResult, turn: Turn) -> bool:
    """Whether a result is the turn's, but for what was measured."""
    if turn.result is None:
        return False
    before = turn.result
    measured = {"wall_s": 0.0, "cpu_s": 0.0, "peak_mib": 0.0, "images": ()}
    images = zip(map(_pixels, result.images), map(_pixels, before.images), strict=False)
    return (
        replace(result, **measured) == replace(before, **measured)  # type: ignore[arg-type]
        and len(result.images) == len(before.images)
        and all(one == other for one, other in images)
    )


def _pixels(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    return image.mode, image.size, image.tobytes()
