"""From a row as it lies in a file to what is trained on: pictures decoded, paths made portable, the prompt rebuilt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thyme.data.formats import full_prompt
from thyme.data.layouts.row import MARK, Kind, Row
from thyme.data.pictures import PictureFile, picture_file
from thyme.data.problems import asked, solution_of
from thyme.data.refusal import BadRow
from thyme.data.rows import Demonstration, Question
from thyme.data.turns import portable_paths, rewritten, taken_apart
from thyme.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """A row that is ready."""

    question: Question
    response: str | None
    """With portable paths; None where the row has none."""
    images: list[Image.Image]
    """The question's, then those of the response."""
    files: list[PictureFile]
    """The image files of `images`, as they were."""

    def demonstration(self) -> Demonstration:
        """The row for SFT; its prompt is the one that a rollout of its question is given."""
        assert self.response is not None
        question = self.question
        return Demonstration(self.images, full_prompt(question), self.response, question.scenario, question)


def resolve(
    row: Row,
    kind: Kind,
    *,
    name: str,
    source: str,
    folder: Path | None,
    fits: Callable[[Image.Image], object] | None = None,
) -> Resolved:
    """A row without text problems, made ready.

    Args:
        row: as a layout read it.
        kind: "rl" decodes the question's pictures alone and leaves the response out.
        name: the question's id.
        source: the question's scenario where the row names no data set of its own.
        folder: what relative paths of pictures start from.
        fits: raises ValueError for a picture that the model's processor would refuse.

    Raises:
        BadRow: a picture that is missing, unreadable, or refused by `fits`; says which.
    """
    response = row.response if kind == "sft" else None
    count = row.user.count(MARK)
    values = list(row.pictures or ())
    files, images = [], []
    for index, value in enumerate(values if response is not None else values[:count]):
        try:
            files.append(picture_file(value, f"image {index}", folder))
            images.append(read_picture(files[-1].data, f"image {index}"))
        except ValueError as error:
            what = str(error).removeprefix(f"image {index}: ")
            raise BadRow("picture", f"image {index} cannot be read: {what}") from error
        if fits is not None:
            try:
                fits(images[-1])
            except ValueError as error:
                raise BadRow("picture", f"image {index} is refused by the picture processor: {error}") from error
    told = taken_apart(row.user).paths or [file.path for file in files[:count]]
    paths = portable_paths(told, count)
    question = Question(
        id=name,
        image=images[0] if count else None,
        image_path=paths[0] if count else "",
        question=asked(row),
        solution=solution_of(row),
        scenario=row.source or source,
        meta={"row_id": row.id} if row.id else {},
        more_images=tuple(zip(paths[1:], images[1:count], strict=True)),
    )
    return Resolved(question, None if response is None else rewritten(response, told, paths), images, files)
