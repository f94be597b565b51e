"""Pairs of answer and solution as nobody would write them: those of answers.json, changed at random."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

_MARKS = [
    *"ABCDxyeE0123456789.,;:!?()[]{}<>|/\\^_*+-=~$%&#@'\"`° \n\t。，、：（）“”－½²·×√π∞∪個万亿点是否无",  # noqa: RUF001
    *(
        "\\frac",
        "\\boxed{",
        "\\text{",
        "\\sqrt",
        "\\left",
        "<b>",
        "</b>",
        "<answer>",
        "&nbsp;",
        "\ud800",
        "\0",
        "\u200b",
    ),
    *(
        "A. ",
        "B) ",
        " and ",
        " or ",
        "to ",
        "no ",
        "yes",
        "not ",
        "the answer is ",
        "10^",
        "e9",
        "1,000",
        " percent",
        "。",
    ),
    *("\U0001d7d8", "\u0660", "\u2460", "十", "^{", "}{", "::", "--", "((", "))", "%%"),
]


def mutated(rows: Sequence[dict[str, Any]], count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """`count` triples of answer, solution and question, up to a few thousand characters long."""
    rng = random.Random(seed)

    def changed(text: str) -> str:
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text) + 1)
            kind = rng.randrange(7)
            if kind == 0:
                text = text[:at] + rng.choice(_MARKS) + text[at:]
            elif kind == 1:
                text = text[:at] + text[at + rng.randrange(1, 4) :]
            elif kind == 2:
                text = text[:at] + text[at : at + 8] * rng.randrange(1, 5) + text[at:]
            elif kind == 3:
                text = rng.choice(_MARKS) + text + rng.choice(_MARKS)
            elif kind == 4:
                text = text[:at] + rng.choice(rows)[rng.choice(("answer", "solution"))][:200] + text[at:]
            elif kind == 5:
                text = text.swapcase() if rng.random() < 0.5 else text[::-1]
            elif rng.random() < 0.05:
                text = text[:at] + rng.choice(_MARKS) * rng.choice((10, 100, 1000, 5000)) + text[at:]
        return text

    for _ in range(count):
        row = rng.choice(rows)
        question = changed(row["question"]) if rng.random() < 0.3 else row["question"]
        yield changed(row["answer"]), changed(row["solution"]), question
