"""The rollouts of a step that is not over, written as they go on, so that an interrupted step need not repeat them.

    runs/<name>/rollouts/.step_7.jsonl     who wrote it, then a line when a rollout ends or has run a code block

What a rollout draws depends on the weights, the sampling, its question and its index, and on no other rollout. So a
journal names the weights' fingerprint and the settings, and is used by whoever has exactly these: in a run that goes
on from a checkpoint that is the step right after it, and where each step gives the same bits again (a deterministic
engine on a CPU) the steps after that one too. Anybody else finds an empty journal.

A rollout that has not ended goes on after its last code block: its tokens are prefilled, its code is run again, and
where that gives something else it begins again from its prompt, as one does that has run no code yet.
"""

import errno
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from thyme.model.processor import Processor
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.records import from_row, images_beside, to_row
from thyme.rollout.types import Question, Rollout

_log = logging.getLogger(__name__)

Key = tuple[str, int]
"""Question id and seed, which names a rollout: the seed is made of sampling seed, question and index."""


class Journal:
    """One step's rollouts on disk. Use as a context manager: it is complete when the block ends.

    Lines are written by a thread, while others decode. A disk that refuses them costs the journal and not the run: that
    is a warning, and nothing more is written.

    Args:
        path: the file; its folder is made. Images go where `write_rollouts` puts them.
        identity: names weights and settings; what was written under another one is dropped.
        processor: of the model that makes the rollouts.
        asked: the questions of all rollouts, whose pictures are then not written; None: they are.
        must_match: refuse a file that was written under another identity.

    Raises:
        ValueError: it must match and does not.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        processor: Processor,
        *,
        asked: Sequence[Question] | None = None,
        must_match: bool = False,
    ) -> None:
        self.kept: Mapping[Key, Rollout] = {}
        """What had ended already, by question id and seed."""
        self.begun: Mapping[Key, Rollout] = {}
        """What had not ended, as it was after its last code block."""
        self._path, self._must_match = path, must_match
        self._asked = None if asked is None else {question.id: question for question in asked}
        self._images = ImageFolder(images_beside(path))
        self._refused = False
        self._writes: list[Future[None]] = []
        self._file: FileIO | None = None
        try:
            self._open(identity, processor)
        except OSError as error:
            self._refuse(error)

    def add(self, rollout: Rollout) -> None:
        """Has a rollout that has ended written, unless it was kept. Does not block."""
        if key(rollout) not in self.kept and not self._refused:
            self._writes.append(self._writer.submit(self._write, rollout, has_ended=True))

    def add_begun(self, rollout: Rollout) -> None:
        """Has a rollout written that goes on after a code block. Does not block."""
        if not self._refused:
            self._writes.append(self._writer.submit(self._write, rollout, has_ended=False))

    def __enter__(self) -> Self:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="thyme-journal")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if self._file is not None:
            self._file.close()
        for written in self._writes:
            written.result()

    def _open(self, identity: str, processor: Processor) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("r+b" if self._path.exists() else "w+b", buffering=0)
        header = json.dumps({"identity": identity}).encode() + b"\n"
        first, *lines = self._file.readall().splitlines(keepends=True) or [b""]
        if first == header:
            end = len(header) + self._read(lines, processor)
            self._file.seek(end)
            self._file.truncate()
        else:
            if first.endswith(b"\n") and self._must_match:
                self._file.close()
                changed = _changed(first, identity)
                raise ValueError(f"{self._path} was made with other {changed}: repeat it as it was, or delete it")
            self._file.seek(0)
            self._file.truncate()
            self._put(header)

    def _read(self, lines: Sequence[bytes], processor: Processor) -> int:
        """Reads rollouts up to a line that was not written to its end; returns the bytes up to there."""
        rollouts: dict[Key, tuple[Rollout, bool]] = {}
        end = 0
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line has no end")
                row = json.loads(line)
                question = None if self._asked is None else self._asked[row["question"]["id"]]
                rollout, has_ended = from_row(row, self._images, processor, question), bool(row["has_ended"])
            except (KeyError, TypeError, ValueError, OSError) as error:
                _log.warning("thyme: %s: a rollout cannot be read (%s) and is sampled again", self._path, error)
                break
            rollouts[key(rollout)] = rollout, has_ended
            end += len(line)
        self.kept = {name: rollout for name, (rollout, has_ended) in rollouts.items() if has_ended}
        self.begun = {name: rollout for name, (rollout, has_ended) in rollouts.items() if not has_ended}
        return end

    def _write(self, rollout: Rollout, *, has_ended: bool) -> None:
        if self._refused:
            return
        if self._asked is not None:
            rollout = replace(rollout, question=replace(rollout.question, image=None, more_images=()))
        try:
            row = to_row(rollout, self._images) | {"has_ended": has_ended}
            self._put(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            self._refuse(error)

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _refuse(self, error: OSError) -> None:
        self._refused = True
        _log.warning("thyme: %s: %s; an interrupted step will repeat its rollouts", self._path, error)


def _changed(header: bytes, identity: str) -> str:
    """What of two identities differs, by name."""
    before, now = json.loads(json.loads(header)["identity"]), json.loads(identity)
    return ", ".join(name for name in now if now[name] != before.get(name))


def key(rollout: Rollout) -> Key:
    """What names a rollout in a journal."""
    return rollout.question.id, rollout.seed
