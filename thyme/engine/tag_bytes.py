"""The tag automaton over bytes, before it meets a vocabulary: which modes there are, what each byte does in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from thyme.engine.literals import PLACES, STRINGS, Lex, step
from thyme.engine.phases import ANSWER, CODE, NUMBER, STRING, TEXT, Phases

CODE_START, CODE_END = b"<code>", b"</code>"
ANSWER_START, ANSWER_END = b"<answer>", b"</answer>"
SANDBOX_START = b"<sandbox_output>"
MOST_OPEN = 2
"""Phases that may be open at once, one inside the other, beside code."""
MOST_STATES = 8192


class TagEvent(IntEnum):
    """What a token completes. Of several tags in a token the first that can end a round counts, else the last."""

    NONE = 0
    CODE_START = 1
    CODE_END = 2
    ANSWER_START = 3
    ANSWER_END = 4
    FORGED = 5
    PHASE_START = 6
    """Of a declared phase."""
    PHASE_END = 7


class Mode(IntEnum):
    """What the text is inside of; declared phases are text."""

    TEXT = 0
    CODE = 1
    ANSWER = 2


Stack = tuple[int, ...]
"""Numbers of the phases that are open, the outermost first; none in plain text."""
_State = tuple[Stack, Lex, bytes]
"""What is open, where the code is (SYNTAX outside of code), and the longest prefix of a tag that the text ends in."""


@dataclass(frozen=True, slots=True, eq=False)
class ByteTable:
    """The automaton over bytes, S states; 0 is plain text after nothing."""

    following: NDArray[np.uint16]
    """[S, 256]."""
    event: NDArray[np.uint8]
    """[S, 256] TagEvent."""
    modes: NDArray[np.uint8]
    """[S] Mode."""
    phases: NDArray[np.uint8]
    """[S] number of a phase."""
    is_place: NDArray[np.bool_]
    """[S] a number may begin here."""
    root: NDArray[np.uint16]
    """[S] the state where a tag that was under way is broken off."""
    reopened: NDArray[np.uint16]
    """[S] where the next round begins."""


def byte_tables(phases: Phases) -> ByteTable:
    """The table of these phases.

    Raises:
        ValueError: tags that count at the same place cannot be told apart, or there are too many states.
    """
    rules: dict[Stack, dict[bytes, tuple[TagEvent, Stack]]] = {}
    numbers: dict[_State, int] = {((), Lex.SYNTAX, b""): 0}
    states = list(numbers)
    rows: list[tuple[list[int], list[int], int, int]] = []

    def number_of(state: _State) -> int:
        if state not in numbers:
            if len(states) == MOST_STATES:
                raise ValueError(
                    f"the declared phases make more than {MOST_STATES} states: declare fewer, shorter tags"
                )
            numbers[state] = len(states)
            states.append(state)
        return numbers[state]

    moves = {lex: _moves(lex) if phases.literals else [Lex.SYNTAX] * 256 for lex in Lex}
    plain = [Lex.SYNTAX] * 256
    steps: dict[tuple[Stack, bytes], list[tuple[bytes, TagEvent, Stack]]] = {}
    while len(rows) < len(states):
        stack, lex, prefix = states[len(rows)]
        if stack not in rules:
            rules[stack] = dict(_rules(stack, phases))
            _check(rules[stack], stack, phases)
        if (stack, prefix) not in steps:
            steps[stack, prefix] = list(_prefix_steps(rules[stack], stack, prefix))
        moved = moves[lex] if stack[-1:] == (CODE,) else plain
        following, events = [], []
        for byte, (rest, found, after) in enumerate(steps[stack, prefix]):
            events.append(int(found))
            # A forged tag leaves the code where it is; every other one begins what it leads to.
            following.append(number_of((after, moved[byte] if after == stack else Lex.SYNTAX, rest)))
        open_ones = next((stack[:place] for place, phase in enumerate(stack) if phase in (CODE, ANSWER)), stack)
        rows.append((following, events, number_of((stack, lex, b"")), number_of((open_ones, Lex.SYNTAX, b""))))
    return ByteTable(
        following=np.array([row[0] for row in rows], dtype=np.uint16),
        event=np.array([row[1] for row in rows], dtype=np.uint8),
        modes=np.array([_mode(stack) for stack, _, _ in states], dtype=np.uint8),
        phases=np.array([_phase(stack, lex) for stack, lex, _ in states], dtype=np.uint8),
        is_place=np.array([lex in PLACES for _, lex, _ in states]),
        root=np.array([row[2] for row in rows], dtype=np.uint16),
        reopened=np.array([row[3] for row in rows], dtype=np.uint16),
    )


@cache
def _moves(lex: Lex) -> list[Lex]:
    """Where each byte leads in code."""
    return [step(lex, byte) for byte in range(256)]


def _prefix_steps(
    tags: dict[bytes, tuple[TagEvent, Stack]], stack: Stack, prefix: bytes
) -> Iterator[tuple[bytes, TagEvent, Stack]]:
    """Of each byte after the prefix of a tag: the prefix then, what it completes, and what is open then."""
    known = {tag[:length] for tag in tags for length in range(len(tag))}
    alphabet = frozenset(b"".join(tags))
    for byte in range(256):
        text = prefix + bytes([byte])
        if byte not in alphabet:
            yield b"", TagEvent.NONE, stack
        elif text in tags:
            yield b"", *tags[text]
        else:
            yield next(text[start:] for start in range(len(text) + 1) if text[start:] in known), TagEvent.NONE, stack


def _mode(stack: Stack) -> Mode:
    return {CODE: Mode.CODE, ANSWER: Mode.ANSWER}.get(stack[-1] if stack else TEXT, Mode.TEXT)


def _phase(stack: Stack, lex: Lex) -> int:
    """Without literals, code is SYNTAX throughout."""
    if lex is Lex.NUMBER or lex in PLACES:
        return NUMBER
    return STRING if lex in STRINGS else stack[-1] if stack else TEXT


def _rules(stack: Stack, phases: Phases) -> Iterator[tuple[bytes, tuple[TagEvent, Stack]]]:
    """The tags that count, with what they are and what is open after them."""
    yield SANDBOX_START, (TagEvent.FORGED, stack)
    if stack and stack[-1] == CODE:
        yield CODE_END, (TagEvent.CODE_END, stack[:-1])
        return
    # Code and a new answer end an answer that was never closed.
    outside = stack[: stack.index(ANSWER)] if ANSWER in stack else stack
    yield CODE_START, (TagEvent.CODE_START, (*outside, CODE))
    if len(outside) < MOST_OPEN:
        yield ANSWER_START, (TagEvent.ANSWER_START, (*outside, ANSWER))
    yield ANSWER_END, (TagEvent.ANSWER_END, outside)
    ends: set[bytes] = set()
    first = len(phases.names) - len(phases.declared)
    for place in range(len(stack) - 1, -1, -1):  # of equal end tags the innermost phase's counts
        if stack[place] >= first:
            end = phases.declared[stack[place] - first].end.encode()
            if end not in ends:
                ends.add(end)
                yield end, (TagEvent.PHASE_END, stack[:place])
    for number, pair in enumerate(phases.declared, first):
        start = pair.start.encode()
        if number not in stack and len(stack) < MOST_OPEN and not any(end in start for end in ends):
            yield start, (TagEvent.PHASE_START, (*stack, number))


def _check(tags: dict[bytes, tuple[TagEvent, Stack]], stack: Stack, phases: Phases) -> None:
    for tag in tags:
        for other in tags:
            if tag != other and tag in other:
                where = " in ".join(phases.names[phase] for phase in reversed(stack)) or "text"
                raise ValueError(
                    f"phases: {tag.decode()!r} and {other.decode()!r} both count in {where}, and one is part of the "
                    "other: choose other tags"
                )
