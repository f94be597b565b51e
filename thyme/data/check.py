"""The check of a file of SFT or RL rows: every row that a later step would refuse, named; nothing is repaired.

The released SFT set has hundreds of rows with unbalanced tags; a row whose picture the processor refuses would crash a
training step hours later. So the functions of those steps are asked themselves. A row is read, checked and forgotten:
memory is bounded by the largest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from thyme.data.config import Format
from thyme.data.layouts.known import read_row
from thyme.data.problems import is_ours, kind_of, text_problems
from thyme.data.refusal import BadRow, Refusal
from thyme.data.resolve import resolve
from thyme.data.rows import Demonstration, Question
from thyme.data.tables.opening import open_table
from thyme.data.tables.table import Entry
from thyme.rollout.prompts import build_prompt

if TYPE_CHECKING:
    from thyme.model.processor import Processor

MAX_KEPT = 1_000
"""Problems that a report keeps; all are counted and told."""

Later = Callable[[Demonstration | Question], Iterator[str]]
"""What later steps say of a row that is well formed: a message for each refusal. What it raises is one too."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row."""

    path: Path
    row: int
    """Line or row in the file, from 1."""
    message: str
    """What it is and, behind a colon, what to do."""
    reason: str = ""
    """The kind of it in a word or two."""

    def __str__(self) -> str:
        text = " ".join(f"{self.path}: row {self.row}: {self.message}".split())
        # Text that no terminal could print is among what is wrong with rows.
        return text[:500].encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(slots=True)
class CheckReport:
    """What a file holds."""

    sft_rows: int = 0
    rl_rows: int = 0
    images: int = 0
    bad_rows: int = 0
    problems: tuple[Problem, ...] = ()
    """The first `MAX_KEPT`."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad rows by the reason told first."""
    other_prompts: int = 0
    """Rows with a system prompt that is not ours: in training it is replaced by ours."""


def check_file(
    path: str | Path,
    *,
    layout: Format = "auto",
    images: str | Path | None = None,
    later: Later | None = None,
    on_problem: Callable[[Problem], object] | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> CheckReport:
    """Checks every row of a file; kinds may be mixed: a row with a response is an SFT row, another an RL row.

    Args:
        path: parquet, or one JSON object a line.
        layout: of the rows; "auto" tells by each row's keys.
        images: the folder that relative paths of pictures start from; None: the file's own.
        later: asked about every row that is well formed; None: picture processor and tokenizer (`model_steps`).
        on_problem: gets every problem as it is found.
        on_row: is called for every row that was looked at.

    Raises:
        ValueError: the file is missing, is no file of rows or holds none.
    """
    path, report = Path(path), CheckReport()
    folder = path.parent if images is None else Path(images)
    rows, kept = 0, list[Problem]()
    later = later or model_steps(plain_processor())
    for entry in open_table(path).scan():
        rows += 1
        first: str | None = None
        for reason, message in _problems(entry, report, layout, folder, later):
            problem, first = Problem(path, entry.number, message, reason), first or reason
            if on_problem is not None:
                on_problem(problem)
            if len(kept) < MAX_KEPT:
                kept.append(problem)
        if first is not None:
            report.bad_rows += 1
            report.reasons[first] += 1
        on_row()
    if rows == 0:
        raise ValueError(f"data file {path}: no rows")
    report.problems = tuple(kept)
    return report


def model_steps(processor: Processor) -> Later:
    """What a checkpoint's picture processor and tokenizer refuse."""

    def refusals(row: Demonstration | Question) -> Iterator[str]:
        if isinstance(row, Demonstration):
            images = row.images
            build_prompt(row.question, "thyme", processor)
            processor.encode_untrusted(row.response)
        else:
            images = [picture for _, picture in row.pictures]
            build_prompt(row, "thyme", processor)
        for index, image in enumerate(images):
            try:
                processor.preprocess(image)
            except ValueError as error:
                yield f"image {index} is refused by the picture processor: {error}"

    return refusals


def _problems(entry: Entry, report: CheckReport, layout: Format, folder: Path, later: Later) -> Iterator[Refusal]:
    """All that is wrong with a row, whatever reading it raises."""
    if entry.refusal is not None:
        yield entry.refusal
        return
    try:
        row = read_row(entry.value, layout)
        kind = kind_of(row)
        report.sft_rows += kind == "sft"
        report.rl_rows += kind == "rl"
        report.images += len(row.pictures or ())
        report.other_prompts += not is_ours(row.system)
        problems = list(text_problems(row, kind))
        yield from problems
        if problems:
            return
        ready = resolve(row, kind, name=str(entry.number), source="", folder=folder)
        for message in later(ready.demonstration() if kind == "sft" else ready.question):
            yield Refusal("refused later", message)
    except BadRow as error:
        yield error.refusal
    except Exception as error:  # RecursionError and MemoryError too
        yield Refusal("refused later", f"refused: {type(error).__name__}: {error}: drop the row")


@cache
def plain_processor() -> Processor:
    """A tokenizer of single bytes and Qwen2.5-VL's own picture sizes, where no checkpoint is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thyme.model.config import ImageConfig
    from thyme.model.processor import Processor

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    tokenizer.add_special_tokens(names)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    return Processor(fast, ImageConfig())
