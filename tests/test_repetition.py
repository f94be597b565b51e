"""The C++ repetition detector against its definition, and the default limits against texts that must pass."""

import base64
import itertools
import json
import pprint
import pydoc_data.topics
import random
import re
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
import pytest
import repetition_rates as rates
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thyme import _native
from thyme.repetition import (
    RepetitionConfig,
    RepetitionDetector,
    RepetitionHit,
    TokenClass,
    near_scores,
    repetition_hit_ref,
    repetition_ref,
    token_classes,
)

ROOT = Path(__file__).parents[1]
SMALL = RepetitionConfig(
    window=3, ratio=0.5, min_tokens=8, max_period=6, min_tail_tokens=4, copies=((1, 6), (2, 4), (3, 3))
)
# One rule switched off: the copies needed, or the shortest segment judged, are beyond any test.
NO_TAIL = {"max_period": 1, "copies": ((1, 30_000),)}
NO_SUBSTRING = {"min_tokens": 30_000}


def first_hit(
    tokens: Sequence[int],
    config: RepetitionConfig,
    native: type | None = None,
    classes: NDArray[np.uint8] | None = None,
) -> RepetitionHit | None:
    detector = RepetitionDetector(config, capacity=1, classes=classes)
    if native is not None:
        detector._native = detector._open_native(native, classes)
    slot = detector.open()
    flags = detector.push(np.full(len(tokens), slot, np.int32), np.array(tokens, np.int32))
    hit = detector.hit(slot)
    # A hit stays: flags are 0 up to the completing token and 1 from it on.
    assert flags.tolist() == [int(hit is not None and i >= hit.index) for i in range(len(tokens))]
    return hit


def expected_hit(
    tokens: Sequence[int], config: RepetitionConfig, classes: NDArray[np.uint8] | None = None
) -> RepetitionHit | None:
    index = repetition_ref(tokens, config, classes)
    return None if index is None else repetition_hit_ref(tokens[: index + 1], config, classes)


# ---- the definition, by hand -------------------------------------------------------------------------------


def test_reference_tail_by_hand() -> None:
    config = replace(SMALL, **NO_SUBSTRING)
    assert repetition_ref([9, 1, 2, 1, 2, 1, 2, 1, 2], config) == 8  # fourth copy of a two-token block
    assert repetition_ref([9, 1, 2, 1, 2, 1, 2, 1], config) is None
    assert repetition_ref([7, 7, 7, 7, 7, 7], config) == 5
    # 7777 77 is also three copies of "77", but "77" is a power of "7", which needs six copies.
    assert repetition_ref([7, 7, 7, 7, 7], replace(config, copies=((1, 6), (3, 2)))) is None
    assert repetition_ref([1, 2, 3, 1, 2, 3], replace(config, copies=((3, 2),))) == 5
    assert repetition_ref([1, 2, 3, 1, 2, 3], replace(config, copies=((3, 2),), min_tail_tokens=7)) is None
    assert repetition_ref([1, 2, 3, 4, 1, 2, 3, 4], replace(config, copies=((3, 9), (8, 2)), max_period=3)) is None
    assert repetition_hit_ref([9, 1, 2, 1, 2, 1, 2, 1, 2], config) == RepetitionHit("tail", 8, 1, 2, 4)


def test_reference_substring_by_hand() -> None:
    config = replace(SMALL, **NO_TAIL)
    # The second copy is complete at 7 tokens, but a segment is judged from 8 on.
    assert repetition_ref([1, 2, 3, 0, 1, 2, 3, 5, 1, 2, 3], config) == 7
    assert repetition_ref([1, 2, 3, 0, 1, 2, 3, 5, 1, 2, 3], replace(config, min_tokens=2)) == 6
    assert repetition_ref([1, 2, 3, 0, 1, 2, 3, 5, 1, 2, 3], replace(config, ratio=0.8)) == 10
    # Exactly half does not exceed half: two copies of three in twelve.
    assert repetition_ref([1, 2, 3, 0, 4, 5, 6, 8, 9, 1, 2, 3], config) is None
    assert repetition_ref([1, 2, 3, 0, 4, 5, 6, 8, 1, 2, 3], config) == 10
    # Overlapping occurrences count once: 11111 holds 111 once, not three times.
    assert repetition_ref([1, 1, 1, 1, 1, 0, 2, 3, 4], replace(config, ratio=0.4)) is None
    # Once is no repetition, however much it covers.
    assert repetition_ref([1, 2, 3], replace(config, min_tokens=1)) is None
    assert repetition_hit_ref([0, 1, 2, 3, 1, 2, 3, 4], config) == RepetitionHit("substring", 7, 1, 3, 2)


def test_reference_structured_by_hand() -> None:
    # 8 is a digit, 9 a bracket, 7 a blank; the others are words.
    classes = np.array([1] * 7 + [16, 2, 4], np.uint8)
    config = replace(
        SMALL, **NO_SUBSTRING, max_data_share=0.25, min_numbers=3, structured_copies=5, structured_tokens=12
    )

    def fires(block: list[int], copies: int) -> bool:
        fired = [repetition_ref(block * n, config, classes) is not None for n in (copies - 1, copies)]
        return fired == [False, True]

    assert fires([1, 2, 3], 3)
    assert fires([1, 2, 3, 8], 3)  # a quarter of data is no more than a quarter
    assert fires([1, 2, 8], 5)  # a third is, so five copies are needed
    assert fires([1, 2, 3, 8, 7], 3)  # blanks do not count: a quarter again
    assert fires([1, 8, 7, 7], 5)  # so here it is a half
    assert fires([1, 2, 9], 5)
    assert fires([1, 9], 6)  # five copies cover only ten tokens
    assert fires([8], 6)  # a single token has no columns
    assert fires([8, 7], 6)
    assert fires([8, 5, 8, 6, 8, 4], 5)
    answer = classes | np.array([0] * 5 + [TokenClass.ANSWER, 0, 0, 0, 0], np.uint8)
    assert repetition_ref([9, 8, 5] * 3, config, classes) is None
    assert repetition_ref([9, 8, 5] * 3, config, answer) == 8  # an answer is given once, whatever it is made of
    plain_marks = np.array([1] * 4 + [0, 0, 0, 16, 2, 4], np.uint8)
    assert repetition_ref([8, 5, 8, 6, 8, 4] * 3, config, plain_marks) == 17  # counting that begins again
    assert repetition_ref([8, 5, 8, 8, 6, 4] * 3, config, plain_marks) is None  # two numbers, one of two digits
    # Few different tokens: a table where rows may end, as far as is known; words without a line break are no table.
    row = [1, 1, 2, 1, 1, 1]
    low = replace(config, min_distinct=3)
    assert repetition_ref(row * 3, low, np.ones(3, np.uint8)) == 17
    assert repetition_ref(row * 3, low) is None
    assert repetition_ref(row * 5, low) == 29
    assert repetition_ref(row * 3, replace(low, min_distinct=2)) == 17


def test_substring_of_data_needs_more_copies() -> None:
    config = replace(SMALL, **NO_TAIL, structured_copies=3, structured_tokens=1)
    tokens = [1, 2, 3, 0, 1, 2, 3, 5]
    assert repetition_ref(tokens, config) == 7
    assert repetition_ref(tokens, config, np.array([1, 1, 2, 1], np.uint8)) is None
    assert repetition_ref([*tokens, 1, 2, 3], config, np.array([1, 1, 2, 1], np.uint8)) == 10


def test_reference_near_by_hand() -> None:
    config = RepetitionConfig(
        **NO_SUBSTRING,
        max_period=6,
        copies=((6, 30_000),),
        near_tokens=9,
        near_copies=2,
        near_exact_copies=2,
        near_edit_cost=2,
        near_row_share=1.0,
        near_word_share=0.0,
        min_distinct=1,
    )

    def score(tokens: list[int], period: int) -> int:
        return list(near_scores(tokens, config))[-1][period]

    abcd = [1, 2, 3, 4]
    assert score(abcd * 2, 4) == 4
    assert score([*abcd, 1, 2], 4) == 2
    assert score([*abcd, 1, 2, 3], 4) == 3
    assert score([*abcd, 1, 2, 3, 9], 4) == 0  # half an edit is left, which is lost
    assert score([*abcd, *abcd, 9], 4) == 2  # an edit costs two
    assert score([*abcd, *abcd, 9, 2], 4) == 3
    assert score([*abcd, *abcd, 9, 8], 4) == 0
    # A token more moves the score to the next period, a token less to the one before.
    more = [*abcd, *abcd, 9, *abcd]
    assert (score(more[:9], 5), score(more, 5)) == (2, 6)
    fewer = [*abcd, *abcd, 2, 3, 4]
    assert score(fewer, 3) == 5 - 2 + 1
    # Nine equal tokens and an edit in between: 1 2 3 4 | 1 2 3 4 | 9 2 3 4 | 1 2 ...
    counted = [*abcd, *abcd, 9, 2, 3, 4, 7, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    hit = expected_hit(counted, config)
    assert hit is not None
    assert (hit.rule, hit.period, hit.copies) == ("near", 4, 1 + 9 // 4)
    assert hit.start == hit.index + 1 - 3 * 4
    assert repetition_ref(counted[: hit.index], config) is None
    assert repetition_ref(counted, replace(config, near_tokens=0)) is None
    assert repetition_ref(counted, replace(config, near_word_share=0.1)) is None  # no token is known to be a word
    words = np.ones(10, np.uint8)
    assert repetition_ref(counted, replace(config, near_word_share=0.1), words) == hit.index
    # Copies in which nothing differs must be more; where they end, they are not copies with an edit.
    exact, refrain = [*abcd * 3, 1], replace(config, near_exact_copies=5)
    assert repetition_ref(exact, config) == 12
    assert repetition_ref([*abcd * 4, 9, 8, 7, 6], refrain) is None
    assert repetition_ref(abcd * 5, refrain) == 19
    assert repetition_ref([*abcd * 2, 9, 2, 3, 4, *abcd * 3], refrain) == 18
    # Where rows end, a word is no edit, but another line; a number is an edit still.
    rows = np.array([*[1] * 4, TokenClass.WORD | TokenClass.ROW, *[1] * 5], np.uint8)
    lines = replace(config, near_line_cost=6, near_row_share=0.1, max_data_share=1.0)
    assert repetition_ref(counted, lines, words) == hit.index < 25
    assert repetition_ref(counted, lines, rows) == 25  # none of the first score outlasts the edits
    assert repetition_ref(counted, replace(lines, near_row_share=0.3), rows) == hit.index
    rows[[1, 7, 9]] = TokenClass.NUMBER
    assert repetition_ref(counted, lines, rows) == hit.index
    words[4] = TokenClass.MARK  # one of the last nine tokens, or two
    fired = [repetition_ref(counted, replace(config, near_mark_share=share), words) for share in (0.0, 0.3)]
    assert fired == [None, hit.index]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (
            " The, cat, \u732b, 's, -known, *Note, \uff0c\u732b, \u3002\u732b, na\u00efve, \u0939, \u093e, \n\nSo",
            "WORD",
        ),
        ("1, 7,  3, \u00bd, 2nd", "NUMBER"),
        ('[, ":,  |, |, =, #, `, ;, :, .append, _name, <td, \\frac, \tyes, \t, .., ...., $, \U0001f600,  --', "MARK"),
        ('.; ,; !; ?; ...; \u3002; "; ."; ,\u201d; -;  - ; /;  -> ; \u2192', ""),
        (" True, None, null,  false", "WORD|NUMBER"),
        (" (see", "WORD|MARK"),
        (" boxed", "WORD|ANSWER"),
        ("\\boxed", "MARK|ANSWER"),
        (" ,     ", "BLANK"),
    ],
)
def test_token_classes(tokens: str, expected: str) -> None:
    parts = tokens.split(", " if expected else "; ")
    found = [TokenClass(int(value)) & ~TokenClass.ROW for value in token_classes(part.encode() for part in parts)]
    wanted = reduce(or_, (TokenClass[name] for name in expected.split("|")) if expected else (), TokenClass(0))
    assert found == [wanted] * len(parts), dict(zip(parts, found, strict=True))


def test_token_classes_of_rows_and_parts_of_characters() -> None:
    vocabulary = [b"", b".\n", b"\n", b"\r\n", b" |\n"]
    rows = [TokenClass.ROW, TokenClass.ROW, *[TokenClass.ROW | TokenClass.BLANK] * 2, TokenClass.ROW | TokenClass.MARK]
    assert token_classes(vocabulary).tolist() == rows
    # The first byte of a letter, of a symbol such as a tick, of a smiley; and one that is not first.
    parts = ["\u732b".encode()[:2], b" " + "\u2713".encode()[:1], "\U0001f600".encode()[:2], "\u732b".encode()[1:]]
    assert token_classes(parts).tolist() == [TokenClass.WORD, TokenClass.MARK, 0, 0]


# ---- the detector equals it --------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> RepetitionConfig:
    limits = sorted(draw(st.sets(st.integers(1, 10), min_size=1, max_size=3)))
    return RepetitionConfig(
        window=draw(st.integers(1, 6)),
        ratio=draw(st.sampled_from([0.2, 1 / 3, 0.5, 0.75, 0.95])),
        min_tokens=draw(st.integers(1, 40)),
        max_period=draw(st.integers(1, 12)),
        min_tail_tokens=draw(st.integers(1, 24)),
        copies=tuple((limit, draw(st.integers(2, 9))) for limit in limits),
        structured_copies=draw(st.integers(2, 12)),
        structured_tokens=draw(st.integers(1, 40)),
        max_data_share=draw(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0])),
        min_numbers=draw(st.integers(1, 3)),
        min_distinct=draw(st.integers(1, 5)),
        near_tokens=draw(st.integers(0, 20)),
        near_copies=draw(st.integers(2, 4)),
        near_exact_copies=draw(st.integers(2, 6)),
        near_max_period=draw(st.integers(1, 12)),
        near_edit_cost=(edit_cost := draw(st.integers(1, 5))),
        near_line_cost=edit_cost + draw(st.integers(0, 6)),
        near_row_share=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        near_word_share=draw(st.sampled_from([0.0, 0.3, 0.5])),
        near_mark_share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )


@st.composite
def segments(draw: st.DrawFn) -> list[int]:
    # Copies of few blocks over few tokens, so that the rules come close and often fire, and a few edits.
    blocks = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=3))
    picks = draw(st.lists(st.integers(0, len(blocks) - 1), max_size=20))
    tokens = [token for pick in picks for token in blocks[pick]]
    for at in draw(st.lists(st.integers(0, len(tokens)), max_size=4)):
        tokens[at : at + draw(st.integers(0, 1))] = draw(st.lists(st.integers(0, 3), max_size=1))
    return tokens


CLASSES = st.none() | st.lists(st.integers(0, 63), max_size=5).map(lambda values: np.array(values, np.uint8))


@settings(max_examples=400, deadline=None)
@given(tokens=segments(), config=configs(), classes=CLASSES)
def test_detector_equals_reference(tokens: list[int], config: RepetitionConfig, classes) -> None:
    assert first_hit(tokens, config, classes=classes) == expected_hit(tokens, config, classes)


@settings(max_examples=200, deadline=None)
@given(tokens=segments(), config=configs(), classes=CLASSES)
def test_colliding_hashes_change_nothing(tokens: list[int], config: RepetitionConfig, classes) -> None:
    # Hashes modulo 7: unequal windows meet all the time and only the comparison of tokens tells them apart.
    hit = first_hit(tokens, config, _native._CollidingRepetitionDetector, classes)
    assert hit == expected_hit(tokens, config, classes)


def test_scores_stop_at_16_bits() -> None:
    # Marks score without end, as they are no prose. The words after them are, and the hit tells the score.
    config = RepetitionConfig(
        **NO_SUBSTRING,
        max_period=4,
        copies=((4, 30_000),),
        structured_copies=30_000,
        near_tokens=100,
        near_max_period=4,
        near_mark_share=0.5,
        min_distinct=1,
        max_data_share=0.5,
    )
    tokens = [1, 2] * 20_000 + [3, 4] * 60
    classes = np.array([0, 4, 4, 1, 1], np.uint8)
    hit = first_hit(tokens, config, classes=classes)
    assert hit is not None
    assert (hit.rule, hit.period, hit.copies) == ("near", 2, 1 + 32766 // 2)


def fibonacci(n: int) -> list[int]:
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def thue_morse(n: int) -> list[int]:
    return [i.bit_count() % 2 for i in range(n)]


def de_bruijn(order: int) -> list[int]:
    # Greedy "prefer one": every word of `order` bits occurs exactly once.
    bits, seen = [0] * order, {(0,) * order}
    while len(seen) < 2**order:
        bit = 1 if (*bits[-order + 1 :], 1) not in seen else 0
        bits.append(bit)
        seen.add(tuple(bits[-order:]))
    return bits


STRINGS = {
    "fibonacci": fibonacci(150),
    "thue-morse": thue_morse(150),
    "de-bruijn": de_bruijn(7),
    "one-token": [5] * 120,
    "flawed-loop": ([1, 2, 3, 4, 5] * 4 + [1, 2, 9, 4, 5]) * 6,
    "growing-period": [token for k in range(1, 15) for token in [*range(k), 0]],
    "largest-ids": [2**31 - 1, 2**31 - 2] * 60,
}


@pytest.mark.parametrize("native", [None, _native._CollidingRepetitionDetector], ids=["random-base", "colliding"])
@pytest.mark.parametrize("name", STRINGS)
def test_adversarial_strings(name: str, native: type | None) -> None:
    tokens = STRINGS[name]
    for window, min_tokens in ((1, 1), (4, 30), (8, 100)):
        for copies in (((32, 2),), ((1, 50), (4, 12), (32, 3)), ((32, 100),)):
            config = RepetitionConfig(
                window=window, min_tokens=min_tokens, max_period=32, min_tail_tokens=20, copies=copies
            )
            assert first_hit(tokens, config, native) == expected_hit(tokens, config)


def test_many_distinct_windows() -> None:
    # Far beyond the first size of the window table, then one repeated half: tokens 2000.. copy tokens 0..
    tokens = [*range(2000), *range(1001)]
    config = RepetitionConfig(window=1000, ratio=0.6, min_tokens=1, **NO_TAIL)
    assert first_hit(tokens, config) == RepetitionHit("substring", 2999, 0, 1000, 2)


# ---- slots -------------------------------------------------------------------------------------------------


def push(detector: RepetitionDetector, slot: int, tokens: Sequence[int]) -> list[int]:
    return detector.push([slot] * len(tokens), tokens).tolist()


def test_interleaved_slots_equal_separate_runs() -> None:
    rng = random.Random(0)
    strings = [[rng.randrange(2 + i % 3) for _ in range(60)] for i in range(40)]
    detector = RepetitionDetector(SMALL, capacity=40)
    slots = [detector.open() for _ in strings]
    rng.shuffle(slots)
    flags = np.zeros((60, 40), np.uint8)
    for step in range(60):
        flags[step] = detector.push(np.array(slots, np.int32), np.array([s[step] for s in strings], np.int32))
    hits = [detector.hit(slot) for slot in slots]
    assert hits == [expected_hit(string, SMALL) for string in strings]
    assert flags.any(axis=0).tolist() == [hit is not None for hit in hits]
    assert len({hit and hit.rule for hit in hits}) == 3, "strings must reach both rules and neither"


def test_fork_copies_state_and_then_diverges() -> None:
    config = replace(SMALL, **NO_SUBSTRING)
    detector = RepetitionDetector(config, capacity=3)
    parent = detector.open()
    push(detector, parent, [1, 2, 3, 1, 2, 3, 1, 2])
    child = detector.fork(parent)
    assert push(detector, child, [4]) == [0]
    assert push(detector, parent, [3]) == [1]
    grandchild = detector.fork(parent)
    assert detector.hit(grandchild) == detector.hit(parent) == RepetitionHit("tail", 8, 0, 3, 3)
    assert detector.hit(child) is None


def test_restart_and_reuse_begin_an_empty_segment() -> None:
    detector = RepetitionDetector(replace(SMALL, **NO_SUBSTRING), capacity=1)
    slot = detector.open()
    assert push(detector, slot, [1, 2] * 4 + [3]) == [0] * 7 + [1, 1]
    detector.restart(slot)
    assert detector.hit(slot) is None
    assert push(detector, slot, [1, 2, 1, 2, 1, 2, 1]) == [0] * 7
    detector.restart(slot)
    assert push(detector, slot, [2, 1]) == [0, 0]  # would be the fourth copy of the segment before
    detector.close(slot)
    assert detector.open() == slot
    assert push(detector, slot, [2, 1, 2, 1, 2, 1]) == [0] * 6


def test_threads_share_a_detector() -> None:
    strings = [[i, *range(i)] * 400 for i in range(1, 5)]
    config = RepetitionConfig(window=4, min_tokens=1000, max_period=64, copies=((64, 200),))
    detector = RepetitionDetector(config, capacity=4)
    slots = [detector.open() for _ in strings]

    def run(slot: int, tokens: list[int]) -> None:
        for token in tokens:
            detector.push([slot], [token])

    threads = [threading.Thread(target=run, args=pair) for pair in zip(slots, strings, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [detector.hit(slot) for slot in slots] == [first_hit(string, config) for string in strings]


def test_bad_arguments_are_value_errors_and_change_nothing() -> None:
    detector = RepetitionDetector(replace(SMALL, **NO_SUBSTRING), capacity=1)
    for call in (detector.fork, detector.close, detector.restart, detector.hit):
        for slot in (0, 1, -1):
            with pytest.raises(ValueError, match="not open"):
                call(slot)
    slot = detector.open()
    with pytest.raises(ValueError, match=r"all 1 slots .* are open"):
        detector.open()
    with pytest.raises(ValueError, match=r"all 1 slots .* are open"):
        detector.fork(slot)
    push(detector, slot, [1, 2] * 3 + [1])
    for slots, tokens, message in (
        ([slot, 7], [3, 3], "slot 7 is not open"),
        ([slot, slot], [3, -1], r"tokens\[1\] is -1"),
        ([slot], [3, 3], "equally long"),
        ([[slot]], [[3]], "one-dimensional"),
        ([slot], [2**32 + 3], "32-bit"),
        ([slot], [3.0], "32-bit"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.push(slots, tokens)
    assert push(detector, slot, [2]) == [1]  # the fourth copy: none of the 3s got in
    assert detector.push([], []).shape == (0,)
    with pytest.raises(ValueError, match="capacity"):
        RepetitionDetector(SMALL, capacity=0)
    with pytest.raises(ValueError, match="negative"):
        repetition_ref([1, -1], SMALL)
    for classes in ([1, 2], np.ones((2, 2), np.uint8), np.ones(2, np.int64), np.full(2, 64, np.uint8)):
        with pytest.raises(ValueError, match="classes must be what token_classes returns"):
            RepetitionDetector(SMALL, capacity=1, classes=classes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"window": 0},
        {"min_tokens": 0},
        {"max_period": 100_000},
        {"min_tail_tokens": 0},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"copies": ()},
        {"copies": ((1, 1),)},
        {"copies": ((4, 3), (2, 3))},
        {"copies": ((0, 3),)},
        {"structured_copies": 1},
        {"structured_tokens": 0},
        {"max_data_share": 1.1},
        {"min_numbers": 0},
        {"min_distinct": 65},
        {"near_tokens": -1},
        {"near_copies": 1},
        {"near_max_period": 0},
        {"near_edit_cost": 0},
        {"near_edit_cost": 1025},
        {"near_line_cost": 3},
        {"near_row_share": 2.0},
        {"near_word_share": -0.1},
        {"near_mark_share": 1.5},
    ],
    ids=str,
)
def test_config_names_the_bad_field(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RepetitionConfig(**bad)


# ---- the default limits ------------------------------------------------------------------------------------


def ordinary_texts() -> Iterator[str]:
    """Prose, code and data as a model writes them: real documentation and source, and drawn tables."""
    rng = random.Random(0)
    for topic in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[topic][:8000]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-m]*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")[:12000]
    words = pydoc_data.topics.topics["class"].split()
    for _ in range(40):
        n = rng.randint(5, 60)
        rows = [
            {"id": i, "name": rng.choice(words), "active": rng.random() < 0.9, "price": rng.random(), "note": None}
            for i in range(n)
        ]
        yield json.dumps(rows)
        yield json.dumps([{"id": row["id"], "active": row["active"], "note": None} for row in rows], indent=4)
        yield "\n".join(f"{row['id']},{row['name']},{row['price']:.2f}" for row in rows)
        yield "| id | price |\n|----|-------|\n" + "".join(f"| {row['id']:>2} | {row['price']:.3f} |\n" for row in rows)
        yield "".join(f'    <td class="text-center">{rng.randint(0, 9)}</td>\n' for _ in rows)
        yield base64.b64encode(rng.randbytes(40 * n)).decode()
        yield pprint.pformat([[int(rng.random() < 0.1) for _ in range(12)] for _ in rows])
        side = rng.randint(2, 10)
        yield "grid = " + pprint.pformat([[0] * side] * side)
        yield "-" * rng.randint(10, 100) + "\n" + "=" * rng.randint(10, 100)
        yield "".join(f"Step {i}: multiply {i} by {rng.randint(1, 9)}, then add it to the total.\n" for i in range(n))
        yield "".join(f"The object {i} is at [{rng.randint(0, 999)}, {rng.randint(0, 999)}].\n" for i in range(n))
        yield "".join(f"        self.assertEqual(parse({rng.choice(words)!r}), {rng.randint(0, 9)})\n" for _ in rows)


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def as_words(text: str) -> list[int]:
    ids: dict[str, int] = {}
    return [ids.setdefault(word, len(ids)) for word in re.findall(r"\w+|[^\w\s]|\s+", text)]


@pytest.mark.parametrize("tokenize", [as_bytes, as_words])
def test_defaults_leave_ordinary_text_alone(tokenize) -> None:
    detector = RepetitionDetector(RepetitionConfig(), capacity=1)
    slot = detector.open()
    for text in ordinary_texts():
        detector.restart(slot)
        push(detector, slot, tokenize(text))
        hit = detector.hit(slot)
        assert hit is None, f"{hit}: {text[:300]!r}"


@pytest.mark.parametrize(
    ("loop", "at_most"),
    [
        ("!", 130),
        ("no, ", 200),
        ("I need to look at the image again. ", 360),
        ("The sign in the picture is red, so I crop the region around it and read the digit. ", 640),
        ("Wait. Let me check the coordinates of the plate once more, since this crop shows only the ground. " * 2, 600),
    ],
)
def test_defaults_catch_loops_early(loop: str, at_most: int) -> None:
    opening = pydoc_data.topics.topics["class"][:700]
    hit = first_hit(as_bytes(opening + loop * 200), RepetitionConfig())
    assert hit is not None
    assert hit.rule == "tail"
    assert hit.index - len(opening) <= at_most
    assert len(loop) % hit.period == 0


def test_defaults_catch_a_loop_with_a_counter() -> None:
    # No two rounds are equal, so only the substring rule sees it.
    body = (
        "the region is too small to read, so I enlarge it by a factor of two, open the result, "
        "and look again at the sign in the middle of it; round "
    )
    hit = first_hit(as_bytes("".join(f"{body}{i}: " for i in range(40))), RepetitionConfig())
    assert hit is not None
    assert hit.rule == "substring"
    assert hit.index < 1100


# ---- the default limits on tokens like Qwen's --------------------------------------------------------------


def stopped(texts: Sequence[rates.Text]) -> list[tuple[str, RepetitionHit, str]]:
    found = rates.hits([text for _, text in texts])
    return [(kind, hit, text[:200]) for (kind, text), hit in zip(texts, found, strict=True) if hit is not None]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_no_honest_text_is_stopped(every: int) -> None:
    assert stopped(list(rates.ordinary(every))) == []


def test_no_published_trace_is_stopped() -> None:
    traces = list(rates.published_traces())
    if not traces:
        pytest.skip(f"no published traces in {rates.DATA}: set THYME_DATA")
    assert stopped(traces) == []


@pytest.mark.parametrize(
    "text",
    [
        f"values = {[1] * 49}",
        f"grid = {[[0] * 16] * 16}",
        "grid = [\n" + "    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],\n" * 16 + "]",
        "\\begin{tabular}{cccccc}\n" + "0 & 0 & 0 & 0 & 0 & 0 \\\\\n" * 24 + "\\end{tabular}",
        "| Name | Age | City | Phone | Date |\n|---|---|---|---|---|\n" + "|   |   |   |   |   |\n" * 24,
        "| P | P | P |\n" * 24,
    ],
    ids=["ones", "zeros in a line", "zeros", "LaTeX", "form", "attendance"],
)
def test_equal_values_pass_without_a_vocabulary_too(text: str) -> None:
    assert rates.hit(rates.qwen_like()(text)) is None


@pytest.mark.parametrize("kind", ["exact", "with edits"])
def test_every_loop_is_caught_within_256_tokens(kind: str) -> None:
    loops = list(rates.loops() if kind == "exact" else rates.near_loops())
    delays = rates.tokens_to_catch(loops)
    late = [(loop.once, delay) for loop, delay in zip(loops, delays, strict=True) if delay is None or delay[1] > 256]
    assert late == []


def test_exact_rules_do_not_see_loops_with_edits() -> None:
    loops = list(rates.near_loops())
    seen = [delay for delay in rates.tokens_to_catch(loops, RepetitionConfig(near_tokens=0)) if delay is not None]
    assert len(seen) < len(loops) / 4, "not a test of the near rule"


def test_a_counter_in_chinese_is_caught() -> None:
    """A full-width comma and the word behind it are one token there."""
    pieces = [
        " \u6211",
        "\u518d\u6b21",
        "\u653e\u5927",
        "\u56fe\u7247",
        "\uff0c\u4f46\u662f",
        "\u6587\u5b57",
        "\u4ecd\u7136",
    ]
    pieces += [
        "\u770b",
        "\u4e0d\u6e05\u695a",
        "\uff0c\u6240\u4ee5",
        "\u6211",
        "\u518d",
        "\u8bd5",
        "\u4e00\u6b21",
        "\u3002\n",
    ]
    vocabulary = [*"0123456789", ".", *dict.fromkeys(pieces)]
    rounds = [[*str(number), ".", *pieces] for number in range(1, 60)]
    tokens = [vocabulary.index(piece) for piece in itertools.chain.from_iterable(rounds)]
    classes = token_classes(piece.encode() for piece in vocabulary)
    hit = first_hit(tokens, RepetitionConfig(), classes=classes)
    assert hit is not None and hit.rule == "near" and hit.index < 17 + 256


@pytest.mark.parametrize("edit", ["changed", "added", "dropped"])
def test_one_edit_in_ten_tokens_is_caught(edit: str) -> None:
    # Every copy differs in two of its twenty tokens from the copy before.
    rng = random.Random(0)
    block, tokens = list(range(1, 21)), [*range(100, 200)]
    for copy in range(60):
        sites = sorted(rng.sample(range(20), 2), reverse=True)
        if edit == "changed":
            for site in sites:
                block[site] = 1000 + 20 * copy + site
        tokens += block
        if copy % 2 and edit != "changed":
            for site in sites:
                at = len(tokens) - 20 + site
                tokens[at : at + (edit == "dropped")] = [1000 + 20 * copy + site] * (edit == "added")
    hit = first_hit(tokens, RepetitionConfig(), classes=np.ones(3000, np.uint8))
    assert hit is not None
    assert hit.rule == "near"
    assert hit.index < 100 + 20 + 256


def test_honest_and_degenerate_lists_differ_by_what_varies() -> None:
    # A counter alone is a loop; a counter with other values beside it is a list.
    tokenizer = rates.qwen_like()
    rng = random.Random(0)
    loop = "".join(f"Step {i}: I look at the picture once more, and then I read the sign.\n" for i in range(60))
    steps = "".join(f"Step {i}: multiply {i} by {rng.randint(1, 9)}, then add it to the total.\n" for i in range(60))
    found = rates.hit(tokenizer(loop), classes=tokenizer.classes)
    assert found is not None
    assert found.rule == "near"
    assert rates.hit(tokenizer(steps), classes=tokenizer.classes) is None


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_native_code_under_sanitizers(tmp_path: Path) -> None:
    """Random segments, forks and restarts against a naive check, in C++ under AddressSanitizer and UBSan."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    sources = ["csrc/repetition_fuzz.cpp", "csrc/period_scan.cpp"]
    program = tmp_path / "fuzz"
    subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources, "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program, "20000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    hits = re.fullmatch(r"20000 segments, (\d+) substring hits, (\d+) tail hits, (\d+) near hits\n", done.stdout)
    assert hits is not None, done.stdout
    assert min(map(int, hits.groups())) > 1000, "each rule must fire often"
