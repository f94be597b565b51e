"""The six synthetic scenarios: demonstrations for SFT, questions for RL and evaluation.

Item i of a seed depends on (kind, seed, i, split) only: the same call gives the same pixels, a longer one extends it,
and no draw is shared between kinds or splits. A demonstration says what it read off the picture (the cell, the angle)
in text before its code uses it: under adaptive temperature code is greedy, so only what is said is ever explored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from thyme.data.rows import Demonstration, Question
from thyme.toy.config import SCENARIOS, CutBy, Material, Mix, Split
from thyme.toy.draws import DEMONSTRATIONS, QUESTIONS, ROWS, Shares, chooser, draw_cell, draw_color, generator
from thyme.toy.pictures import LARGE_SIGN_SIDE, SIDE, ZOOM_SIDE, Painter


@dataclass(frozen=True, slots=True)
class _Step:
    said: str
    code: str
    output: Image.Image | str


_OPEN = "image = Image.open(image_path)\n"
_SHOW = 'image.save("out.png")\nprint("out.png")\n'


def questions(
    seed: int,
    n: int,
    mix: Mix | Shares | None = None,
    split: Split = "train",
    *,
    material: Material = "glyphs",
    start: int = 0,
) -> list[Question]:
    """Questions `start` to `start + n` of a seed. Held-out ones share no draw, glyph or photograph with training."""
    return _questions(QUESTIONS, seed, n, mix, split, material, start)


def demonstrations(
    seed: int,
    n: int,
    mix: Mix | Shares | None = None,
    *,
    material: Material = "glyphs",
    no_code: float = 0.0,
    no_code_scenarios: tuple[str, ...] = ("crop", "zoom"),
    no_code_answer: Literal["true", "random"] = "true",
    box_noise: float = 0.0,
    says_cells: bool = True,
    cut_by: CutBy = "corner",
    split: Split = "train",
    start: int = 0,
) -> list[Demonstration]:
    """Demonstrations `start` to `start + n` of a seed.

    Args:
        no_code: share of the demonstrations of `no_code_scenarios` that answer at once, with the solution or, for
            `no_code_answer` "random", with a guess.
        box_noise: share of crop and zoom demonstrations that crop a neighbor of the right cell; they still end in the
            true answer.
        says_cells, cut_by: see `demonstration`.
    """
    out = []
    for offset, question in enumerate(_questions(ROWS, seed, n, mix, split, material, start)):
        rng = generator(DEMONSTRATIONS, seed, start + offset, split)
        # Every draw is made for every row, so that one option does not move the others.
        at_once, slips = rng.random() < no_code, rng.random() < box_noise
        guess = _guess(question, rng)
        if question.scenario in no_code_scenarios and at_once:
            answer = question.solution if no_code_answer == "true" else guess
            out.append(demonstration(question, answer=answer, with_code=False))
        else:
            slip = rng if slips else None
            out.append(demonstration(question, slip=slip, says_cells=says_cells, cut_by=cut_by))
    return out


def demonstration(
    question: Question,
    *,
    answer: str | None = None,
    with_code: bool = True,
    slip: np.random.Generator | None = None,
    says_cells: bool = True,
    cut_by: CutBy = "corner",
) -> Demonstration:
    """How a teacher answers a synthetic question.

    The produced images are made in process by the very calls the code makes, which is what the sandbox returns.

    Args:
        answer: what to conclude, by default the solution.
        with_code: False answers at once in every scenario.
        slip: draws the neighbor that is cropped instead of the right cell.
        says_cells: False leaves out the sentences that say a cell; it then stands in the code alone.
        cut_by: how code says a cell, see `cut_cell`.
    """
    answer = question.solution if answer is None else answer
    images = [] if question.image is None else [question.image]
    text = "<think>"
    for step in _steps(question, slip, says_cells, cut_by) if with_code else []:
        shown = step.output if isinstance(step.output, str) else "<image>"
        text += f"{step.said}<code>\n```python\n{step.code}```\n</code><sandbox_output>{shown}</sandbox_output>"
        if isinstance(step.output, Image.Image):
            images.append(step.output)
    what = "product" if question.scenario == "arithmetic" else "digit"
    text += f"The {what} is {answer}.</think>\n<answer>{answer}</answer>"
    prompt = ("" if question.image is None else "<image>") + question.question
    return Demonstration(images, prompt, text, question.scenario, question)


def _questions(
    kind: int, seed: int, n: int, mix: Mix | Shares | None, split: Split, material: Material, start: int
) -> list[Question]:
    draw = chooser(Mix() if mix is None else mix, SCENARIOS)
    out = []
    for index in range(start, start + n):
        rng = generator(kind, seed, index, split)
        scenario = draw(rng)
        name = f"{scenario}-{split}-{seed}-{'dq'[kind == QUESTIONS]}{index}"
        out.append(_question(scenario, name, Painter(rng, material, split)))
    return out


def _question(scenario: str, name: str, painter: Painter) -> Question:
    rng = painter.rng
    if scenario == "arithmetic":
        a, b = rng.integers(100, 1000, size=2).tolist()
        return Question(
            id=name,
            image=None,
            image_path="",
            question=f"What is {a} * {b}?",
            solution=str(a * b),
            scenario=scenario,
            meta={"factors": [a, b]},
        )
    color, digit = draw_color(rng), int(rng.integers(10))
    meta: dict[str, Any] = {}
    if scenario == "direct":
        picture = painter.large_sign(LARGE_SIGN_SIDE, color, digit)
    elif scenario == "crop":
        column, row = draw_cell(rng, 6)
        picture = painter.small_signs(SIDE, [(color, digit, (column, row))])
        meta = {"cells": [[column, row]], "box": _box(0, 0, SIDE, 6, column, row)}
    elif scenario == "zoom":
        coarse, fine = draw_cell(rng, 3), draw_cell(rng, 6)
        picture = painter.tiny_sign(ZOOM_SIDE, color, digit, coarse, fine)
        left, top, right, _ = _box(0, 0, picture.width, 3, *coarse)
        meta = {"cells": [list(coarse), list(fine)], "box": _box(left, top, right - left, 6, *fine)}
    elif scenario == "rotate":
        angle = 90 * int(rng.integers(1, 4))
        picture = painter.large_sign(LARGE_SIGN_SIDE, color, digit, bar=True).rotate(-angle)
        meta = {"angle": angle}
    else:
        color, picture = "gray", painter.gray_sign(LARGE_SIGN_SIDE, digit)
    return Question(
        id=name,
        image=picture,
        image_path=f"{name}.png",
        question=f"What digit is on the {color} sign?",
        solution=str(digit),
        scenario=scenario,
        meta={"color": color, **meta},
    )


def _steps(question: Question, slip: np.random.Generator | None, says_cells: bool, cut_by: CutBy) -> list[_Step]:
    """What is said, run and returned, round by round."""
    meta, image = question.meta, question.image
    if question.scenario == "arithmetic":
        a, b = meta["factors"]
        return [_Step("This needs code.", f"print({a} * {b})\n", str(a * b))]
    if image is None or question.scenario == "direct":
        return []
    if question.scenario == "rotate":
        said = f"The picture is turned by {meta['angle']}."
        code = f"from PIL import Image\n{_OPEN}image = image.rotate({meta['angle']})\n{_SHOW}"
        return [_Step(said, code, image.rotate(meta["angle"]))]
    if question.scenario == "contrast":
        code = f"from PIL import Image, ImageOps\n{_OPEN}image = ImageOps.autocontrast(image)\n{_SHOW}"
        return [_Step("The contrast is low.", code, ImageOps.autocontrast(image))]
    cells = [tuple(cell) for cell in meta["cells"]]
    grids = [(6, "small")] if question.scenario == "crop" else [(3, "tiny"), (6, "small")]
    if slip is not None:
        missed = int(slip.integers(len(cells)))
        cells[missed] = _neighbor(cells[missed], grids[missed][0], slip)
    steps = []
    for number, ((column, row), (parts, size)) in enumerate(zip(cells, grids, strict=True)):
        # The session's variables live on: the second round cuts the first one's crop.
        opening = f"from PIL import Image\n{_OPEN}" if number == 0 else ""
        code = f"{opening}{cut_cell(parts, column, row, cut_by)}{_SHOW}"
        left, top, right, bottom = _box(0, 0, image.width, parts, column, row)
        image = image.crop((left, top, right, bottom))
        said = said_cell(meta["color"], size, column, row) if says_cells else f"The {meta['color']} sign."
        steps.append(_Step(said, code, image))
    return steps


def said_cell(color: str, size: str, column: int, row: int) -> str:
    """How a place is said, in demonstrations and captions alike."""
    return f"The {color} sign is {size}: column {column}, row {row}."


def cut_cell(parts: int, column: int, row: int, cut_by: CutBy = "corner") -> str:
    """How a cell is cut out of `image` in code, in demonstrations and captions alike: by two numbers or by four."""
    if cut_by == "corner":
        return f"s = image.width // {parts}\nx, y = {column}*s, {row}*s\nimage = image.crop((x, y, x + s, y + s))\n"
    return f"s = image.width // {parts}\nimage = image.crop(({column}*s, {row}*s, {column + 1}*s, {row + 1}*s))\n"


def _box(left: int, top: int, side: int, parts: int, column: int, row: int) -> list[int]:
    """Pixels [left, top, right, bottom) of a cell in a square cut into parts x parts."""
    cell = side // parts
    x, y = left + column * cell, top + row * cell
    return [x, y, x + cell, y + cell]


def _neighbor(cell: tuple[int, int], parts: int, rng: np.random.Generator) -> tuple[int, int]:
    around = [(cell[0] + dx, cell[1] + dy) for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    inside = [(x, y) for x, y in around if 0 <= x < parts and 0 <= y < parts]
    return inside[int(rng.integers(len(inside)))]


def _guess(question: Question, rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(10, size=len(question.solution))))
