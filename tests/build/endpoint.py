"""A scripted writer, judge and checker behind one server, and raw rows on photographs for it to write about."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.rewards.judge_server import Asked, JudgeServer, Reply
from thyme.build.prompts import FULFILLED, GO_ON
from thyme.rewards.judge_prompts import CONSISTENCY, CORRECTNESS

SIZE = (240, 180)
BOX = [60, 50, 110, 90]


def picture(number: int) -> Image.Image:
    """A structured picture that depends on the number alone."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def raw_rows(folder: Path, count: int, *, text: int = 0, question: str = "What is on sign {}?") -> Path:
    """Plain rows with pictures and boxes, and `text` rows of arithmetic."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        picture(number).save(folder / f"p{number}.png")
        rows.append(
            {"image": f"p{number}.png", "question": question.format(number), "answer": f"word{number}", "box": BOX}
        )
    rows += [{"question": f"What is {n} times 7?", "answer": str(7 * n)} for n in range(2, 2 + text)]
    path = folder / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Endpoint(JudgeServer):
    """Writes what the scenario asks for, with the boxes and angles it is told; says yes as a judge and as a checker."""

    def __init__(self) -> None:
        super().__init__(lambda asked, _: Reply(self.said(asked)))
        self.prompts: Counter[str] = Counter()
        """How often each whole request came."""

    def said(self, asked: Asked) -> str:
        messages = asked.body["messages"]
        self.prompts[json.dumps(asked.body, sort_keys=True)] += 1
        if '"operation"' in text_of(messages[-1]):
            number = int(re.findall(r"sign (\d+)", text_of(messages[-1]))[0])
            return json.dumps({"operation": -1 if number % 2 else 3})
        for key in (CORRECTNESS, CONSISTENCY, FULFILLED):
            if f'"{key}"' in text_of(messages[-1]):
                return json.dumps({key: 1})
        return self.written(messages)

    def written(self, messages: list[dict[str, Any]]) -> str:
        """The next part of a demonstration."""
        turn = text_of(messages[1])
        rounds = sum(message["role"] == "assistant" for message in messages)
        question = re.findall(r"What is (?:on sign \d+|\d+ times 7)\?", turn)[0]
        if "times" in question:
            number = int(re.findall(r"\d+", question)[0])
            if rounds == 0:
                return f"<think>I compute it. <code>\n```python\nprint({number} * 7)\n```\n"
            return f"The result is {number * 7}.</think>\n<answer>{number * 7}</answer>"
        answer = "word" + re.findall(r"\d+", question)[0]
        boxes = [[int(n) for n in found.split(", ")] for found in re.findall(r"x2, y2 = ([\d, ]+)", turn)]
        turned = re.findall(r"turn it by (\d+)", turn)
        if "without any code" in turn or rounds >= max(1, len(boxes)):
            start = "<think>" if rounds == 0 else ""
            return f"{start}It can be read: the sign says {answer}.</think>\n<answer>{answer}</answer>"
        if boxes:
            step = "x1, y1, x2, y2 = {}, {}, {}, {}\nimage = image.crop((x1, y1, x2, y2))".format(*boxes[rounds])
        elif turned:
            step = f"image = image.rotate({turned[0]}, expand=True)"
        elif "little contrast" in turn:
            step = "image = ImageOps.autocontrast(image, cutoff=1)"
        else:
            step = "image = image.resize((image.width * 2, image.height * 2))"
        words = (
            "That is not the place, the sign stands elsewhere. " if rounds else "<think>I look at the sign closely. "
        )
        return f"{words}<code>\n```python\n{code(step)}\n```\n"


def code(step: str) -> str:
    """A snippet that opens the picture, takes a step, saves and prints."""
    return (
        "from PIL import Image, ImageOps\n"
        "image = Image.open(image_path)\n"
        f"{step}\n"
        'processed_path = "/mnt/data/temp_processed_images/sign_4711.png"\n'
        "image.save(processed_path)\n"
        "print(processed_path)"
    )


def text_of(message: dict[str, Any]) -> str:
    """The words of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def pictures_of(message: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a message."""
    content = message["content"]
    urls = [] if isinstance(content, str) else [p["image_url"]["url"] for p in content if p["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


__all__ = ["BOX", "GO_ON", "SIZE", "Endpoint", "code", "picture", "pictures_of", "raw_rows", "text_of"]
