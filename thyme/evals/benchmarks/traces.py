"""The rollouts of a benchmark's run on disk: written as they end, read again by question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

from thyme.evals.whole_lines import cut_to_whole_lines
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.records import from_row, images_beside, to_row
from thyme.rollout.types import Question, Rollout


class Traces:
    """A file of rollouts, a JSON line each. Their pictures are in images/ beside its folder, each once.

    Args:
        path: of the file. Opened for writing (as a context manager) it is made where it is missing, and half a line at
            its end, where a run was killed, is cut off.
        picture_bytes: of disk that questions' pictures may take. A benchmark may have tens of GB of them: those that
            come when it is used up are left in the benchmark's file alone. What the sandbox returned is always kept.
    """

    def __init__(self, path: Path, picture_bytes: int = 0) -> None:
        self.path = path
        self._room = picture_bytes
        self._counted: set[str] = set()
        self._images = ImageFolder(images_beside(path))
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_to_whole_lines(self.path)
        self._file = self.path.open("a", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, rollout: Rollout) -> None:
        """One more line, on disk when this returns."""
        self.append(self.line(rollout))

    def line(self, rollout: Rollout) -> str:
        """The line of a rollout, whose pictures are on disk when this returns."""
        if self._room <= 0:
            rollout = replace(rollout, question=replace(rollout.question, image=None, more_images=()))
        row = to_row(rollout, self._images) | {"rewards": None}
        self._count(row["question"])
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"

    def append(self, line: str) -> None:
        """Adds a line that is made already."""
        assert self._file is not None, "opened for reading"
        self._file.write(line)
        self._file.flush()

    def _count(self, question: Mapping[str, Any]) -> None:
        """Takes what a question's pictures need off the room that is left."""
        for name in (question["image"], *(name for _, name in question["more_images"])):
            if name is not None and name not in self._counted:
                self._counted.add(name)
                self._room -= self._images.path(name).stat().st_size

    @cached_property
    def _places(self) -> dict[tuple[str, int], list[int]]:
        """Where lines begin, in the file's order, by question id and sample. Reads the file when first asked for."""
        places: dict[tuple[str, int], list[int]] = defaultdict(list)
        place = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    places[row["question"]["id"], row["index"]].append(place)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}: no rollout at byte {place} ({error!r}): take another --name"
                    ) from None
                place += len(line)
        return dict(places)

    def samples(self) -> list[tuple[str, int]]:
        """Question id and sample of all that the file had when it was first read."""
        return list(self._places)

    def of(self, question: Question, sample: int = 0) -> list[Rollout]:
        """The rollouts of a question, in the order they ended, with its pictures and without the model's view of any.

        Args:
            question: any rollout with its id, as it is asked now.
            sample: its index; there are several of one where it was drawn again, and the last is the one that counts.
        """
        return [self.rollout(line, question) for line in self.lines(question.id, sample)]

    def last(self, question: Question, sample: int = 0) -> Rollout | None:
        """The one of them that counts; None where there is none."""
        places = self._places.get((question.id, sample))
        return self.rollout(self._at(places[-1]), question) if places else None

    def lines(self, question_id: str, sample: int = 0) -> list[str]:
        """The lines of a question's rollouts, in the order they ended."""
        return [self._at(place) for place in self._places.get((question_id, sample), ())]

    def rollout(self, line: str, question: Question) -> Rollout:
        """What `line` made a line of.

        Args:
            line: of this file.
            question: the same question, with the pictures that lines lack.
        """
        return from_row(json.loads(line), self._images, None, question)

    def _at(self, place: int) -> str:
        with self.path.open("rb") as file:
            file.seek(place)
            return file.readline().decode("utf-8")
