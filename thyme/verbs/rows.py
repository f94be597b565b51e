"""What a run reads: rows of files (`[data]`), or the toy world's, which only the embedded model and its heirs learn.

A finite data set becomes an endless stream whose every epoch has an order of its own, a function of seed and step
alone; what coming steps need is decoded and prepared ahead of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from thyme.progress import Line, is_watched, progress
from thyme.verbs.config import EMBEDDED, RowsConfig, RunConfig, TrainingConfig
from thyme.verbs.folders import model_folder
from thyme.verbs.notes import note

if TYPE_CHECKING:
    from thyme.data.rows import Demonstration, Question
    from thyme.data.sources import DataSet
    from thyme.data.streams import Stream
    from thyme.model.processor import Processor
    from thyme.train.config import SftConfig
    from thyme.train.packing import Sample
    from thyme.verbs.opening import Opened

T = TypeVar("T")
Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[T]):
    """Rows to train on."""

    stream: Stream[T]
    """Endless; item i is always the same."""
    count: int | None
    """Rows in an epoch; None: as many as are asked for, all different."""


def require_rows(config: RowsConfig, split: Split) -> None:
    """Refuses, before a model is loaded, a run that names nothing to read.

    Raises:
        ValueError: no files, and the model is not the embedded one or a checkpoint of it.
        FileNotFoundError: no such model.
    """
    if not getattr(config.data, split) and not _is_toy(config):
        raise ValueError(
            f"model {config.model}: nothing to read: say data.{split}, files or folders of rows "
            f'(--data.{split} PATH, or {split} = ["PATH"] in a recipe\'s table [data])'
        )


def require_training_rows(config: TrainingConfig) -> None:
    """The same for what a training verb reads: `data.train`, and `data.heldout` where it is asked on the way."""
    require_rows(config, "train")
    if config.eval.every_steps:
        require_rows(config, "heldout")


def data_digest(config: RowsConfig) -> str:
    """Names the files of `data.train` and how they are read; "" for the toy world, which the config describes.

    Raises:
        ValueError: a file that is not there.
    """
    from thyme.data.tables.opening import data_files

    if not config.data.train:
        return ""
    files = [(path.name, path.stat().st_size) for path in data_files(config.data.train)]
    return hashlib.sha256(repr((config.data.format, config.data.seed, files)).encode()).hexdigest()


def require_toy(config: RunConfig) -> None:
    """Refuses a model that is not the embedded one or a checkpoint of it.

    Raises:
        ValueError: it is another.
        FileNotFoundError: no such model.
    """
    if not _is_toy(config):
        raise ValueError(f"model {config.model}: only the embedded model has a base stage: a real one is pre-trained")


@contextmanager
def prepared_samples(
    config: RowsConfig, opened: Opened, stage: SftConfig, toy: Stream[Demonstration]
) -> Iterator[Rows[Sample]]:
    """Samples for SFT: of the files of `data.train`, else of `toy`."""
    from thyme.data.ahead import Ahead
    from thyme.train.sft import row_samples, sample_bytes

    def samples(rows: Stream[Demonstration]) -> Stream[Sample]:
        return row_samples(opened.processor, rows, stage.loss_rule, opened.dialect.prompt_style)

    if not config.data.train:
        yield Rows(stream=samples(toy), count=None)
        return
    files = open_files(config, "train", "sft", opened.processor)
    with _told(files), Ahead(samples(files.stream(config.data.seed)), config.data, sample_bytes) as ahead:
        yield Rows(stream=ahead, count=len(files))


@contextmanager
def prepared_questions(config: RowsConfig, opened: Opened) -> Iterator[Rows[Question]]:
    """Training questions: of the files of `data.train`, else the toy world's."""
    from thyme.data.ahead import Ahead, question_bytes
    from thyme.toy.streams import question_stream

    if not config.data.train:
        yield Rows(stream=question_stream(config.toy), count=None)
        return
    files = open_files(config, "train", "rl", opened.processor)
    with _told(files), Ahead(files.stream(config.data.seed), config.data, question_bytes) as ahead:
        yield Rows(stream=ahead, count=len(files))


def heldout_questions(config: RowsConfig, count: int, processor: Processor | None = None) -> list[Question]:
    """The first `count` held-out questions, none of which is trained on; all where there are fewer.

    Args:
        config: its tables `data` and `toy`.
        count: questions at most.
        processor: leaves out pictures that it refuses; None: none is asked for here.
    """
    from thyme.toy.streams import question_stream

    if not config.data.heldout:
        return list(question_stream(config.toy, "heldout")(0, count))
    return open_files(config, "heldout", "rl", processor).first(count)


@overload
def open_files(
    config: RowsConfig, split: Split, kind: Literal["sft"], processor: Processor | None
) -> DataSet[Demonstration]: ...
@overload
def open_files(
    config: RowsConfig, split: Split, kind: Literal["rl"], processor: Processor | None
) -> DataSet[Question]: ...
def open_files(
    config: RowsConfig, split: Split, kind: Literal["sft", "rl"], processor: Processor | None
) -> DataSet[Demonstration] | DataSet[Question]:
    """The usable rows of `data.train` or `data.heldout`; says on stderr what was left out, and why.

    Raises:
        ValueError: a file that is not there or cannot be read, or one without a usable row.
    """
    from thyme.data.sources import open_data

    fits = None if processor is None else processor.size_of
    rows = open_data(getattr(config.data, split), config.data, kind, fits=fits)
    note(f"data.{split}: {rows.summary()}")
    return rows


def _is_toy(config: RunConfig) -> bool:
    from thyme.toy.tokenizer import is_toy_folder

    return config.model == EMBEDDED or is_toy_folder(model_folder(Path(config.model)))


@contextmanager
def _told(files: DataSet[Any]) -> Iterator[None]:
    """Says at the end on stderr what more was left out on the way."""
    before = files.left_out.total()
    try:
        yield
    finally:
        if files.left_out.total() > before:
            note(f"data.train: {files.summary()}")


@contextmanager
def row_progress(files: Sequence[Path], label: str) -> Iterator[Line]:
    """The progress line of what goes through the rows of files; they are counted only where somebody looks."""
    from thyme.data.tables.opening import count_rows

    with progress(count_rows(files) if is_watched() else None, label, "row") as line:
        yield line
