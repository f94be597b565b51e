"""What a run reads: rows of files (`[data]`), or the toy world's, which only the embedded model and what came of it learn.

A finite data set becomes an endless stream whose every epoch has an order of its own, a function of seed and step alone;
what coming steps need is decoded and prepared ahead of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from thyme.verbs.config import EMBEDDED, RowsConfig, RunConfig
from thyme.verbs.folders import model_folder

if TYPE_CHECKING:
    from thyme.data.rows import Demonstration, Question
    from thyme.data.streams import Stream
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
    digest: str
    """Names the data: equal digests, equal rows."""


def require_rows(config: RowsConfig, split: Split) -> None:
    """Refuses, before a model is loaded, a run that names nothing to read.

    Raises:
        ValueError: no files, and the model is not the embedded one or a checkpoint of it.
        FileNotFoundError: no such model.
    """
    if not getattr(config.data, split) and not _is_toy(config):
        raise ValueError(
            f"model {config.model}: nothing to read: say data.{split}, files or folders of rows "
            f"(--data.{split} PATH, or {split} = [\"PATH\"] in a recipe's table [data])"
        )


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
    from thyme.train.sft import row_samples
    from thyme.verbs.opening import styled

    with _demonstrations(config, toy) as rows:
        stream, system = styled(rows.stream, opened.dialect)
        samples = row_samples(opened.processor, stream, stage.loss_rule, system)
        with _ahead(config, samples, stage.batch_size) as prepared:
            yield Rows(stream=prepared, count=rows.count, digest=rows.digest)


@contextmanager
def prepared_questions(config: RowsConfig, batch_size: int) -> Iterator[Rows[Question]]:
    """Training questions: of the files of `data.train`, else the toy world's."""
    from thyme.toy.streams import question_stream
