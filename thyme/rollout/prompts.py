"""The text interface of Thyme: prompts, the code block, the answer.

Byte-equal to what the released checkpoints were trained on (Thyme, tables 1 and 2), the stray `**` after "Path:" and
"Size:" and the newline at the end of the user prompt included. Coordinates in the model's code are pixels of the
original image, hence the size told here is the original one and not the one the vision tower sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from thyme.engine import Prompt
    from thyme.model.processor import Processor
    from thyme.rollout.types import Question

PromptStyle = Literal["thyme", "short", "direct"]

SYSTEM_PROMPT = """You are a helpful assistant.

Solve the following problem step by step, and optionally write Python code for image manipulation to enhance your \
reasoning process. The Python code will be executed by an external sandbox, and the processed image or result \
(wrapped in <sandbox_output></sandbox_output>) can be returned to aid your reasoning and help you arrive at the final \
answer.

**Reasoning & Image Manipulation (Optional but Encouraged):**
    * You have the capability to write executable Python code to perform image manipulations (e.g., cropping to a \
Region of Interest (ROI), resizing, rotation, adjusting contrast) or perform calculation for better reasoning.
    * The code will be executed in a secure sandbox, and its output will be provided back to you for further analysis.
    * All Python code snippets **must** be wrapped as follows:
    <code>
    ```python
    # your code.
    ```
    </code>
    * At the end of the code, print the path of the processed image (processed_path) or the result for further \
processing in a sandbox environment."""

DIRECT_SYSTEM_PROMPT = "You are a helpful assistant."
"""Of Thyme's evaluation where it answers without tools."""

_UNREADABLE_SIZE = "Unable to determine (error reading image)"

_OUTPUT_FORMAT = """### **Output Format (strict adherence required):**

<think>Your detailed reasoning process, including any code, should go here.</think>
<answer>Your final answer to the user's question goes here.</answer>
"""

# Fences and the word "python" are optional; the first block counts.
_CODE = re.compile(r"<code>\s*(?:```\s*)?(?:python\s*)?([\s\S]*?)\s*(?:```\s*)?</code>", re.IGNORECASE)
# The tags that count outside of code and sandbox output, as in thyme/engine/tags.py.
_TAG = re.compile(r"</?answer>|<(code|sandbox_output)>")
_BRACE = re.compile(r"[{}]")


def user_prompt(
    question: str,
    image_path: str,
    image_size: tuple[int, int] | None,
    more: Sequence[tuple[str, tuple[int, int]]] = (),
) -> str:
    """The user turn of a question about an image; `image_size` is (width, height) in original pixels.

    None says that the image could not be read. The text starts with `<image>`, which stands for the picture. Further
    pictures, as (path, size) in `more`, each add such a line at the start and their path and size behind the first's.
    """
    return "".join(_user_parts(question, [(image_path, image_size), *more]))


def text_prompt(question: str) -> str:
    """The user turn of a question without an image: the same, less the three lines that speak of one."""
    return f"{question}\n\n{_OUTPUT_FORMAT}"


def direct_prompt(question: str) -> str:
    """The user turn of Thyme's evaluation where it answers without tools; pictures stand before it."""
    return (
        "You are an advanced AI assistant specializing in visual question answering (VQA). You don't need to perform "
        "any image manipulation or reasoning. Give the answer to the following question directly.\n"
        f'**User\'s Question:** "{question}"'
    )


def extract_code(text: str) -> str | None:
    """The first code block's content without fences; None without a closed block, "" for an empty one."""
    match = _CODE.search(text)
    return None if match is None else match.group(1).strip()


def extract_answer(text: str) -> str | None:
    r"""The answer that an assistant's turn gives, None if it gives none.

    It is what the first `<answer>` holds, stripped; if that holds a `\boxed{}`, what the last balanced one holds. Tags
    count as they do while decoding (thyme/engine/tags.py): none inside of code or of a sandbox output is the model's
    answer, code in the middle of an answer ends it unanswered, and what follows the first `</answer>` was never said.
    """
    start, end = _answer_tags(text)
    if start is None or end is None:
        return None
    return boxed_or_all(text[start:end])


def boxed_or_all(text: str) -> str:
    r"""What the last balanced `\boxed{}` holds, all of it without one; stripped."""
    boxed = _last_boxed(text)
    return (text if boxed is None else boxed).strip()


def until_answer(text: str) -> str:
    """An assistant's turn up to and with the first `</answer>` that counts; all of it if there is none."""
    _, end = _answer_tags(text)
    return text if end is None else text[: end + len("</answer>")]


def build_prompt(question: Question, style: PromptStyle, processor: Processor) -> Prompt:
    """The engine's prompt for a question.

    Args:
        style: "thyme" = system prompt and user prompt of the released checkpoints; "short" = the picture and the bare
            question without a system prompt, for models too small to read more; "direct" = the prompts with which
            Thyme's evaluation answers without tools.

    Question and path come from outside: where they spell a special token or `<image>`, that stays plain text.

    Raises:
        ValueError: unknown style, empty question.
    """
    from thyme.engine import Prompt

    if not question.question.strip():
        raise ValueError(f"question {question.id!r} is empty: ask something")
    if style == "thyme":
        system: str | None = SYSTEM_PROMPT
        if question.image is None:
            parts = ["", question.question, "\n\n" + _OUTPUT_FORMAT]
        else:
            parts = _user_parts(question.question, [(path, picture.size) for path, picture in question.pictures])
    elif style == "short":
        system = None
        parts = ["<image>" * len(question.pictures), question.question, ""]
    elif style == "direct":
        system = DIRECT_SYSTEM_PROMPT
        before, after = direct_prompt("\0").split("\0")
        parts = ["<image>" * len(question.pictures) + before, question.question, after]
    else:
        raise ValueError(f"prompt style {style!r}: use {', '.join(map(repr, get_args(PromptStyle)))}")
    images = tuple(picture for _, picture in question.pictures)
    return Prompt(token_ids=_encode_chat(parts, system, processor), images=images)


def _user_parts(question: str, images: Sequence[tuple[str, tuple[int, int] | None]]) -> list[str]:
    """The user prompt as template, question, template, path, ..., template: even entries are ours, odd ones are not."""
    parts = ["<image>\n" * len(images), question]
    ours = "\n\n"
    for path, size in images:
        told = _UNREADABLE_SIZE if size is None else f"{size[0]}x{size[1]}"
        parts += [f'{ours}### User Image Path:** "', path]
        ours = f'"\n### User Image Size:** "{told}"\n'
    return [*parts, f"{ours}\n{_OUTPUT_FORMAT}"]


def _encode_chat(parts: list[str], system: str | None, processor: Processor) -> list[int]:
    hole = "\0"
    frame = processor.chat(hole.join(parts[0::2]), system).split(hole)
    pieces = [(frame[0], True)]
    for foreign, after in zip(parts[1::2], frame[1:], strict=True):
        pieces += [(foreign, False), (after, True)]
    return processor.encode_parts(pieces)


def _answer_tags(text: str) -> tuple[int | None, int | None]:
    """Where the answer begins and where the first `</answer>` stands; None for what is not there."""
    start, at = None, 0
    while match := _TAG.search(text, at):
        at = match.end()
        if match.group() == "</answer>":
            return start, match.start()
        if match.group() == "<answer>":
            start = at if start is None else start
            continue
        start, closing = None, f"</{match.group(1)}>"
        at = text.find(closing, at)
        if at < 0:
            break
        at += len(closing)
    return None, None


def _last_boxed(text: str) -> str | None:
    r"""What the `\boxed{}` that begins last holds, of those whose braces are balanced."""
    opened: list[int] = []
    start, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.end())
        elif opened:
            first = opened.pop()
            if first > start and text.endswith("\\boxed{", 0, first):
                start, end = first, brace.start()
    return None if start < 0 else text[start:end]
