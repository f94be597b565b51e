"""The check of a JSONL file of SFT or RL rows: every row that a later step would refuse, named; nothing is repaired.

The released SFT set has hundreds of rows with unbalanced tags; a row whose picture the processor refuses would crash a
training step hours later. So the functions of those steps are asked themselves. A row is read, checked and forgotten:
memory is bounded by the largest row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from thyme.data.formats import decode_image, read_demonstration, read_question
from thyme.data.rows import Demonstration, Question
from thyme.rollout.prompts import build_prompt, extract_answer

if TYPE_CHECKING:
    from thyme.model.processor import Processor

PAIRED_TAGS = ("think", "code", "sandbox_output", "answer")
MAX_ROW_BYTES = 256 * 1024**2
"""A longer line is named and skipped."""
MAX_KEPT = 1_000
"""Problems that a report keeps; all are counted and told."""

Later = Callable[[Demonstration | Question], Iterator[str]]
"""What later steps say of a row that is well formed: a message for each refusal. What it raises is one too."""

_TAG = re.compile(rf"<(/?)({'|'.join(PAIRED_TAGS)})>")
_FILES = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_TO_RL = "write messages, images, solution and question, one object a line"
_TO_SFT = "write image, question and response, one object a line"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row."""

    path: Path
    row: int
    """Line in the file, from 1."""
    message: str
    """What it is and, behind a colon, what to do."""

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


def check_file(
    path: str | Path, *, later: Later | None = None, on_problem: Callable[[Problem], object] | None = None
) -> CheckReport:
    """Checks every row of a JSONL file; kinds may be mixed and are told apart by "response" and "messages".

    Args:
        path: one JSON object a line.
        later: asked about every row that is well formed; None: picture processor and tokenizer (`model_steps`).
        on_problem: gets every problem as it is found.

    Raises:
        ValueError: the file is missing, is no JSONL or holds no rows.
    """
    path, report = Path(path), CheckReport()
    if not path.is_file():
        raise ValueError(f"data file {path}: no such file" if not path.is_dir() else f"data file {path}: is a folder")
    rows, kept = 0, list[Problem]()
    with path.open("rb") as file:
        _refuse_other_files(path, file)
        for number, line in _lines(file):
            rows += 1
            found = False
            for message in _line_problems(line, report, later or model_steps(plain_processor())):
                problem, found = Problem(path, number, message), True
                if on_problem is not None:
                    on_problem(problem)
                if len(kept) < MAX_KEPT:
                    kept.append(problem)
            report.bad_rows += found
    if rows == 0:
        raise ValueError(f"data file {path}: no rows")
    report.problems = tuple(kept)
    return report


def model_steps(processor: Processor, system: str | None = None) -> Later:
    """What a checkpoint's picture processor and tokenizer refuse.

    Args:
        processor: the checkpoint's.
        system: system prompt of SFT rows, if any.
    """

    def refusals(row: Demonstration | Question) -> Iterator[str]:
        if isinstance(row, Demonstration):
            images = row.images
            processor.encode(processor.chat(row.prompt, system))
            processor.encode_untrusted(row.response)
        else:
            images = [] if row.image is None else [row.image]
            build_prompt(row, "thyme", processor)
        for index, image in enumerate(images):
            try:
                processor.preprocess(image)
            except ValueError as error:
                yield f"image {index} is refused by the picture processor: {error}"

    return refusals


def tag_problems(response: str) -> Iterator[str]:
    """Tags that are not closed, closed without being open, crossed, or where none may be; in order of appearance.

    Inside of code only `</code>` is a tag, as while decoding: a string may spell the others.
    """
    opened: list[str] = []
    after_code = -1
    for match in _TAG.finditer(response):
        closes, tag = match.group(1) == "/", match.group(2)
        place = f"{match.group()} at character {match.start()}"
        if opened and opened[-1] in ("code", "sandbox_output") and tag != opened[-1]:
            if (opened[-1], closes, tag) == ("code", False, "sandbox_output"):
                yield f"{place} opens inside <code>: close the code before"
            continue
        if not closes:
            if tag in opened:
                yield f"{place} opens inside <{tag}>: remove it"
            elif tag == "sandbox_output" and (after_code < 0 or response[after_code : match.start()].strip()):
                yield f"{place} follows no </code>: an output stands behind the code that made it"
            opened.append(tag)
            continue
        if tag not in opened:
            yield f"{place} closes nothing: remove it"
            continue
        if opened[-1] != tag and tag != "code":
            yield f"{place} crosses <{opened[-1]}>, which is still open: close that first"
        del opened[len(opened) - 1 - opened[::-1].index(tag)]
        after_code = match.end() if tag == "code" else -1
    for tag in dict.fromkeys(opened):
        yield f"<{tag}> is never closed: close it or drop the row"


def _refuse_other_files(path: Path, file: BinaryIO) -> None:
    head = file.read(4)
    file.seek(0)
    for magic, name in _FILES.items():
        if head.startswith(magic):
            raise ValueError(f"data file {path}: is a {name} file: write one JSON object a line, in UTF-8")
    if path.suffix.lower() in (".tsv", ".csv"):
        raise ValueError(f"data file {path}: is a table: write one JSON object a line")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, blank ones left out; of one that is too long only more than `MAX_ROW_BYTES`."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES + 1)
        if line.strip():
            yield number, line


def _line_problems(line: bytes, report: CheckReport, later: Later) -> Iterator[str]:
    """All that is wrong with a line, whatever reading it raises."""
    if len(line) > MAX_ROW_BYTES:
        yield f"over {MAX_ROW_BYTES >> 20} MiB: smaller pictures, or fewer"
        return
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}: save the file in UTF-8"
        return
    except Exception as error:  # RecursionError and MemoryError too
        array = " (one JSON array? write one object a line)" if line.lstrip().startswith(b"[") else ""
        mark = " (a byte order mark: save the file without it)" if line.startswith(b"\xef\xbb\xbf") else ""
        yield f"not JSON: {type(error).__name__}: {error}{array}{mark}"
        return
    try:
        yield from _row_problems(row, report, later)
    except Exception as error:
        yield f"refused: {type(error).__name__}: {error}: drop the row"


def _row_problems(row: Any, report: CheckReport, later: Later) -> Iterator[str]:
    if (other := _other_layout(row)) is not None:
        yield other
        return
    is_sft = "response" in row
    report.sft_rows += is_sft
    report.rl_rows += not is_sft
    key = "image" if is_sft else "images"
    problems = [*_text_problems(row), *(_sft_problems(row) if is_sft else _rl_problems(row))]
    pictures = row.get(key) or []
    if not isinstance(pictures, list):
        problems.append(f"{key} must be a list of base64 strings")
        pictures = []
    report.images += len(pictures)
    for index, picture in enumerate(pictures):
        try:
            decode_image(picture, f"image {index}")
        except ValueError as error:
            problems.append(f"image {index} cannot be read: {str(error).removeprefix(f'image {index}: ')}")
    yield from problems
    if not problems:
        yield from later(read_demonstration(row) if is_sft else read_question(row))


def _other_layout(row: Any) -> str | None:
    """What a row is that is neither of ours, and what to do with it."""
    if not isinstance(row, dict):
        return f"neither an SFT row ('response') nor an RL row ('messages'): a {type(row).__name__}, not an object"
    if "response" in row:
        return None
    if "messages" in row:
        messages = row["messages"]
        listed = messages if isinstance(messages, list) else []
        if any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in listed):
            return f"a chat row as OpenAI's API takes it (content in parts), which is not read: {_TO_RL}"
        if "solution" not in row and any(isinstance(m, dict) and m.get("role") == "assistant" for m in listed):
            return f"a chat row (messages with an assistant's turn), which is not read: {_TO_SFT}"
        return None
    if "prompt" in row and ("reward_model" in row or "data_source" in row):
        return (
            f"a verl row (prompt, reward_model), which is not read: {_TO_RL}; the solution is reward_model.ground_truth"
        )
    if "conversations" in row:
        return f"a ShareGPT row (conversations), which is not read: {_TO_SFT}"
    keys = ", ".join(map(repr, list(row)[:6])) or "no key"
    return f"neither an SFT row ('response') nor an RL row ('messages'), but {keys}"


def _text_problems(row: dict[str, Any]) -> Iterator[str]:
    """Text that no tokenizer takes: half of a surrogate pair."""
    texts = {key: row.get(key) for key in ("question", "response", "solution")}
    if isinstance(row.get("messages"), list):
        texts |= {f"messages[{i}]": m.get("content") for i, m in enumerate(row["messages"]) if isinstance(m, dict)}
    for key, text in texts.items():
        try:
            _ = text.encode("utf-8") if isinstance(text, str) else b""
        except UnicodeEncodeError as error:
            yield f"{key} holds half a character ({error.object[error.start]!r}) at {error.start}: mend its encoding"


def _sft_problems(row: dict[str, Any]) -> Iterator[str]:
    missing = [key for key in ("question", "response") if not isinstance(row.get(key), str) or not row[key].strip()]
    if missing:
        yield f"{' and '.join(missing)} must be text"
        return
    response = row["response"]
    yield from _count_problems(row["question"] + response, row.get("image"), "image")
    yield from tag_problems(response)
    answer = extract_answer(response)
    if answer is None:
        yield "no <answer> that decoding would see: end the response with <answer>...</answer>"
    elif not answer:
        yield "the <answer> is empty: say one"


def _rl_problems(row: dict[str, Any]) -> Iterator[str]:
    for key in ("question", "solution"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            yield f"{key} must be text"
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    ):
        yield "messages must be a list of {role, content} with text"
        return
    users = [message["content"] for message in messages if message.get("role") == "user"]
    if len(users) != 1:
        yield f"messages must hold one user turn, found {len(users)}"
    yield from _count_problems("".join(users), row.get("images"), "images")
    if isinstance(row.get("images"), list) and len(row["images"]) > 1:
        yield f"{len(row['images'])} images: a question has one picture at most; lay them side by side"


def _count_problems(text: str, images: Any, key: str) -> Iterator[str]:
    if isinstance(images, list) or images is None:
        marks, count = text.count("<image>"), len(images or ())
        if marks != count:
            yield f"{marks} <image> in the text, {count} in {key}: each picture stands once, in order"


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
