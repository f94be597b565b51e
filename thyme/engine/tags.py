"""The tag automaton: where in text, code or answer a sequence of tokens is, one table lookup per token.

To a tokenizer tags are plain text: one may be split over several tokens, or end in the middle of a token together with
what follows. So the tags are compiled against the vocabulary once, into dense tables over (state, token). A state is a
mode and the longest prefix of a tag that the text ends in. A device reads the tables without waiting for the host.

    mode     tags that count
    TEXT     <code> -> CODE, <answer> -> ANSWER, </answer>, <sandbox_output>
    ANSWER   as TEXT; </answer> -> TEXT
    CODE     </code> -> TEXT, <sandbox_output>

Declared tag pairs (`thyme.engine.phases`) make more modes, one for every nesting of what is open, and the literals of
code (`thyme.engine.literals`) more states of CODE. `<sandbox_output>` is never the model's to write: completing it is
the event FORGED, in every mode.

Numpy only; torch is not imported.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thyme.engine.literals import begins_number
from thyme.engine.phases import Phases
from thyme.engine.tag_bytes import ByteTable, byte_tables
from thyme.engine.tag_bytes import Mode as Mode
from thyme.engine.tag_bytes import TagEvent as TagEvent


class TokenKind(IntEnum):
    """What a token of a trajectory is."""

    PROMPT = 0
    TEXT = 1
    CODE = 2
    """Drawn inside a code block."""
    TAG = 3
    """Completes a tag, perhaps fused with other text. Earlier tokens of a split tag have their mode's kind."""
    SANDBOX = 4
    IMAGE = 5
    ANSWER = 6
    END = 7
    """An end-of-sequence id."""


ENDING_EVENTS = {TagEvent.CODE_END: "</code>", TagEvent.ANSWER_END: "</answer>", TagEvent.FORGED: "forged"}
"""Events that end a round, with the stop_reason each gives."""
IS_ENDING = np.array([event in ENDING_EVENTS for event in TagEvent])
"""[events] Whether a TagEvent ends a round."""


_KINDS = np.array([TokenKind.TEXT, TokenKind.CODE, TokenKind.ANSWER], dtype=np.uint8)
"""[modes] What a token is that completes no tag."""


class TokenTable(Protocol):
    """What the compiler needs to know of a tokenizer."""

    vocab_size: int

    def token_bytes(self, token_id: int, /) -> bytes:
        """What the token adds to the text; nothing for special tokens."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TagAutomaton:
    """Tables over S states and C columns, in one of which each of V tokens has what it does. State 0, TEXT after
    nothing, is the start of a round."""

    next_state: NDArray[np.uint16]
    """[S, C]."""
    event: NDArray[np.uint8]
    """[S, C] TagEvent."""
    columns: NDArray[np.int32]
    """[V]."""
    modes: NDArray[np.uint8]
    """[S] Mode."""
    phases: NDArray[np.uint8]
    """[S] number of the phase (`thyme.engine.phases`) that a token is drawn in."""
    is_place: NDArray[np.bool_]
    """[S] The phase is that only where the most likely id begins a number, else code."""
    begins_number: NDArray[np.bool_]
    """[V]."""
    reopened: NDArray[np.uint16]
    """[S] where the next round begins after one that ended there, given tokens between: its declared phases are open,
    all else is closed."""

    @classmethod
    def compile(cls, vocabulary: TokenTable, phases: Phases | None = None) -> "TagAutomaton":
        """The tables of a tokenizer; those of the last few are kept, by the digest of all token bytes.

        A token without bytes (special, unassigned) breaks a tag that was under way.

        Raises:
            ValueError: tags of declared phases cannot be told apart, or the phases make too many states.
        """
        phases = phases or Phases()
        tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.vocab_size)]
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        joined = b"".join(tokens)
        key = phases, hashlib.sha256(lengths.tobytes() + joined).digest()
        if key not in _compiled:
            while len(_compiled) >= 4:
                del _compiled[next(iter(_compiled))]
            begins = np.array([begins_number(token) for token in tokens], dtype=bool)
            _compiled[key] = cls._build(byte_tables(phases), lengths, np.frombuffer(joined, dtype=np.uint8), begins)
        return _compiled[key]

    @classmethod
    def trivial(cls, vocab_size: int) -> "TagAutomaton":
        """One state and no event: for a model whose tokens have no known text."""
        one, none = np.zeros((1, 1), dtype=np.uint16), np.zeros((1, 1), dtype=np.uint8)
        return cls(
            next_state=one,
            event=none,
            columns=np.zeros(vocab_size, dtype=np.int32),
            modes=none[0],
            phases=none[0],
            is_place=none[0] > 0,
            begins_number=np.zeros(vocab_size, dtype=bool),
            reopened=one[0],
        )

    def widened(self, vocab_size: int) -> "TagAutomaton":
        """With ids that only the model has: without bytes, they break a tag that was under way."""
        missing = (0, vocab_size - len(self.columns))
        columns = np.pad(self.columns, missing)  # column 0 is theirs
        return replace(self, columns=columns, begins_number=np.pad(self.begins_number, missing))

    def step(self, state: int, token: int) -> tuple[int, TagEvent]:
        """The state after a token that is drawn in `state`, and what it completes."""
        column = self.columns[token]
        return int(self.next_state[state, column]), TagEvent(int(self.event[state, column]))

    def walk(self, token_ids: NDArray[Any], state: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
        """Given tokens as if they were drawn from `state` on, the start of a round: the kind of each and the state that
        it is drawn in, [T], and the state after them."""
        states = np.empty(len(token_ids), dtype=np.int64)
        columns = self.columns[np.asarray(token_ids, dtype=np.int64)]
        for i, column in enumerate(columns.tolist()):
            states[i] = state
            state = int(self.next_state[state, column])
        return self.kinds()[states, columns], states, state

    def after(self, rounds: Iterable[NDArray[Any]]) -> int:
        """The state in which a round begins, given the drawn tokens of all rounds before it."""
        state = 0
        for token_ids in rounds:
            state = int(self.reopened[self.walk(token_ids, state)[2]])
        return state

    @classmethod
    def _build(
        cls, table: ByteTable, lengths: NDArray[np.int64], joined: NDArray[np.uint8], begins: NDArray[np.bool_]
    ) -> "TagAutomaton":
        # What a string does is a map from each state to (next state, event). Few different maps occur, so the tokens,
        # one byte column at a time, only change the number of their map. Sorted by length, those with bytes left lead.
        size = len(table.modes)
        maps = [
            (table.root, np.zeros(size, dtype=np.uint8)),
            (np.arange(size, dtype=np.uint16), np.zeros(size, np.uint8)),
        ]
        numbers = {maps[1][0].tobytes() + maps[1][1].tobytes(): 1}

        def extend(key: int) -> int:
            (state, event), byte = maps[key >> 8], key & 255
            found = table.event[state, byte]
            state, event = table.following[state, byte], np.where((found > 0) & ~IS_ENDING[event], found, event)
            number = numbers.setdefault(state.tobytes() + event.tobytes(), len(maps))
            if number == len(maps):
                maps.append((state, event))
            return number

        order = np.argsort(-lengths, kind="stable")
        starts, longest_first = (np.cumsum(lengths) - lengths)[order], lengths[order]
        number_of = np.ones(len(lengths), dtype=np.int64)
        for column in range(int(longest_first[0]) if len(lengths) else 0):
            alive = int(np.searchsorted(-longest_first, -column, side="left"))
            keys, inverse = np.unique(number_of[:alive] * 256 + joined[starts[:alive] + column], return_inverse=True)
            number_of[:alive] = np.array([extend(int(key)) for key in keys])[inverse]
        columns = np.empty_like(order)
        columns[order] = number_of
        columns[lengths == 0] = 0
        used, columns = np.unique(np.append(columns, 0), return_inverse=True)  # many maps are of halves of tokens
        return cls(
            next_state=np.stack([maps[number][0] for number in used], 1),
            event=np.stack([maps[number][1] for number in used], 1),
            columns=columns[:-1].astype(np.int32),
            modes=table.modes,
            phases=table.phases,
            is_place=table.is_place,
            begins_number=begins,
            reopened=table.reopened,
        )

    def kind(self, state: int, token: int) -> TokenKind:
        """Of a token drawn in `state`; the caller knows which ids end a sequence (END)."""
        return TokenKind.TAG if self.step(state, token)[1] else TokenKind(int(_KINDS[self.modes[state]]))

    def kinds(self) -> NDArray[np.uint8]:
        """`kind` of all states and columns, [S, C]."""
        return np.where(self.event > 0, np.uint8(TokenKind.TAG), _KINDS[self.modes][:, None])


_compiled: dict[tuple[Phases, bytes], TagAutomaton] = {}
