"""The tag automaton: where in text, code or answer a sequence of tokens is, one table lookup per token.

To a tokenizer tags are plain text: one may be split over several tokens, or end in the middle of a token together with
what follows. So the tags are compiled against the vocabulary once, into dense tables over (state, token). A state is a
mode and the longest prefix of a tag that the text ends in. A device reads the tables without waiting for the host.

    mode     tags that count                                      temperature
    TEXT     <code> -> CODE, <answer> -> ANSWER, </answer>,       text
             <sandbox_output>
    ANSWER   as TEXT; </answer> -> TEXT                           text
    CODE     </code> -> TEXT, <sandbox_output>                    code

`<sandbox_output>` is never the model's to write: completing it is the event FORGED, in every mode.

Numpy only; torch is not imported.
"""

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CODE_START, CODE_END = b"<code>", b"</code>"
ANSWER_START, ANSWER_END = b"<answer>", b"</answer>"
SANDBOX_START = b"<sandbox_output>"


class TokenKind(IntEnum):
    """What a token of a trajectory is."""

    PROMPT = 0
    TEXT = 1
    CODE = 2
    """Drawn inside a code block, at the code temperature."""
    TAG = 3
    """Completes a tag, perhaps fused with other text. Earlier tokens of a split tag have their mode's kind."""
    SANDBOX = 4
    IMAGE = 5
    ANSWER = 6
    END = 7
    """An end-of-sequence id."""


class TagEvent(IntEnum):
    """What a token completes. Of several tags in a token the first that can end a round counts, else the last."""

    NONE = 0
    CODE_START = 1
    CODE_END = 2
    ANSWER_START = 3
    ANSWER_END = 4
    FORGED = 5


ENDING_EVENTS = {TagEvent.CODE_END: "</code>", TagEvent.ANSWER_END: "</answer>", TagEvent.FORGED: "forged"}
"""Events that end a round, with the stop_reason each gives."""
IS_ENDING = np.array([event in ENDING_EVENTS for event in TagEvent])
"""[events] Whether a TagEvent ends a round."""


class Mode(IntEnum):
    """What the text is inside of; its value indexes a row's (text, code) temperatures through `temperature_mode`."""

    TEXT = 0
    CODE = 1
    ANSWER = 2


_KIND = {Mode.TEXT: TokenKind.TEXT, Mode.CODE: TokenKind.CODE, Mode.ANSWER: TokenKind.ANSWER}
_KINDS = np.array([_KIND[mode] for mode in Mode], dtype=np.uint8)

# mode -> {tag: (event, the mode it leads to)}
_PROSE = {
    CODE_START: (TagEvent.CODE_START, Mode.CODE),
    ANSWER_START: (TagEvent.ANSWER_START, Mode.ANSWER),
    ANSWER_END: (TagEvent.ANSWER_END, Mode.TEXT),
}
_RULES: dict[Mode, dict[bytes, tuple[TagEvent, Mode]]] = {
    Mode.TEXT: {**_PROSE, SANDBOX_START: (TagEvent.FORGED, Mode.TEXT)},
    Mode.CODE: {CODE_END: (TagEvent.CODE_END, Mode.TEXT), SANDBOX_START: (TagEvent.FORGED, Mode.CODE)},
    Mode.ANSWER: {**_PROSE, SANDBOX_START: (TagEvent.FORGED, Mode.ANSWER)},
}


class TokenTable(Protocol):
    """What the compiler needs to know of a tokenizer."""

    vocab_size: int

    def token_bytes(self, token_id: int, /) -> bytes:
        """What the token adds to the text; nothing for special tokens."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TagAutomaton:
    """Tables over S states and V tokens. State 0, TEXT after nothing, is the start of a round."""

    next_state: NDArray[np.uint8]
    """[S, V]."""
    event: NDArray[np.uint8]
    """[S, V] TagEvent."""
    modes: NDArray[np.uint8]
    """[S] Mode."""
    temperature_mode: NDArray[np.uint8]
    """[S] 0: drawn at the text temperature, 1: at the code temperature."""

    @classmethod
    def compile(cls, vocabulary: TokenTable) -> "TagAutomaton":
        """The tables of a tokenizer; those of the last few are kept, by the digest of all token bytes.

        A token without bytes (special, unassigned) breaks a tag that was under way.
        """
        tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.vocab_size)]
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        joined = b"".join(tokens)
        digest = hashlib.sha256(lengths.tobytes() + joined).digest()
        if digest not in _compiled:
            while len(_compiled) >= 4:
                del _compiled[next(iter(_compiled))]
            _compiled[digest] = cls._build(lengths, np.frombuffer(joined, dtype=np.uint8))
        return _compiled[digest]

    @classmethod
    def trivial(cls, vocab_size: int) -> "TagAutomaton":
        """One state and no event: for a model whose tokens have no known text."""
        nothing = np.zeros((1, vocab_size), dtype=np.uint8)
        return cls(nothing, nothing, np.zeros(1, dtype=np.uint8), np.zeros(1, dtype=np.uint8))

    def widened(self, vocab_size: int) -> "TagAutomaton":
        """With ids that only the model has: without bytes, they break a tag that was under way."""
        missing = vocab_size - self.next_state.shape[1]
        root = np.searchsorted(self.modes, self.modes).astype(np.uint8)  # a mode's first state is its empty prefix
        next_state = np.concatenate((self.next_state, np.repeat(root[:, None], missing, axis=1)), axis=1)
        event = np.pad(self.event, ((0, 0), (0, missing)))
        return replace(self, next_state=next_state, event=event)

    def walk(self, token_ids: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
        """Given tokens as if they were drawn at the start of a round: the kind and `temperature_mode` of each, [T], and
        the state after them."""
        states, state = np.empty(len(token_ids), dtype=np.int64), 0
        for i, token in enumerate(token_ids.tolist()):
            states[i] = state
            state = int(self.next_state[state, token])
        kinds = np.where(self.event[states, token_ids] > 0, np.uint8(TokenKind.TAG), _KINDS[self.modes[states]])
        return kinds, self.temperature_mode[states], state

    @classmethod
    def _build(cls, lengths: NDArray[np.int64], joined: NDArray[np.uint8]) -> "TagAutomaton":
        step, step_event, modes = _byte_tables()
        root = np.array([np.flatnonzero(modes == mode)[0] for mode in modes], dtype=np.uint8)
        # What a string does is a map from each state to (next state, event). Few different maps occur, so the tokens,
        # one byte column at a time, only change the number of their map. Sorted by length, those with bytes left lead.
        maps = [(np.arange(len(modes), dtype=np.uint8), np.zeros(len(modes), dtype=np.uint8))]
        numbers = {maps[0][0].tobytes() + maps[0][1].tobytes(): 0}

        def extend(key: int) -> int:
            (state, event), byte = maps[key >> 8], key & 255
            found = step_event[state, byte]
            state, event = step[state, byte], np.where((found > 0) & ~IS_ENDING[event], found, event)
            number = numbers.setdefault(state.tobytes() + event.tobytes(), len(maps))
            if number == len(maps):
                maps.append((state, event))
            return number

        order = np.argsort(-lengths, kind="stable")
        starts, longest_first = (np.cumsum(lengths) - lengths)[order], lengths[order]
        number_of = np.zeros(len(lengths), dtype=np.int64)
        for column in range(int(longest_first[0]) if len(lengths) else 0):
            alive = int(np.searchsorted(-longest_first, -column, side="left"))
            keys, inverse = np.unique(number_of[:alive] * 256 + joined[starts[:alive] + column], return_inverse=True)
            number_of[:alive] = np.array([extend(int(key)) for key in keys])[inverse]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        next_state = np.stack([state for state, _ in maps], 1)[:, number_of[back]]
        event = np.stack([event for _, event in maps], 1)[:, number_of[back]]
        next_state[:, lengths == 0] = root[:, None]
        return cls(next_state, event, modes, (modes == Mode.CODE).astype(np.uint8))

    def kind(self, state: int, token: int) -> TokenKind:
        """Of a token drawn in `state`; the caller knows which ids end a sequence (END)."""
        return TokenKind.TAG if self.event[state, token] else _KIND[Mode(self.modes[state])]

    def kinds(self) -> NDArray[np.uint8]:
        """`kind` of all pairs, [S, V]."""
        return np.where(self.event > 0, np.uint8(TokenKind.TAG), _KINDS[self.modes][:, None])


_compiled: dict[bytes, TagAutomaton] = {}


def _byte_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """The automaton over bytes: next state, event [S, 256], mode [S]; the first state of a mode has no prefix."""
    states: list[tuple[Mode, bytes]] = []
    for mode in Mode:
        prefixes = {tag[:length] for tag in _RULES[mode] for length in range(len(tag))}
        states += [(mode, prefix) for prefix in sorted(prefixes, key=lambda p: (len(p), p))]
    number = {state: i for i, state in enumerate(states)}
    following = np.zeros((len(states), 256), dtype=np.uint8)
    event = np.zeros((len(states), 256), dtype=np.uint8)
    for (mode, prefix), i in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if text in _RULES[mode]:
                event[i, byte], after = _RULES[mode][text]
                following[i, byte] = number[after, b""]
            else:
                suffixes = (text[start:] for start in range(len(text) + 1))
                following[i, byte] = next(number[mode, s] for s in suffixes if (mode, s) in number)
    return following, event, np.array([mode for mode, _ in states], dtype=np.uint8)
