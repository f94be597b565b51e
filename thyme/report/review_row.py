"""A row under review: what it asks, what its response says and shows, and the same after its code was run again."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from thyme.report.rollout_view import rollout_view
from thyme.rollout.prompts import extract_answer, extract_code
from thyme.rollout.types import Question
from thyme.sandbox import SandboxResult

IMAGE = "<image>"
MARKED = 255
"""How white a pixel is in a picture of differences where the two differ by at least a quarter of the range."""

_OUTPUT = re.compile(r"\s*<sandbox_output>([\s\S]*?)</sandbox_output>")
_CODE_END = re.compile(r"</code>")


@dataclass(frozen=True, slots=True, eq=False)
class ReviewRow:
    """A row of training data."""

    place: str
    """Where it stands: file and number."""
    question: Question
    response: str
    """The assistant's turn, `<image>` for each picture that code made."""
    images: tuple[Image.Image, ...] = ()
    """Those pictures, in order."""
    digest: str = field(init=False)
    """Of what it says and shows."""

    def __post_init__(self) -> None:
        pictures = (*(picture for _, picture in self.question.pictures), *self.images)
        found = row_digest(self.question.question, self.question.image_path, self.response, pictures)
        object.__setattr__(self, "digest", found)


@dataclass(frozen=True, slots=True)
class Round:
    """A round of a response."""

    text: str
    code: str | None
    output: str | None
    """What stands between the tags of its sandbox output; None where there is none."""
    images: int
    """Marks of pictures in it."""


def row_digest(question: str, image_path: str, response: str, pictures: Sequence[Image.Image]) -> str:
    """SHA-256 of what a row says and shows."""
    digest = hashlib.sha256()
    for text in (question, image_path, response):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    for picture in pictures:
        digest.update(picture_name(picture).encode())
    return digest.hexdigest()


def picture_name(picture: Image.Image) -> str:
    """SHA-256 of mode, size and pixels, as a run's images are named."""
    head = f"{picture.mode} {picture.width} {picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()


def rounds_of(response: str) -> list[Round]:
    """A response cut behind each sandbox output; code without an output is a round too."""
    rounds, at = [], 0
    while match := _CODE_END.search(response, at):
        text = response[at : match.end()]
        output = _OUTPUT.match(response, match.end())
        inner = None if output is None else output[1]
        rounds.append(Round(text, extract_code(text), inner, inner.count(IMAGE) if inner else 0))
        at = match.end() if output is None else output.end()
    if response[at:].strip() or not rounds:
        rounds.append(Round(response[at:], None, None, 0))
    return rounds


def review_view(row: ReviewRow, pictures: "RowPictures", response: str | None = None) -> dict[str, Any]:
    """The row as a page shows a rollout.

    Args:
        row: the row.
        pictures: gets those that are shown.
        response: in place of the row's own.
    """
    response = row.response if response is None else response
    left, turns = list(row.images), []
    for part in rounds_of(response):
        shown, left = left[: part.images], left[part.images :]
        result: dict[str, Any] | None = None
        if part.output is not None:
            text = part.output.replace(IMAGE, "").strip()
            result = {"status": "ok", "stdout": text, "images": [pictures.add(picture) for picture in shown]}
        turns.append({"text": part.text, "code": part.code, "result": result, "output_text": part.output or ""})
    told = [(path, pictures.add(picture)) for path, picture in row.question.pictures]
    question = {
        "id": row.place,
        "image": told[0][1] if told else None,
        "image_path": row.question.image_path,
        "more_images": told[1:],
        "question": row.question.question,
        "solution": row.question.solution,
        "scenario": row.question.scenario,
        "meta": row.question.meta,
    }
    answer = extract_answer(response)
    shown_as = {"question": question, "turns": turns, "answer": answer, "status": "row", "tokens": {}}
    view = rollout_view(shown_as, pictures, None)
    return view | {"notes": [note for note in view["notes"] if note != "no tokens were recorded"]}


class RowPictures:
    """The pictures of rows that were shown lately, by name."""

    def __init__(self, most: int = 200) -> None:
        self._most = most
        self._kept: dict[str, Image.Image] = {}

    def add(self, picture: Image.Image) -> str:
        """Keeps it; returns its name."""
        name = picture_name(picture)
        self._kept.pop(name, None)
        self._kept[name] = picture
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
        return name

    def get(self, name: str) -> Image.Image:
        """
        Raises:
            FileNotFoundError: it is kept no more.
        """
        try:
            return self._kept[name]
        except KeyError:
            raise FileNotFoundError(f"picture {name[:12]}: shown no more: open the row again") from None


def compared(row: ReviewRow, response: str, results: Sequence[SandboxResult], pictures: RowPictures) -> list[Any]:
    """What code gave when it was run again beside what the response says it gave, a round each.

    Args:
        row: whose pictures are compared.
        response: whose code was run.
        results: of its code blocks, in order.
        pictures: gets those that are shown.
    """
    left, again, out = list(row.images), list(results), []
    for part in rounds_of(response):
        before, left = left[: part.images], left[part.images :]
        if part.code is None or not again:
            continue
        result = again.pop(0)
        said = (part.output or "").replace(IMAGE, "").strip()
        now = result.stdout.strip() if not result.images or said else ""
        if result.error is not None and not now:
            now = f"Error: {result.error.type}: {result.error.message}"
        out.append(
            {
                "status": result.status.value,
                "error": None if result.error is None else f"{result.error.type}: {result.error.message}",
                "fixes": [str(fix) for fix in result.fixes],
                "wall_s": result.wall_s,
                "text_differs": said != now,
                "diff": list(_text_diff(said, now)) if said != now else [],
                "pictures": [
                    picture_difference(
                        before[i] if i < len(before) else None,
                        result.images[i] if i < len(result.images) else None,
                        pictures,
                    )
                    for i in range(max(len(before), len(result.images)))
                ],
            }
        )
    return out


def picture_difference(before: Image.Image | None, now: Image.Image | None, pictures: RowPictures) -> dict[str, Any]:
    """Two pictures and what differs: `same`, the share of pixels that do and by how much at most, of 255."""
    entry: dict[str, Any] = {"before": _entry(before, pictures), "now": _entry(now, pictures), "same": False}
    if before is None or now is None:
        return entry | {"words": "only in the row" if now is None else "only in the new run"}
    if before.size != now.size:
        return entry | {"words": f"another size: {before.width}x{before.height}, now {now.width}x{now.height}"}
    differences = ImageChops.difference(before.convert("RGB"), now.convert("RGB"))
    largest = np.asarray(differences).max(axis=2)
    if not largest.any():
        return entry | {"same": True, "words": "the same pixels"}
    share = float((largest > 0).mean())
    shown = Image.fromarray(np.minimum(largest.astype(np.uint16) * 4, MARKED).astype(np.uint8)).convert("RGB")
    words = f"{100 * share:.3g} % of the pixels differ, by {int(largest.max())} of 255 at most"
    return entry | {"difference": _entry(shown, pictures), "share": share, "most": int(largest.max()), "words": words}


def _entry(picture: Image.Image | None, pictures: RowPictures) -> dict[str, Any] | None:
    if picture is None:
        return None
    return {"name": pictures.add(picture), "width": picture.width, "height": picture.height}


def _text_diff(before: str, now: str) -> Iterator[list[str]]:
    """[kind, line]: "removed", "added" or "same"."""
    kinds = {"-": "removed", "+": "added", " ": "same"}
    for line in difflib.ndiff(before.splitlines(), now.splitlines()):
        if line[:1] in kinds:
            yield [kinds[line[0]], line[2:]]
