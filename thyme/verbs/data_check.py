"""Name every bad row of parquet or JSON lines: tags, pictures, text, answers that no later step would take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.config import POSITIONAL
from thyme.data.config import Format
from thyme.result import Result
from thyme.verbs.notes import note
from thyme.verbs.rows import row_progress

if TYPE_CHECKING:
    from thyme.data.check import CheckReport, Later
    from thyme.data.rows import Demonstration, Question
    from thyme.model.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is checked, and for which model."""

    paths: tuple[Path, ...] = field(metadata=POSITIONAL)
    """Files, or folders of *.parquet, *.jsonl and *.json."""
    format: Format = "auto"
    """How rows are laid out: thyme, messages, openai, verl or sharegpt; auto tells by each row's keys."""
    images: Path | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""
    model: Path | None = None
    """Checkpoint whose tokenizer and picture sizes are asked; none: bytes, and Qwen2.5-VL's sizes."""


def run(config: Config) -> Result:
    """Prints every problem as it is found, a line each, and the counts of each file; the exit code is 2 where rows are
    bad.

    Raises:
        ValueError: no rows at all.
    """
    from thyme.data.check import Problem, check_file, plain_processor
    from thyme.data.tables.opening import data_files
    from thyme.model.processor import Processor

    processor = plain_processor() if config.model is None else Processor.load(config.model)
    later, bad = training_steps(processor), dict[Path, int]()
    found: list[dict[str, Any]] = []
    files = data_files(config.paths)
    with row_progress(files, "check") as line:
        for path in files:
            problems: list[Problem] = []

            def tell(problem: Problem, problems: list[Problem] = problems) -> None:
                problems.append(problem)
                print(problem)

            how: Any = {"layout": config.format, "images": config.images, "later": later}
            report = check_file(path, **how, on_problem=tell, on_row=line.advance)
            found.append({"path": path, "report": report, "problems": problems})
            for told in _told(path, report):
                print(told)
            if report.bad_rows:
                bad[path] = report.bad_rows
    if bad:
        where = ", ".join(f"{path}: {count}" for path, count in bad.items())
        note(f"{where} bad rows, named above: mend or drop them")
    return Result({"files": found}, 2 if bad else 0)


def _told(path: Path, report: CheckReport) -> Iterator[str]:
    """The counts of a file."""
    yield f"{path}: {report.sft_rows} SFT rows, {report.rl_rows} RL rows, {report.images} images"
    if report.other_prompts:
        yield f"{path}: {report.other_prompts} rows with another system prompt, in whose place training puts ours"
    if report.bad_rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common())
        yield f"{path}: {report.bad_rows} bad rows: {reasons}"


def training_steps(processor: Processor) -> Later:
    """What SFT and RL refuse of a well-formed row, or would make nothing of."""
    from thyme.data.check import model_steps
    from thyme.data.rows import Demonstration
    from thyme.rewards import formatting, judged
    from thyme.rewards.spelling import normal
    from thyme.train.masks import LOSS_RULES, loss_spans
    from thyme.train.sft import row_sample

    of_the_model = model_steps(processor)

    def refusals(row: Demonstration | Question) -> Iterator[str]:
        refused = list(of_the_model(row))
        yield from refused
        if isinstance(row, Demonstration):
            if not formatting(row.response):
                yield "the format earns nothing: <think>...</think>, one newline, <answer>...</answer> and no more"
            for rule in LOSS_RULES:
                if not any(row.response[start:end].strip() for start, end in loss_spans(row.response, rule)):
                    yield f"nothing of the response is trained under loss rule {rule!r}: it is all sandbox output"
            if not refused:
                row_sample(processor, row, "all", "thyme")
            return
        earned, error = judged(row.solution, row.solution, row.question)
        if not earned or not normal(row.solution):
            yield f"the solution itself earns nothing ({error or 'it says nothing'}): mend it"

    return refusals
