"""`thyme ask`: one question about one image, with thoughts, code, sandbox output and answer printed as they come.

What the user got wrong is a ValueError or FileNotFoundError whose message says what, where and what to do; the command
line prints that one line. Images that code made are kept, named by content, in `runs/ask/images/`.
"""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax

if TYPE_CHECKING:
    from thyme.rollout.events import Event
    from thyme.rollout.records import ImageStore
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.types import Rollout
    from thyme.sandbox import Sandbox, SandboxResult

IMAGES = Path("runs/ask/images")
MAX_CONTEXT = 32768
"""Tokens the cache is sized for, images included; models that are meant for fewer get fewer."""


def ask(
    model: str | Path,
    image: str | Path,
    question: str,
    *,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    seed: int = 0,
    images_dir: Path = IMAGES,
    console: Console | None = None,
) -> "Rollout":
    """Answers one question, printing what happens as it happens.

    Args:
        model: a Hugging Face Qwen2.5-VL folder or a checkpoint of this project; the prompt style is the folder's.
        image: the picture, in any format pillow reads; turned upright by its EXIF tag, alpha laid on white.
        question: the question.
        temperature: of the text; code is always greedy.
        max_tokens: tokens the model may draw in all.
        seed: of the sampler.
        images_dir: where images made by code are kept.
        console: where to print; default standard output.

    Returns:
        The finished rollout.

    Raises:
        ValueError: empty question, broken image, a folder that is no vision model.
        FileNotFoundError: no such image or folder.
    """
    if not question.strip():
        raise ValueError("the question is empty: ask something about the image")
    picture = open_image(Path(image))
    folder = _model_folder(Path(model))

    from thyme.rollout.records import ImageStore
    from thyme.rollout.types import Question
    from thyme.sandbox import Sandbox, SandboxConfig

    console = console or Console(soft_wrap=True, highlight=False)
    asked = Question(id="ask", image=picture, image_path=str(image), question=question, solution="")
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        loop = _load(folder, sandbox, max_tokens)
        printer = _Printer(console, ImageStore(images_dir))
        for event in loop.stream(asked, loop.config.sampling(temperature=temperature, seed=seed)):
            printer.show(event)
    assert printer.rollout is not None
    return printer.rollout


def open_image(path: Path) -> Image.Image:
    """The picture as RGB, upright, alpha laid on white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, cut short, or too large to be one in good faith.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path}: no such file: give the path of a picture")
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return upright.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"image {path}: not an image format pillow knows: give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path}: can't be read ({error}): give an intact picture") from None


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"model {path}: no such folder: give a Hugging Face Qwen2.5-VL folder, or run `thyme demo` and give "
            "runs/demo/checkpoints/rl"
        )
    inner = path / "model"  # where training checkpoints keep it
    for folder in (path, inner):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"model {path}: no model folder: config.json is missing (weights and tokenizer belong beside it)")


def _load(folder: Path, sandbox: "Sandbox", max_tokens: int) -> "RolloutLoop":
    import torch

    from thyme.engine import Engine, EngineConfig
    from thyme.model import load
    from thyme.rollout.config import RolloutConfig, read_prompt_style
    from thyme.rollout.rollout import RolloutLoop

    style = read_prompt_style(folder)
    on_gpu = torch.cuda.is_available()
    model, processor = load(
        folder, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    if model.config.vision is None or processor is None:
        raise ValueError(f"model {folder}: it can't see: give a Qwen2.5-VL folder or a checkpoint of this project")
    context = min(MAX_CONTEXT, model.config.text.max_position_embeddings)
    engine = Engine(model, EngineConfig(max_sequences=1, max_context=context, quiet=True), processor=processor)
    config = RolloutConfig(prompt_style=style, max_tokens=max_tokens, max_tokens_per_round=max_tokens)
    return RolloutLoop(engine, sandbox, processor, config)


class _Printer:
    """Events to the terminal."""

    def __init__(self, console: Console, store: "ImageStore") -> None:
        self.console = console
        self.store = store
        self.rollout: Rollout | None = None
        self._started = time.perf_counter()
        self._at_line_start = True

    def show(self, event: "Event") -> None:
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

    def _show_result(self, result: "SandboxResult", output_text: str) -> None:
        self._print(f"[sandbox: {result.status.value}, {result.wall_s * 1e3:.0f} ms]", "dim")
        for fix in result.fixes:
            self._print(f"  repaired {fix}", "yellow")
        for image in result.images:
            path = self.store.path(self.store.add(image))
            self._print(f"  image {image.width}x{image.height} saved: {path}", "cyan")
        if not result.images:
            inner = output_text.removeprefix("<sandbox_output>").removesuffix("</sandbox_output>")
            self._print(inner, "cyan")

    def _show_end(self, rollout: "Rollout") -> None:
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
