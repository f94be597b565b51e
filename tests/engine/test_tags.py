"""The compiled tables against a scan of the text, over vocabularies in which tags are split and fused."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from thyme.engine.phases import ANSWER, CODE, TEXT
from thyme.engine.tags import ENDING_EVENTS, Mode, TagAutomaton, TagEvent, TokenKind

TAG = {
    b"<code>": TagEvent.CODE_START,
    b"</code>": TagEvent.CODE_END,
    b"<answer>": TagEvent.ANSWER_START,
    b"</answer>": TagEvent.ANSWER_END,
    b"<sandbox_output>": TagEvent.FORGED,
}
PATTERN = re.compile(b"|".join(map(re.escape, TAG)))
LEADS_TO = {
    TagEvent.CODE_START: Mode.CODE,
    TagEvent.CODE_END: Mode.TEXT,
    TagEvent.ANSWER_START: Mode.ANSWER,
    TagEvent.ANSWER_END: Mode.TEXT,
}


def scan(tokens: Sequence[bytes]) -> list[tuple[Mode, TagEvent]]:
    """(mode before the token, event of the token) by looking for tags in the whole text; no bytes breaks a tag."""
    text, ends = b"", []
    for token in tokens:
        text += token or b"\0"
        ends.append(len(text))
    mode, found = Mode.TEXT, []
    for match in PATTERN.finditer(text):
        event = TAG[match[0]]
        in_code = mode is Mode.CODE
        counts = event is TagEvent.FORGED or (in_code == (event is TagEvent.CODE_END))
        if counts:
            mode = LEADS_TO.get(event, mode)
            found.append((match.end(), event, mode))
    result: list[tuple[Mode, TagEvent]] = []
    mode, start = Mode.TEXT, 0
    for end in ends:
        here = [(event, after) for at, event, after in found if start < at <= end]
        event = next((e for e, _ in here if e in ENDING_EVENTS), here[-1][0] if here else TagEvent.NONE)
        result.append((mode, event))
        mode = here[-1][1] if here else mode
        start = end
    return result


def check(automaton: TagAutomaton, vocabulary: Any, ids: Sequence[int]) -> None:
    state = 0
    for token, (mode, event) in zip(ids, scan([vocabulary.token_bytes(t) for t in ids]), strict=True):
        context = f"token {token} {vocabulary.token_bytes(token)!r}"
        assert automaton.modes[state] == mode, context
        following, found = automaton.step(state, token)
        assert found == event, context
        assert automaton.phases[state] == {Mode.TEXT: TEXT, Mode.CODE: CODE, Mode.ANSWER: ANSWER}[mode], context
        plain = {Mode.TEXT: TokenKind.TEXT, Mode.CODE: TokenKind.CODE, Mode.ANSWER: TokenKind.ANSWER}[mode]
        assert automaton.kind(state, token) == (TokenKind.TAG if event else plain), context
        state = following


def test_tables_say_what_a_scan_of_the_text_says(fragments: Any, draw: np.random.Generator) -> None:
    automaton = TagAutomaton.compile(fragments)
    for _ in range(60):
        check(automaton, fragments, draw.integers(0, fragments.vocab_size, 100).tolist())


def test_kinds_is_kind_of_every_pair(fragments: Any) -> None:
    automaton = TagAutomaton.compile(fragments)
    kinds = automaton.kinds()
    for state in range(len(automaton.modes)):
        for token in range(fragments.vocab_size):
            assert kinds[state, automaton.columns[token]] == automaton.kind(state, token)


@pytest.mark.parametrize(
    ("tokens", "event"),
    [
        ((b"<code>",), TagEvent.CODE_START),
        ((b"<co", b"de>"), TagEvent.CODE_START),
        ((b"<", b"<code>\n"), TagEvent.CODE_START),
        ((b"<<co", b"<code>"), TagEvent.CODE_START),
        ((b"<code", b"", b">"), TagEvent.NONE),  # a special token between
        ((b"</code>",), TagEvent.NONE),  # nothing was open
        ((b"<code>", b"<code>"), TagEvent.NONE),  # already open
        ((b"<code>", b"</answer>"), TagEvent.NONE),  # a string in the code
        ((b"<code>x</code>y",), TagEvent.CODE_END),
        ((b"<code>", b"x</co", b"de>\n"), TagEvent.CODE_END),
        ((b"<answer>1</answer><code>",), TagEvent.ANSWER_END),
        ((b"<code>", b"<sandbox_", b"output>"), TagEvent.FORGED),
        ((b"<sandbox_output></answer>",), TagEvent.FORGED),
        ((b"</sandbox_output>",), TagEvent.NONE),
        ((b"<CODE>",), TagEvent.NONE),
    ],
)
def test_event_of_the_last_token(tokens: tuple[bytes, ...], event: TagEvent, fragments: Any) -> None:
    vocabulary = type(fragments)(tokens)
    automaton = TagAutomaton.compile(vocabulary)
    state = 0
    for token in range(len(tokens) - 1):
        state, _ = automaton.step(state, token)
    assert automaton.step(state, len(tokens) - 1)[1] == event


class ByteLevel:
    """Every byte, and the tags' pieces as byte-level BPE merges them; spelled in its alphabet and back, as Qwen's."""

    def __init__(self, draw: np.random.Generator) -> None:
        base = [bytes([byte]) for byte in range(256)]
        text = b"so <code>\nx = 1\n</code> then <sandbox_output>7</sandbox_output>\n<answer>\xc3\xa9</answer>"
        cuts = draw.integers(0, len(text), (600, 2))
        pieces = {text[a : a + 1 + b % 9] for a, b in cuts.tolist()}
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        assert len(alphabet) == 256
        self.tokens = [*base, *sorted(pieces), b""]
        self.vocab_size = len(self.tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def test_byte_level_vocabulary(draw: np.random.Generator) -> None:
    vocabulary = ByteLevel(draw)
    automaton = TagAutomaton.compile(vocabulary)
    text = b"a<code>b</code><answer>c</answer>\n<sandbox_output><<code>></code"
    by_first: dict[int, list[int]] = {}
    for token, raw in enumerate(vocabulary.tokens):
        if raw:
            by_first.setdefault(raw[0], []).append(token)
    for _ in range(200):  # the same text in random cuts
        ids, at = [], 0
        while at < len(text):
            fitting = [t for t in by_first[text[at]] if text.startswith(vocabulary.tokens[t], at)]
            ids.append(int(draw.choice(fitting)))
            at += len(vocabulary.tokens[ids[-1]])
        check(automaton, vocabulary, ids)


def test_one_compilation_per_vocabulary(fragments: Any) -> None:
    again = type(fragments)(fragments.tokens)
    assert TagAutomaton.compile(again) is TagAutomaton.compile(fragments)
    other = type(fragments)((*fragments.tokens[:-1], b"<code>?"))
    assert TagAutomaton.compile(other) is not TagAutomaton.compile(fragments)


def test_the_import_is_free_of_torch() -> None:
    import subprocess
    import sys

    code = "import sys, json, thyme.engine.tags, thyme.engine.config; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) is False
