"""What the model is shown of a code result: `<sandbox_output>...</sandbox_output>`, as text and as token ids.

The images if there are any; else the stripped stdout; else the error; else that there was none. What code printed is
not trusted: tags in it are escaped and special-token strings in it stay plain text, so that a snippet can forge neither
an answer nor an image nor the end of its own output.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from thyme.rollout.config import Compat
from thyme.sandbox import SandboxResult, Status

if TYPE_CHECKING:
    from thyme.model.image_processor import ImageInputs
    from thyme.model.processor import Processor

OPEN, CLOSE, IMAGE = "<sandbox_output>", "</sandbox_output>", "<image>"
NO_OUTPUT = "No output captured."

_TAG = re.compile(r"<(?=/?\s*(?:sandbox_output|answer|code|think|image)\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Output:
    """One sandbox output, ready to be appended."""

    text: str
    """The whole span with both tags; `<image>` where an image stands."""
    token_ids: tuple[int, ...]
    """The same as ids, image pads expanded."""
    images: tuple["ImageInputs", ...]


def content(result: SandboxResult, *, image_path: str, compat: Compat, max_chars: int, timeout_s: float) -> str:
    """The text between the tags of a result without images, tags in it escaped.

    Args:
        result: what the sandbox returned.
        image_path: names the image in the released wording.
        compat: "none", or "released" for the words of Thyme's released sandbox.
        max_chars: printed text beyond this is cut and the cut is counted in a marker.
        timeout_s: wall limit of the sandbox, which the released wording states.
    """
    text = result.stdout.strip()
    if compat == "released" and (result.status is not Status.OK or not text):
        text = f"Sandbox for {_stem(image_path)}: {_released_error(result, timeout_s)}"
    elif text:
        if len(text) > max_chars:
            text = f"{text[:max_chars]}\n... ({len(text) - max_chars} more characters)"
    else:
        text = _error(result)
    return _TAG.sub("&lt;", text)


def render(
    result: SandboxResult,
    processor: "Processor",
    *,
    image_path: str,
    compat: Compat,
    max_chars: int,
    timeout_s: float,
) -> Output:
    """The span appended after a code block: its images if it has any, else the text of `content`.

    Args:
        result: what the sandbox returned.
        processor: tokenizes the text and preprocesses the images.
        image_path, compat, max_chars, timeout_s: as in `content`.

    Raises:
        ValueError: an image the processor can't resize.
    """
    start, end = processor.encode(OPEN), processor.encode(CLOSE)
    # The released sandbox throws the images of a snippet away that fails after saving them.
    shown = () if compat == "released" and result.status is not Status.OK else result.images
    if shown:
        images = tuple(processor.preprocess(image) for image in shown)
        ids = processor.expand([*start, *processor.encode(processor.IMAGE_TEXT * len(images)), *end], images)
        return Output(OPEN + IMAGE * len(images) + CLOSE, tuple(ids), images)
    text = content(result, image_path=image_path, compat=compat, max_chars=max_chars, timeout_s=timeout_s)
    ids = [*start, *processor.encode_untrusted(text), *end]
    return Output(OPEN + text + CLOSE, tuple(ids), ())


def _error(result: SandboxResult) -> str:
    if result.error is None:
        return NO_OUTPUT if result.status is Status.OK else f"Error: {result.status.name}"
    kind, message, line = result.error
    return f"Error: {kind}: {message}" + (f" (line {line})" if line else "")


def _released_error(result: SandboxResult, timeout_s: float) -> str:
    """The wording of swift/trainers/sandbox.py in Thyme's release, for the model that was trained on it."""
    if result.status is Status.TIMEOUT:
        return f"Execution timed out after {timeout_s:g} seconds."
    if result.error is None:
        return NO_OUTPUT if result.status is Status.OK else f"Code execution failed: {result.status.name}"
    kind, message, _ = result.error
    if kind in {"ImportError", "ModuleNotFoundError"}:
        return (
            "Code execution failed due to ImportError. Ensure all required modules are available and "
            f"correctly named: {message}"
        )
    if kind == "MemoryError":
        return f"Code execution failed due to MemoryError. The operation likely consumed too much memory: {message}"
    if kind in {"SyntaxError", "IndentationError", "TabError"}:
        return f"Code execution failed due to SyntaxError: {message}"
    return f"Code execution failed: {message}"


def _stem(image_path: str) -> str:
    return PurePosixPath(image_path).stem
