"""The multi-round loop: questions in, rollouts out, engine and sandbox at work at the same time.

A group of sequences is added to the engine per question. A round ends at `</code>`: the sequence is held with its KV
cache, its code runs in the rollout's sandbox session (thyme/rollout/executor.py), and the other sequences go on
decoding. When the result is there, `<sandbox_output>...</sandbox_output>` is appended and only those tokens are
prefilled. It goes on until an answer or a limit. The state of one run lives in thyme/rollout/scheduler.py.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from thyme.engine import Engine
from thyme.model.fingerprint import fingerprint
from thyme.model.processor import Processor
from thyme.rollout.branching import failed_round, start_of
from thyme.rollout.config import RolloutConfig
from thyme.rollout.events import End, Event
from thyme.rollout.journal import Journal
from thyme.rollout.pieces import Kept, Key, Stem
from thyme.rollout.sampling import Sampling
from thyme.rollout.scheduler import RolloutScheduler, RunTiming
from thyme.rollout.snapshots import Snapshots, room_for_snapshots
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox

MAX_ASPECT = 200
"""Longer side over shorter side of an image: Qwen2.5-VL's resize refuses more."""


class RolloutLoop:
    """Runs questions through engine and sandbox.

    Args:
        engine: decodes; nothing else may use it during a run.
        sandbox: runs code; a session per rollout, opened at its first code block.
        processor: of the engine's model.
        config: limits, prompt style and sampling defaults.

    Raises:
        ValueError: the sandbox lets images through that the processor can't resize.
    """

    def __init__(
        self, engine: Engine, sandbox: Sandbox, processor: Processor, config: RolloutConfig | None = None
    ) -> None:
        if sandbox.config.max_aspect > MAX_ASPECT:
            raise ValueError(
                f"sandbox.max_aspect: {sandbox.config.max_aspect} must be at most {MAX_ASPECT}: "
                "no image processor takes longer images"
            )
        self.engine = engine
        self.sandbox = sandbox
        self.processor = processor
        self.config = config or RolloutConfig()
        self.timing: RunTiming | None = None
        """Of the last completed run."""
        self._journal: Journal | None = None
        self._kept: dict[Key, Kept] | None = None
        self._snapshots: Snapshots | None = None

    def run(
        self,
        questions: Sequence[Question],
        sampling: Sampling | None = None,
        *,
        on_end: Callable[[Rollout], object] | None = None,
    ) -> list[list[Rollout]]:
        """The rollouts of each question, in question order, then by index.

        Args:
            questions: what is asked; a question may occur twice.
            sampling: how rollouts are drawn; None: as the config says.
            on_end: is given each rollout when it ends, while others still decode: it must not take long.

        Raises:
            ValueError: an empty question, an image that can't be used.
        """
        sampling = sampling or self.config.sampling()
        scheduler = self._scheduler(questions, sampling, journal=self._journal)
        rollouts: list[dict[int, Rollout]] = [{} for _ in questions]
        with closing(scheduler.events()) as events:
            for event in events:
                if isinstance(event, End):
                    if self._journal is not None:
                        self._journal.add(event.rollout)
                    if on_end is not None:
                        on_end(event.rollout)
                    rollouts[event.rollout.group][event.rollout.index] = event.rollout
        self.timing = scheduler.timing()
        return [[group[index] for index in range(sampling.n)] for group in rollouts]

    @contextmanager
    def journaled(
        self,
        path: Path,
        sampling: Sampling | None = None,
        asked: Sequence[Question] | None = None,
        *,
        must_match: bool = False,
    ) -> Iterator[Journal]:
        """Inside the block each rollout of `run` is written to `path` after each code block and when it ends; what is
        found there, sampled from the same weights under the same config, is not sampled again
        (`thyme.rollout.journal`).

        Args:
            path: of the journal.
            sampling: must have been the same too, where it is said.
            asked: all questions, which must have been the same too; their pictures are then not written.
            must_match: refuse a journal that was made with others.

        Raises:
            ValueError: it must match and does not.
        """
        settings: dict[str, object] = {"weights": fingerprint(self.engine.model), "rollout": asdict(self.config)}
        if sampling is not None:
            settings["sampling"] = asdict(sampling)
        if asked is not None:
            told = [[one.id, one.question, one.image_size, [path for path, _ in one.pictures]] for one in asked]
            settings["questions"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        identity = json.dumps(settings, sort_keys=True)
        with Journal(path, identity, self.processor, asked=asked, must_match=must_match) as self._journal:
            try:
                yield self._journal
            finally:
                self._journal = None

    def fork(
        self,
        rollout: Rollout,
        round: int,
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_index: int | None = None,
    ) -> list[Rollout]:
        """Rollouts that go on from the start of a round of one that has ended, to their own ends.

        They have its tokens, turns and pictures up to there, and a sandbox session with its variables and files. With
        its KV held (`keeping`) no token is computed again, or else the prefix is computed once. What one draws is what
        a replay from the start would draw under its seed.

        Args:
            rollout: of this loop, or read from a record with its pictures.
            round: 0 for the end of the prompt; r for after the output of its r-th code block.
            n: how many; their seeds come from `sampling.seed`, the rollout and the round.
            sampling: how they are drawn, its `n` and `tree` aside; None: as the config says.
            first_index: index in the group of the first of them; None: the one after the rollout's.

        Returns:
            n rollouts, each with its `parent`.

        Raises:
            ValueError: the rollout drew nothing in such a round; n below 1.
        """
        first = rollout.index + 1 if first_index is None else first_index
        return self._fork([(Stem(rollout, round), first)], n, sampling)[0]

    def fork_each(
        self, places: Sequence[tuple[Rollout, int]], n: int = 1, sampling: Sampling | None = None
    ) -> list[list[Rollout]]:
        """`fork` from many (rollout, round) at once, which decode side by side; n for each, in their order."""
        return self._fork([(Stem(rollout, round), rollout.index + 1) for rollout, round in places], n, sampling)

    def retry_each(
        self, rollouts: Sequence[Rollout], attempts: int = 1, sampling: Sampling | None = None
    ) -> list[Rollout]:
        """Draws the first round whose code failed again, from its start, until no code fails or `attempts` are used up.

        Returns:
            For each rollout the last one drawn, or itself where nothing failed. Retries count its index on.
        """
        current = list(rollouts)
        for _ in range(attempts):
            failed = [(i, round) for i, rollout in enumerate(current) if (round := failed_round(rollout)) is not None]
            drawn = self.fork_each([(current[i], round) for i, round in failed], 1, sampling)
            for (i, _), (again,) in zip(failed, drawn, strict=True):
                current[i] = again
        return current

    def _fork(self, stems: Sequence[tuple[Stem, int]], n: int, sampling: Sampling | None) -> list[list[Rollout]]:
        for stem, _ in stems:
            start_of(stem.rollout, stem.round)
        if not stems:
            return []
        sampling = replace(sampling or self.config.sampling(), n=n, tree=TreeConfig())
        scheduler = self._scheduler([], sampling, stems=stems)
        keys = [(piece.question.id, piece.seed) for piece in scheduler.waiting]
        ended: dict[Key, Rollout] = {}
        with closing(scheduler.events()) as events:
            for event in events:
                if isinstance(event, End):
                    ended[event.rollout.question.id, event.rollout.seed] = event.rollout
        self.timing = scheduler.timing()
        found = [ended[key] for key in keys]
        return [found[i : i + n] for i in range(0, len(found), n)]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside the block rollouts keep their KV when they end, and forks of their sandbox sessions after each code
        block, for `fork`, for as long as nothing else needs the room."""
        if self._kept is not None:
            raise ValueError("keeping: already inside such a block")
        self._kept, self._snapshots = {}, Snapshots(room_for_snapshots(self.sandbox))
        try:
            yield
        finally:
            self._snapshots.close()
            kept, self._kept, self._snapshots = self._kept, None, None
            for each in kept.values():
                self.engine.release(each.sequence)

    def stream(self, question: Question, sampling: Sampling | None = None) -> Generator[Event, None, None]:
        """One rollout of one question as events, as they happen; the last one is End. `n` of `sampling` is ignored.

        Close the generator to cancel the rollout.
        """
        scheduler = self._scheduler(
            [question], replace(sampling or self.config.sampling(), n=1, tree=TreeConfig()), streaming=True
        )
        yield from scheduler.events()
        self.timing = scheduler.timing()

    def _scheduler(
        self,
        questions: Sequence[Question],
        sampling: Sampling,
        *,
        journal: Journal | None = None,
        streaming: bool = False,
        stems: Sequence[tuple[Stem, int]] = (),
    ) -> RolloutScheduler:
        return RolloutScheduler(
            self.engine,
            self.sandbox,
            self.processor,
            self.config,
            questions,
            sampling,
            kept={} if journal is None else journal.kept,
            begun={} if journal is None else journal.begun,
            on_round=None if journal is None else journal.add_begun,
            streaming=streaming,
            stems=stems,
            keep=self._kept,
            snapshots=self._snapshots,
        )
