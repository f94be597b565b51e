"""What of a row no later step would take, told from its text alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from thyme.data.layouts.row import MARK, Kind, Row
from thyme.data.refusal import Refusal
from thyme.data.tags import tag_problems
from thyme.data.turns import taken_apart
from thyme.rollout.prompts import SYSTEM_PROMPT, extract_answer


def kind_of(row: Row) -> Kind:
    """What a row is for: one with a response is a demonstration."""
    return "rl" if row.response is None else "sft"


def text_problems(row: Row, kind: Kind) -> Iterator[Refusal]:
    """What is wrong with a row's text, and with the number of its pictures where those were read.

    Args:
        row: as a layout read it.
        kind: what it is to serve as; a demonstration can be a question, its answer being the solution.
    """
    broken = list(_encoding_problems(row))
    yield from broken
    if broken:
        return
    if _is_blank(asked(row)):
        yield Refusal("text", "question must be text: the user's turn asks nothing")
    yield from _count_problems(row)
    if kind == "rl":
        if not solution_of(row):
            yield Refusal("no solution", "solution must be text: a question is rewarded by it")
        return
    if row.response is None or _is_blank(row.response):
        yield Refusal("no response", "response must be text: a demonstration has an assistant's turn")
        return
    yield from (Refusal("tags", problem) for problem in tag_problems(row.response))
    answer = extract_answer(row.response)
    if answer is None:
        message = "no <answer> that decoding would see: end the response with <answer>...</answer>"
        yield Refusal("no answer", message)
    elif _is_blank(answer):
        yield Refusal("empty answer", "the <answer> is empty: say one")


def asked(row: Row) -> str:
    """The bare question: what the user's turn asks in our template; in no template, what the row says apart from it."""
    turn = taken_apart(row.user)
    if turn.in_template or row.question is None:
        return turn.question
    return taken_apart(row.question).question


def solution_of(row: Row) -> str:
    """The reference answer: the row's, or what its response answers; "" without either."""
    if row.solution is not None and row.solution.strip():
        return row.solution
    return (extract_answer(row.response) or "") if row.response is not None else ""


def is_ours(system: str | None) -> bool:
    """Whether a row's system prompt is none or the one that rollouts are given, however it is spaced."""
    return system is None or system.split() == SYSTEM_PROMPT.split()


def _is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: spaces, and characters without a width of their own."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


def _encoding_problems(row: Row) -> Iterator[Refusal]:
    """Text that no tokenizer takes: half of a surrogate pair."""
    texts = {"question": row.question, "the user's turn": row.user, "response": row.response, "solution": row.solution}
    for key, text in texts.items():
        try:
            _ = (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"half a character ({error.object[error.start]!r}) at {error.start}"
            yield Refusal("encoding", f"{key} holds {half}: mend its encoding")


def _count_problems(row: Row) -> Iterator[Refusal]:
    if row.pictures is None:
        return
    marks, count = (row.user + (row.response or "")).count(MARK), len(row.pictures)
    if marks != count:
        message = f"{marks} <image> in the text, {count} in {row.picture_key}: each picture stands once, in order"
        yield Refusal("picture count", message)
