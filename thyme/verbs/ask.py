"""Answer one question about a picture, showing thoughts, code, sandbox output and answer as they come.

What the user got wrong is a ValueError or FileNotFoundError whose message says what, where and what to do; the command
line prints that one line. Pictures that code made are kept, named by content, in `runs/ask/images/`.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax

from thyme.config import POSITIONAL
from thyme.engine.config import EngineConfig
from thyme.pictures import read_picture
from thyme.result import Result
from thyme.rollout.config import RolloutConfig
from thyme.sandbox.config import SandboxConfig
from thyme.verbs.config import LoopConfig, RunConfig
from thyme.verbs.folders import RUNS, model_folder

if TYPE_CHECKING:
    from PIL import Image

    from thyme.model.processor import Processor
    from thyme.rollout.events import Event
    from thyme.rollout.image_folder import ImageFolder
    from thyme.rollout.types import Rollout
    from thyme.sandbox import SandboxResult

MAX_CONTEXT = 32768
"""Tokens the cache is sized for, images included; models that are meant for fewer get fewer."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """One question."""

    name: str = "ask"
    model: str = field(metadata=POSITIONAL)
    """A Hugging Face Qwen2.5-VL folder, or a checkpoint of ours (runs/demo/checkpoints/rl)."""
    image: str = field(metadata=POSITIONAL)
    """The picture, in any format pillow reads; turned upright by its EXIF tag, alpha laid on white."""
    question: str = field(metadata=POSITIONAL)
    """The question."""
    temperature: float = 0.0
    """Of the text; code is always greedy."""
    max_tokens: int = 2048
    """Tokens the model may draw in all."""
    trace: Path | None = None
    """An HTML file to write: the rollout as a page, with pictures, regions and tokens in colours."""
    preview: int = 40
    """Columns of the small previews of pictures, on a terminal that has colours; 0: none."""
    sandbox: SandboxConfig = field(default_factory=lambda: SandboxConfig(workers=1))


def run(config: Config) -> Result:
    """Answers on the terminal."""
    return Result(_told(answer(config, Console(soft_wrap=True, highlight=False)), _store(config)))


def answer(config: Config, console: Console) -> Rollout:
    """Answers one question, printing what happens as it happens; returns the finished rollout.

    Raises:
        ValueError: empty question, broken image, a folder that is no vision model, a trace that cannot be written.
        FileNotFoundError: no such image or folder.
    """
    if not config.question.strip():
        raise ValueError("the question is empty: ask something about the image")
    if config.preview < 0:
        raise ValueError(f"preview: {config.preview} must be at least 0")
    if config.trace is not None and (config.trace.is_dir() or not config.trace.absolute().parent.is_dir()):
        raise ValueError(f"trace {config.trace}: no place for a file: name one in a folder that is there")
    picture = read_picture(config.image)
    model_folder(Path(config.model))

    from thyme.rollout.types import Question
    from thyme.toy.tokenizer import words_it_lacks
    from thyme.verbs.opening import open_loop, open_model

    opened = open_model(config)
    text = opened.model.config.text
    if opened.model.config.vision is None:
        raise ValueError(
            f"model {config.model}: it can't see: give a Qwen2.5-VL folder or a checkpoint of this project"
        )
    unknown = words_it_lacks(opened.processor.tokenizer, config.question)
    if unknown:
        print(
            f"thyme: model {config.model} has the toy's tokenizer, which only spells {', '.join(unknown)}: expect no "
            'sense; it was trained on such as "What digit is on the red sign?"',
            file=sys.stderr,
        )
    asked = Question(id="ask", image=picture, image_path=config.image, question=config.question, solution="")
    context = min(MAX_CONTEXT, text.max_position_embeddings)
    loop_config = LoopConfig(
        model=config.model,
        engine=EngineConfig(max_sequences=1, max_context=context, quiet=True),
        sandbox=config.sandbox,
        rollout=RolloutConfig(max_tokens=config.max_tokens, max_tokens_per_round=config.max_tokens),
    )
    printer = _Printer(console, _store(config), config.preview)
    printer.preview(picture)
    with open_loop(loop_config, opened) as loop:
        for event in loop.stream(asked, loop.config.sampling(temperature=config.temperature, seed=config.seed)):
            printer.show(event)
    assert printer.rollout is not None
    if config.trace is not None:
        _write_trace(config, printer.rollout, opened.processor)
        console.print(f"[trace: {config.trace}]", style="dim", markup=False)
    return printer.rollout


def _store(config: Config) -> ImageFolder:
    from thyme.rollout.image_folder import ImageFolder

    return ImageFolder(RUNS / config.name / "images")


def _write_trace(config: Config, rollout: Rollout, processor: Processor) -> None:
    """The rollout as a page in one file."""
    from thyme.report.picture_store import FolderPictures
    from thyme.report.single_file import trace_page
    from thyme.rollout.records import to_row

    assert config.trace is not None
    store = _store(config)
    row = to_row(rollout, store)
    page = trace_page(config.question, row, FolderPictures(store.folder), processor.token_bytes)
    config.trace.write_text(page, encoding="utf-8")


def _told(rollout: Rollout, store: ImageFolder) -> dict[str, Any]:
    """For programs; pictures by the path they are kept at."""
    rounds: list[dict[str, Any]] = []
    for turn in rollout.turns:
        result = turn.result
        said: dict[str, Any] = {"text": turn.text, "code": turn.code}
        if result is not None:
            said |= {
                "status": result.status.value,
                "stdout": result.stdout,
                "error": None if result.error is None else result.error._asdict(),
                "repairs": [str(fix) for fix in result.fixes],
                "images": [str(store.path(store.add(image))) for image in result.images],
                "wall_s": result.wall_s,
            }
        rounds.append(said)
    return {
        "answer": rollout.answer,
        "status": rollout.status.value,
        "rounds": rounds,
        "tokens": rollout.num_sampled,
        "seed": rollout.seed,
        "wall_s": rollout.wall_s,
    }


class _Printer:
    """Events to the terminal."""

    def __init__(self, console: Console, store: ImageFolder, preview_columns: int = 0) -> None:
        self.console = console
        self.store = store
        self._preview_columns = preview_columns
        self.rollout: Rollout | None = None
        self._started = time.perf_counter()
        self._at_line_start = True

    def preview(self, image: Image.Image) -> None:
        """Shows a picture small, where the terminal can."""
        from thyme.report.preview import can_preview, preview

        if self._preview_columns and can_preview(self.console):
            self.console.print(preview(image, min(self._preview_columns, self.console.width)), soft_wrap=False)

    def show(self, event: Event) -> None:
        from thyme.rollout.events import Answer, CodeBlock, CodeResult, End, TextPiece

        match event:
            case TextPiece(text):
                self._print(text, end="")
                self._at_line_start = text.endswith("\n")
            case CodeBlock(code):
                self._new_line()
                snippet = Syntax(_visible(code), "python", background_color="default", word_wrap=True)
                self.console.print(Padding(snippet, (0, 0, 0, 4)))
            case CodeResult(result, output_text):
                self._show_result(result, output_text)
            case Answer(answer):
                self._new_line()
                self._print(f"Answer: {answer}", "bold green")
            case End(rollout):
                self._new_line()
                self._show_end(rollout)
                self.rollout = rollout

    def _show_result(self, result: SandboxResult, output_text: str) -> None:
        self._print(f"[sandbox: {result.status.value}, {result.wall_s * 1e3:.0f} ms]", "dim")
        for fix in result.fixes:
            self._print(f"  repaired {fix}", "yellow")
        for image in result.images:
            path = self.store.path(self.store.add(image))
            self._print(f"  image {image.width}x{image.height} saved: {path}", "cyan")
            self.preview(image)
        if not result.images:
            inner = output_text.removeprefix("<sandbox_output>").removesuffix("</sandbox_output>")
            self._print(inner, "cyan")

    def _show_end(self, rollout: Rollout) -> None:
        if rollout.answer is None:
            self._print(f"No answer: {rollout.status.value.replace('_', ' ')}.", "bold red")
        counts = f"{rollout.num_sampled} tokens, {len(rollout.turns)} rounds, {rollout.num_code} code blocks"
        self._print(f"[{counts}, {time.perf_counter() - self._started:.1f} s]", "dim")

    def _print(self, text: str, style: str | None = None, end: str = "\n") -> None:
        self.console.print(_visible(text), style=style, end=end, markup=False)

    def _new_line(self) -> None:
        if not self._at_line_start:
            self.console.print()
        self._at_line_start = True


def _visible(text: str) -> str:
    """Control characters spelled out: neither a model nor a snippet may steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
