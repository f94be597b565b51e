"""What the writer is told, by scenario; what it is asked before (triage); and what checkers are asked after."""

from __future__ import annotations

import re
from typing import Any

from thyme.build.boxes import Box
from thyme.build.scenarios import Assignment
from thyme.data.turns import WRITTEN
from thyme.rewards.judge_prompts import read_verdict
from thyme.rollout.prompts import text_prompt, user_prompt

FULFILLED = "Fulfilled"
"""The key of a verdict on what code was to do."""

_WRITER = f"""You write demonstrations for a model that thinks with images: it reads a question about a picture, \
reasons, runs Python on the picture where that helps, looks at what comes back, and answers.

Rules for every demonstration:
- All reasoning stands inside one <think>...</think>; after it comes a newline and <answer>...</answer>, and no more.
- Code stands inside of <think>, as
<code>
```python
...
```
</code>
- After </code> stop: the code is run for you, and the next message holds what came back. Then go on in the same \
reasoning, without a second <think>.
- A snippet opens the picture at the path you are told. A picture that it makes is saved in {WRITTEN}/ under the \
input's file name with a random suffix, that path is put in `processed_path`, and the last line prints it. A snippet \
that computes prints the result at its end.
- Comments in the code say what each step is for.
- Before the code the reasoning says what is to be seen and why the step helps; after it, what came back shows."""

_SECRET = (
    "The facts below are for you alone. In the demonstration they are your own findings from looking at the picture: "
    "never write that a box, coordinates or an angle was given, provided or known."
)

_TASKS = {
    "no_code": "Answer without any code: the picture can be read as it is.",
    "operations": (
        "Choose the picture operation that helps with this question (turning or mirroring, brightness or contrast, "
        "cropping or scaling, or several of them), run it in code, and answer from what it shows."
    ),
    "crop": "Crop the region that the answer is in, in one snippet with the box below, enlarge it, and answer from it.",
    "rotation": (
        "The picture is turned. Find that out, turn it upright in one snippet with PIL's rotate by the angle below "
        "(counter-clockwise, expand=True), and answer from the upright picture."
    ),
    "contrast": (
        "The picture has little contrast. Find that out, raise its contrast (and brightness, where needed) in one "
        "snippet, and answer from what comes back."
    ),
    "math": (
        "Solve the problem with Python: say the plan, let short snippets compute (they print their results), check "
        "what comes back, and answer."
    ),
    "zoom": (
        "Work in two rounds. Round 1 crops the first box below, a wide region; what comes back is still too coarse: "
        "say so, and where to look closer. Round 2 crops the second box, from the original picture; answer from it."
    ),
    "correction": (
        "Work in two rounds. Round 1 crops the first box below, which you take for the right place; what comes back "
        "shows that it is not: say what is seen instead and why the place was wrong. Round 2 crops the second box; "
        "answer from it."
    ),
}

GO_ON = "That is what your code gave. Go on in the same reasoning; do not repeat what was said."


def writer_system() -> str:
    """The writer's system prompt."""
    return _WRITER


def writer_turn(assignment: Assignment) -> str:
    """The writer's user turn, its picture aside: the scenario, what it must know, and the user turn of the row."""
    facts = []
    if assignment.angle:
        facts.append(f"- turn it by {-assignment.angle % 360} degrees")
    names = ("first box", "second box") if len(assignment.boxes) > 1 else ("box",)
    facts += [f"- {name}: x1, y1, x2, y2 = {_told(box)}" for name, box in zip(names, assignment.boxes, strict=False)]
    parts = [f"# Task\n{_TASKS[assignment.scenario]}"]
    if facts:
        parts.append(f"# Facts\n{_SECRET}\n" + "\n".join(facts))
    return "\n\n".join([*parts, f"# The user's turn\n{full_turn(assignment)}"])


def full_turn(assignment: Assignment) -> str:
    """The user turn of the row that is built, byte for byte as training gives it, without its mark for the picture."""
    raw, image = assignment.raw, assignment.image
    if image is None:
        return text_prompt(raw.question)
    return user_prompt(raw.question, raw.image_path, image.size).removeprefix("<image>\n")


def triage_prompt(question: str) -> str:
    """Which operation a picture needs for a question (the paper's table 7)."""
    return (
        "Look at the picture and the question. Which operation on the picture would make the answer easier to find?\n"
        "1: turning or mirroring it\n2: brightness or contrast\n3: cropping or scaling\n4: several of these\n"
        "-1: none, it can be read as it is\n\n"
        f"Question: {question}\n\n"
        'Answer with a JSON object and nothing else: {"operation": number}'
    )


def read_triage(said: str) -> int | None:
    """The operation that `triage_prompt` was answered with, None where it was not."""
    found = re.findall(r'"operation"\s*:\s*"?(-1|[1-4])\b', said)
    return int(found[-1]) if found else None


def goal_prompt(question: str, thinking: str, results: int) -> str:
    """Whether what code made is what the reasoning wanted; shown behind the input and the results."""
    return (
        f"The first picture is a user's, the {'last' if results == 1 else f'{results} others'} what Python code made "
        "of it while somebody reasoned on the question. Rate 1 if what the code made shows what the reasoning says it "
        "is for, and helps with the question; else 0.\n\n"
        f"#### Question:\n{question}\n\n#### Reasoning:\n{thinking}\n\n"
        f'Answer with a JSON object and nothing else: {{"{FULFILLED}": 0 or 1}}'
    )


def read_goal(said: str) -> bool | None:
    """The verdict that `goal_prompt` was answered with, None where there is none."""
    return read_verdict(said, FULFILLED)


def cross_check_prompt(question: str) -> str:
    """The question to a second model, which sees the surroundings of the target alone."""
    return f"{question}\n\nThe picture shows the part that the question is about. Answer in a few words, no more."


def parts(text: str, images: list[str]) -> list[dict[str, Any]]:
    """A message's content of pictures (data URIs), then text."""
    shown: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [*shown, {"type": "text", "text": text}]


def _told(box: Box) -> str:
    return ", ".join(str(round(value)) for value in box)
