"""What a run reads: rows of files (`[data]`), or the toy world's, which only the embedded model and what came of it learn.

A finite data set becomes an endless stream whose every epoch has an order of its own, a function of seed and step alone;
what a step needs is decoded and prepared ahead of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from thyme.verbs.config import EMBEDDED, RowsConfig
from thyme.verbs.folders import model_folder

if TYPE_CHECKING:
    from thyme.data.rows import Demonstration, Question
    from thyme.data.sources import DataSet
    from thyme.data.streams import Stream

T = TypeVar("T")
Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[T]):
    """Rows to train on or to ask."""

    stream: Stream[T]
    """Endless; item i is always the same."""
    count: int | None
    """Rows in an epoch; None: as many as are asked for, all different."""
    digest: str
    """Names the data: equal digests, equal rows."""


def require_rows(config: RowsConfig, split: Split) -> None:
    """Refuses, before a model is loaded, a run that names nothing to read.

    Raises:
        ValueError: no files, and the model is not the embedded one or a checkpoint of it.
        FileNotFoundError: no such model.
    """
    if getattr(config.data, split) or config.model == EMBEDDED:
        return
    from thyme.toy.tokenizer import is_toy_folder

    if not is_toy_folder(model_folder(Path(config.model))):
        raise ValueError(
            f"model {config.model}: nothing to read: say data.{split}, files or folders of rows "
            f"(--data.{split} PATH, or [data] {split} = [\"PATH\"] in a recipe)"
        )


@contextmanager
def prepared_samples(
    config: RowsConfig, opened: Opened, stage: SftConfig, toy: Stream[Demonstration]
) -> Iterator[Rows[Sample]]:
    """Samples for SFT: of the files of `data.train`, else of `toy`."""
    from thyme.train.sft import row_samples
    from thyme.verbs.opening import styled

    with _rows(config, "sft", toy) as rows:
        stream, system = styled(rows.stream, opened.dialect)
        samples = row_samples(opened.processor, stream, stage.loss_rule, system)
        with _ahead(config, samples, stage.batch_size) as prepared:
            yield Rows(stream=prepared, count=rows.count, digest=rows.digest)


@contextmanager
def questions(config: RowsConfig) -> Iterator[Rows[Question]]:
    """Training questions: the files of `data.train`, else the toy world's."""
    from thyme.toy.streams import question_stream

    if not config.data.train:
        yield Rows(stream=question_stream(config.toy), count=None, digest=_toy_digest(config))
        return
    with _opened(config, "rl", "train") as rows:
        yield _shuffled(rows, config)


def heldout_questions(config: RowsConfig, count: int) -> list[Question]:
    """The first `count` held-out questions, none of which is trained on; all where there are fewer."""
    from thyme.toy.streams import question_stream

    if not config.data.heldout:
        return list(question_stream(config.toy, "heldout")(0, count))
    with _opened(config, "rl", "heldout") as rows:
        return [rows[index] for index in range(min(count, len(rows)))]
