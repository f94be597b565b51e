"""Rollouts on disk: one JSON line each, images beside them in a store named by content.

    runs/<name>/rollouts/step_N.jsonl      text, turns, rewards, and the per-token arrays as lists
    runs/<name>/images/<sha256>.png        every image once, however many rollouts show it

Files are written under another name and renamed, so none is ever half there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.trajectory import COLUMNS, LATER_COLUMNS
from thyme.rollout.types import Parent, Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import Fix, SandboxResult, SnippetError, Status

if TYPE_CHECKING:
    from thyme.model.processor import Processor


def write_rollouts(
    path: Path | str,
    rollouts: Sequence[Rollout],
    rewards: Sequence[Mapping[str, float | str | None] | None] | None = None,
    *,
    images_dir: Path | str | None = None,
    columns: Sequence[Mapping[str, Sequence[float | None]]] | None = None,
) -> None:
    """Writes the rollouts to `path`, replacing it in one rename.

    Args:
        path: the JSONL file; its folder is made.
        rollouts: in the order they are to be read.
        rewards: one mapping of names to values per rollout, for example `dataclasses.asdict(reward)`; None for one
            that could not be scored.
        images_dir: where the images are kept; default `images` beside the folder of `path`.
        columns: what else is known of each rollout's tokens, by name a list of [T]; for who looks at the file.

    Raises:
        ValueError: rewards or columns and rollouts differ in number.
    """
    path = Path(path)
    for name, given in (("rewards", rewards), ("columns", columns)):
        if given is not None and len(given) != len(rollouts):
            raise ValueError(f"write_rollouts: {len(given)} {name} for {len(rollouts)} rollouts")
    store = ImageFolder(images_dir or images_beside(path))
    lines = []
    each = zip(rollouts, rewards or [None] * len(rollouts), columns or [{}] * len(rollouts), strict=True)
    for rollout, reward, more in each:
        row = to_row(rollout, store) | {"rewards": None if reward is None else dict(reward)}
        row["tokens"] |= {name: list(column) for name, column in more.items()}
        lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, "".join(lines).encode(errors="replace"))  # a snippet may have printed half a surrogate pair


def join_rollouts(path: Path, parts: Sequence[Path]) -> None:
    """Makes one file at `path` of files that `write_rollouts` wrote, by group and index, and removes those."""
    lines = [line + "\n" for part in parts for line in part.read_text(encoding="utf-8").split("\n") if line]
    rows = [(json.loads(line), line) for line in lines]
    rows.sort(key=lambda row: (row[0]["group"], row[0]["index"]))
    _replace(path, "".join(line for _, line in rows).encode())
    for part in parts:
        part.unlink()


def read_rollouts(
    path: Path | str, *, processor: "Processor | None" = None, images_dir: Path | str | None = None
) -> Iterator[tuple[Rollout, dict[str, float] | None]]:
    """Yields what `write_rollouts` wrote: the rollouts, equal to those written, and their rewards.

    Args:
        processor: of the model that made them; without one `Rollout.images` (the model's view) stays empty, while
            the pictures themselves are always there in `question.image` and the turns' results.
        images_dir: as in `write_rollouts`.

    Raises:
        ValueError: a line is no rollout; names file and line.
        FileNotFoundError: an image is missing from the folder.
    """
    path = Path(path)
    store = ImageFolder(images_dir or images_beside(path))
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield from_row(row, store, processor), row["rewards"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a rollout record ({error!r})") from error


def images_beside(path: Path) -> Path:
    """Where the images of the rollouts at `path` are, unless somebody says otherwise."""
    return path.parent.parent / "images"


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


def to_row(rollout: Rollout, store: ImageFolder) -> dict[str, Any]:
    """The JSON object of a rollout, without rewards; its images go into the store."""
    question = rollout.question
    return {
        "question": {
            "id": question.id,
            "image": None if question.image is None else store.add(question.image),
            "image_path": question.image_path,
            "question": question.question,
            "solution": question.solution,
            "scenario": question.scenario,
            "meta": question.meta,
            "more_images": [[path, store.add(picture)] for path, picture in question.more_images],
        },
        "group": rollout.group,
        "index": rollout.index,
        "seed": rollout.seed,
        "status": rollout.status.value,
        "answer": rollout.answer,
        "text": rollout.text,
        "turns": [_turn_to_row(turn, store) for turn in rollout.turns],
        "image_digests": [image.digest for image in rollout.images],
        "wall_s": rollout.wall_s,
        "sandbox_s": rollout.sandbox_s,
        "parent": None if rollout.parent is None else asdict(rollout.parent),
        "tokens": {name: _to_list(getattr(rollout, name)) for name in COLUMNS},
    }


def _turn_to_row(turn: Turn, store: ImageFolder) -> dict[str, Any]:
    result = turn.result
    return {
        "text": turn.text,
        "code": turn.code,
        "output_text": turn.output_text,
        "num_images": turn.num_images,
        "result": None
        if result is None
        else {
            "status": result.status.value,
            "stdout": result.stdout,
            "error": None if result.error is None else list(result.error),
            "images": [store.add(image) for image in result.images],
            "fixes": [list(fix) for fix in result.fixes],
            "wall_s": result.wall_s,
            "isolation": result.isolation,
            "restarted": result.restarted,
            "cpu_s": result.cpu_s,
            "peak_mib": result.peak_mib,
        },
    }


def _to_list(column: NDArray[Any]) -> list[Any]:
    if column.dtype == np.float32:  # the shortest decimal that reads back as the same float32: half the digits
        return [float(text) for text in column.astype("U16")]
    if column.dtype == np.bool_:
        return column.astype(np.uint8).tolist()
    return column.tolist()


def from_row(
    row: dict[str, Any], store: ImageFolder, processor: "Processor | None", question: Question | None = None
) -> Rollout:
    """What `to_row` made the object of.

    Args:
        processor: None leaves `Rollout.images` empty.
        question: of the rollout, where its pictures are not in the store; None: the row's.

    Raises:
        KeyError, TypeError, ValueError: the row is no rollout.
        OSError: an image is missing from the store or cannot be read.
    """
    if question is None:
        question = _question_from_row(row["question"], store)
    turns = [_turn_from_row(turn, store) for turn in row["turns"]]
    return Rollout(
        question=question,
        group=row["group"],
        index=row["index"],
        seed=row["seed"],
        **{
            name: np.array(row["tokens"][name], dtype=dtype)
            for name, dtype in COLUMNS.items()
            if name in row["tokens"] or name not in LATER_COLUMNS
        },
        images=[] if processor is None else [processor.preprocess(image) for image in _shown(question, turns)],
        turns=turns,
        text=row["text"],
        answer=row["answer"],
        status=RolloutStatus(row["status"]),
        wall_s=row["wall_s"],
        sandbox_s=row["sandbox_s"],
        parent=None if row.get("parent") is None else Parent(**row["parent"]),  # older records have none
    )


def _question_from_row(row: dict[str, Any], store: ImageFolder) -> Question:
    image, more = row["image"], row.get("more_images", [])
    pictures = {
        "image": None if image is None else store.get(image),
        "more_images": tuple((told, store.get(name)) for told, name in more),
    }
    return Question(**row | pictures)


def _turn_from_row(row: dict[str, Any], store: ImageFolder) -> Turn:
    result = row["result"]
    if result is not None:
        result = SandboxResult(
            **result
            | {
                "status": Status(result["status"]),
                "error": None if result["error"] is None else SnippetError(*result["error"]),
                "images": tuple(store.get(name) for name in result["images"]),
                "fixes": tuple(Fix(*fix) for fix in result["fixes"]),
            }
        )
    return Turn(**row | {"result": result})


def _shown(question: Question, turns: Sequence[Turn]) -> Iterator[Image.Image]:
    """The images the model saw, in order of appearance."""
    for _, picture in question.pictures:
        yield picture
    for turn in turns:
        if turn.num_images:
            assert turn.result is not None
            yield from turn.result.images
