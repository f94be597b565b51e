"""Which journals of an RL run's steps there are, and how long each may still be of use.

A step's rollouts are journaled while they are sampled (`thyme.rollout.journal`). A run that goes on from the checkpoint
of step 10 repeats step 10 with the weights it was begun with, so that step's journal is kept until a later checkpoint
is there. The steps after it are repeated too; only where the same bits come again were their rollouts drawn from the
weights that the repetition has, and their journals are kept as long. No checkpoints on the way: no journals.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from thyme.rollout.journal import Journal
from thyme.rollout.rollout import RolloutLoop
from thyme.train.distributed import World

_NAME = re.compile(r"\.step_(\d+)(\.\d+_of_\d+)?\.jsonl")


class StepJournals:
    """The journals of a run.

    Args:
        run_dir: the run's folder; None keeps no journals.
        loop: makes the rollouts.
        world: each of several ranks keeps a journal of its own questions.
        same_bits: whether a repeated step gives the same bits.
    """

    def __init__(self, run_dir: Path | None, loop: RolloutLoop, world: World | None = None, *, same_bits: bool) -> None:
        self._folder = None if run_dir is None else run_dir / "rollouts"
        self._loop, self._same_bits = loop, same_bits
        self._of_rank = "" if world is None or world.size == 1 else f".{world.rank}_of_{world.size}"

    def step(self, step: int) -> AbstractContextManager[Journal | None]:
        """Inside the block the loop's rollouts are those of `step`."""
        if self._folder is None:
            return nullcontext()
        return self._loop.journaled(self._folder / f".step_{step}{self._of_rank}.jsonl")

    def forget(self, *, next_step: int, saved_step: int) -> None:
        """Deletes what no resumed run can use.

        Args:
            next_step: the step to do next.
            saved_step: the step that a resumed run would begin with.
        """
        for path in self._folder.glob(".step_*.jsonl") if self._folder is not None else ():
            if found := _NAME.fullmatch(path.name):
                step = int(found[1])
                if step < saved_step or (saved_step < step < next_step and not self._same_bits):
                    path.unlink(missing_ok=True)  # another rank may be at it too
