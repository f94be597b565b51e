"""Look at SFT rows one by one, run their code again, accept, reject or edit; and write what reviewers would keep."""

from __future__ import annotations

import getpass
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from thyme.config import POSITIONAL
from thyme.data.config import DataConfig, Format, Layout
from thyme.sandbox.config import SandboxConfig

if TYPE_CHECKING:
    from thyme.data.resolve import Resolved
    from thyme.data.rows import Demonstration
    from thyme.data.sources import DataSet
    from thyme.report.decisions import Decisions
    from thyme.report.review_app import Rerun
    from thyme.report.review_row import ReviewRow
    from thyme.sandbox import SandboxResult


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which rows, whose decisions, and where they go."""

    rows: tuple[Path, ...] = field(metadata=POSITIONAL)
    """Files, or folders of *.parquet, *.jsonl and *.json, of SFT rows."""
    reviewer: str | None = None
    """Whose decisions; none: who is logged in. A second name is a second opinion: it sees the first when it has its
    own."""
    decisions: Path | None = None
    """The SQLite file that decisions are added to; none: beside the first of the rows, its name and .review.sqlite."""
    export: Path | None = None
    """Write the rows that all who decided would keep, edits in place, to this .jsonl or .parquet file, and end."""
    to: Layout = "thyme"
    """Layout of what is written."""
    format: Format = "auto"
    """How rows are laid out: thyme, messages, openai, verl or sharegpt; auto tells by each row's keys."""
    images: Path | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""
    host: str = "127.0.0.1"
    """Where the page is served; whoever reaches another address can decide, and run the rows' code, too."""
    port: int = 8718
    """Its port; 0 takes a free one."""
    browser: bool = True
    """Whether a browser is opened."""
    sandbox: SandboxConfig = field(default_factory=lambda: SandboxConfig(workers=1))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: {self.port} must be in [0, 65535]")
        if self.reviewer is not None and not self.reviewer.strip():
            raise ValueError("reviewer: a name is needed")


def run(config: Config) -> None:
    """Serves the page until Ctrl-C, or writes what was decided.

    Raises:
        ValueError: no file of rows, or a file of decisions that is none.
    """
    from contextlib import closing

    from thyme.report.decisions import Decisions

    first = config.rows[0]
    path = config.decisions or first.with_name(f"{first.name}.review.sqlite")
    if config.export is not None:
        if not path.is_file():
            raise ValueError(f"decisions {path}: no such file: review the rows first, or name it (--decisions)")
        with closing(Decisions(path)) as decisions:
            export(config, decisions, config.export)
        return
    data = open_rows(config)
    with closing(Decisions(path)) as decisions, rerun(config.sandbox) as (again, why_not):
        serve_review(config, data, decisions, again, why_not)


def serve_review(
    config: Config, data: DataSet[Demonstration], decisions: Decisions, again: Rerun | None, why_not: str
) -> None:
    """Serves the page."""
    from thyme.report.review_app import Review, review_app
    from thyme.report.web import serve

    review = Review(
        ReviewRows(data),
        title=", ".join(path.name for path in config.rows),
        summary=data.summary(),
        decisions=decisions,
        reviewer=config.reviewer or _logged_in(),
        rerun=again,
        problems=problems,
        why_not=why_not,
    )
    what = f"{len(data)} rows, decisions in {decisions.path}"
    serve(review_app(review, config.host), what, host=config.host, port=config.port, opens_browser=config.browser)


def _logged_in() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise ValueError("reviewer: nobody is logged in by name: say --reviewer NAME") from None


def open_rows(config: Config) -> DataSet[Demonstration]:
    """The usable rows.

    Raises:
        ValueError: a path that is not there, or a file without one.
    """
    from thyme.data.sources import open_data

    images = None if config.images is None else str(config.images)
    return open_data(config.rows, DataConfig(format=config.format, images=images), "sft")


class ReviewRows(Sequence["ReviewRow"]):
    """Rows of a data set as a review shows them."""

    def __init__(self, data: DataSet[Demonstration]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> ReviewRow:  # type: ignore[override]  # never sliced
        from thyme.report.review_row import ReviewRow

        row = self._data[index]
        own = len(row.question.pictures)
        return ReviewRow(
            place=row.question.id, question=row.question, response=row.response, images=tuple(row.images[own:])
        )


def problems(response: str) -> list[str]:
    """What training would refuse of a response."""
    from thyme.data.tags import tag_problems
    from thyme.rewards import formatting

    found = list(tag_problems(response))
    if not formatting(response):
        found.append("the format earns nothing: <think>...</think>, one newline, <answer>...</answer> and no more")
    return found


@contextmanager
def rerun(config: SandboxConfig) -> Iterator[tuple[Rerun | None, str]]:
    """What runs code blocks in one session, one row at a time; or None, and why there is no sandbox here."""
    from thyme.sandbox import Sandbox, SandboxUnavailable

    try:
        opened = Sandbox(config)
    except SandboxUnavailable as error:
        yield None, str(error).partition("\n")[0]
        return
    one_at_a_time = threading.Lock()

    def again(row: ReviewRow, codes: Sequence[str]) -> list[SandboxResult]:
        question = row.question
        session = sandbox.session(question.image, question.image_path or None, seed=0, more_images=question.more_images)
        try:
            with one_at_a_time:
                return [session.run(code) for code in codes]
        finally:
            session.close()

    with opened as sandbox:
        yield again, ""


def export(config: Config, decisions: Decisions, out: Path) -> None:
    """Writes the rows that all who decided would keep, and says what was left out."""
    from thyme.data.convert import convert
    from thyme.report.decisions import agreements, settled
    from thyme.report.review_row import row_digest

    words = decisions.latest()

    def kept(row: Resolved) -> str | None:
        if row.response is None:
            return None
        question = row.question
        digest = row_digest(question.question, question.image_path, row.response, row.images)
        decision = settled(words.get(digest, {}))
        if decision is None:
            return None
        return row.response if decision.response is None else decision.response

    report = convert(config.rows, out, config.to, layout=config.format, images=config.images, keep=kept)
    print(f"{out}: {report.written} rows")
    for reason, count in report.left_out.most_common():
        print(f"left out {count}: {reason} ({report.examples[reason]})")
    for pair in agreements(words):
        kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.3f}"
        print(f"{pair.one} and {pair.other}: {pair.agreed} of {pair.rows} rows alike, kappa {kappa}")
