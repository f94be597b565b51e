"""The C++ repetition detector against its definition, and the default limits against texts that must pass."""

import base64
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
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thyme import _native
from thyme.repetition import (
    RepetitionConfig,
    RepetitionDetector,
    RepetitionHit,
    repetition_hit_ref,
    repetition_ref,
)

ROOT = Path(__file__).parents[1]
SMALL = RepetitionConfig(
    window=3, ratio=0.5, min_tokens=8, max_period=6, min_tail_tokens=4, copies=((1, 6), (2, 4), (3, 3))
)
# One rule switched off: the copies needed, or the shortest segment judged, are beyond any test.
NO_TAIL = {"max_period": 1, "copies": ((1, 30_000),)}
NO_SUBSTRING = {"min_tokens": 30_000}


def first_hit(tokens: Sequence[int], config: RepetitionConfig, native: type | None = None) -> RepetitionHit | None:
    detector = RepetitionDetector(config, capacity=1)
    if native is not None:
        copies = [config.copies_of(period) for period in range(1, config.max_period + 1)]
        detector._native = native(
            window=config.window,
            ratio=config.ratio,
            min_tokens=config.min_tokens,
            min_tail_tokens=config.min_tail_tokens,
            copies=copies,
            capacity=1,
        )
    slot = detector.open()
    flags = detector.push(np.full(len(tokens), slot, np.int32), np.array(tokens, np.int32))
    hit = detector.hit(slot)
    # A hit stays: flags are 0 up to the completing token and 1 from it on.
    assert flags.tolist() == [int(hit is not None and i >= hit.index) for i in range(len(tokens))]
    return hit


def expected_hit(tokens: Sequence[int], config: RepetitionConfig) -> RepetitionHit | None:
    index = repetition_ref(tokens, config)
    return None if index is None else repetition_hit_ref(tokens[: index + 1], config)


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
    )


@st.composite
def segments(draw: st.DrawFn) -> list[int]:
    # Copies of few blocks over few tokens, so that both rules come close and often fire.
    blocks = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=3))
    picks = draw(st.lists(st.integers(0, len(blocks) - 1), max_size=20))
    return [token for pick in picks for token in blocks[pick]]


@settings(max_examples=400, deadline=None)
@given(tokens=segments(), config=configs())
def test_detector_equals_reference(tokens: list[int], config: RepetitionConfig) -> None:
    assert first_hit(tokens, config) == expected_hit(tokens, config)


@settings(max_examples=200, deadline=None)
@given(tokens=segments(), config=configs())
def test_colliding_hashes_change_nothing(tokens: list[int], config: RepetitionConfig) -> None:
    # Hashes modulo 7: unequal windows meet all the time and only the comparison of tokens tells them apart.
    assert first_hit(tokens, config, _native._CollidingRepetitionDetector) == expected_hit(tokens, config)


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


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_native_code_under_sanitizers(tmp_path: Path) -> None:
    """Random segments, forks and restarts against a naive check, in C++ under AddressSanitizer and UBSan."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    sources = ["csrc/repetition_fuzz.cpp", "csrc/run_counters.cpp"]
    program = tmp_path / "fuzz"
    subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources, "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program, "20000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"20000 segments, (\d+) substring hits, (\d+) tail hits\n", done.stdout), done.stdout
