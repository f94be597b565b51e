"""Repetition detector: ns per token against segment length and batch, and beside the tail scan in pure Python.

    pytest bench/bench_repetition.py
    python bench/repetition_rates.py     # what it stops, and how soon

Goals: 50x faster per token than the Python scan of periods 1..256; at most 15 us per step of 256 sequences with the two
exact rules in text, and 60 us with the near rule too, also where all sequences are in a loop with edits or inside of a
table; a cost per token that does not grow with the segment. Words are drawn by a Zipf law over 2,000, so that runs
begin and break as they do in text. Each extra_info holds ns_per_token.
"""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from thyme.repetition import RepetitionConfig, RepetitionDetector, TokenClass

PERIODS = 256
DATA = 150_000  # tokens from here on are marks, the others words
COPIES = 4


def text(n: int, seed: int = 0) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, 2001)
    return rng.choice(2000, size=n, p=weights / weights.sum()).astype(np.int32)


def python_tail_scan(tokens: list[int], max_period: int, copies: int) -> bool:
    """The tail rule by comparing backwards for every period on every token, as engines in Python do it."""
    for period in range(1, max_period + 1):
        needed = period * (copies - 1)
        if needed + period > len(tokens):
            return False
        for back in range(1, needed + 1):
            if tokens[-back] != tokens[-back - period]:
                break
        else:
            return True
    return False


def record(benchmark, tokens: int) -> None:
    benchmark.extra_info["ns_per_token"] = round(benchmark.stats.stats.median / tokens * 1e9, 1)


def config(max_period: int) -> RepetitionConfig:
    return RepetitionConfig(max_period=max_period, copies=((max_period, COPIES),))


@pytest.mark.benchmark(group="repetition: one sequence, periods 1..256, token by token")
@pytest.mark.parametrize("who", ["thyme", "python tail scan"])
def test_one_sequence(benchmark, who: str) -> None:
    tokens = text(2000)
    if who == "thyme":
        detector = RepetitionDetector(config(PERIODS), capacity=1)
        slot = np.array([detector.open()], np.int32)
        steps = [tokens[i : i + 1] for i in range(len(tokens))]

        def run() -> None:
            detector.restart(0)
            for step in steps:
                detector.push(slot, step)

    else:

        def run() -> None:
            seen: list[int] = []
            for token in tokens.tolist():
                seen.append(token)
                python_tail_scan(seen, PERIODS, COPIES)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    record(benchmark, len(tokens))


def counted(n: int, seed: int = 0) -> NDArray[np.int32]:
    """Twenty tokens again and again, one of them a counter."""
    tokens = np.arange(n, dtype=np.int32) % 20 + 20 * seed
    tokens[19::20] = 100_000 + np.arange(len(tokens[19::20]))
    return tokens


def table(n: int, seed: int = 0) -> NDArray[np.int32]:
    """Rows of 5 to 12 equal cells, each between two marks."""
    row = [DATA, DATA + 1] * (5 + seed % 8) + [DATA, DATA + 2]
    return np.resize(np.array(row, np.int32), n + seed)[seed:]


def wide_table(n: int, seed: int = 0) -> NDArray[np.int32]:
    """Rows of 127 equal cells: half of all periods repeat for long in each."""
    return np.resize(np.array([DATA, DATA + 1] * 127 + [DATA + 2], np.int32), n + seed)[seed:]


# Name, periods, rules, text.
STEPS = {
    "thyme, exact rules, periods to 256": (256, "exact", text),
    "thyme, exact rules, periods to 512": (512, "exact", text),
    "thyme, all rules, periods to 512": (512, "all", text),
    "thyme, all rules, every sequence in a loop with edits": (512, "all", counted),
    "thyme, exact rules, every sequence in a table": (512, "exact in data", table),
    "thyme, exact rules, every sequence in a wide table": (512, "exact in data", wide_table),
    "thyme, all rules, every sequence in a table": (512, "all", table),
    "thyme, all rules, every sequence in a wide table": (512, "all", wide_table),
    "python tail scan, periods to 256": (256, "scan", text),
    "python tail scan, periods to 512": (512, "scan", text),
}


@pytest.mark.benchmark(group="repetition: a step of 256 sequences")
@pytest.mark.parametrize("who", STEPS)
def test_batch(benchmark, who: str) -> None:
    periods, rules, kind = STEPS[who]
    batch, length, rounds = 256, 1024, 5 if rules == "scan" else 200
    tokens = np.stack([kind(length + rounds + 10, seed) for seed in range(batch)], axis=1)
    at = iter(range(length, length + rounds + 10))
    if rules == "scan":
        seen = [tokens[:length, i].tolist() for i in range(batch)]

        def run() -> None:
            for sequence, token in zip(seen, tokens[next(at)].tolist(), strict=True):
                sequence.append(token)
                python_tail_scan(sequence, periods, COPIES)

    else:
        # Scores go on, and no hit ends the work.
        limits = replace(config(periods), near_tokens=30_000 if rules == "all" else 0)
        classes = np.full(200_000, TokenClass.WORD, np.uint8)
        classes[DATA:] = TokenClass.MARK
        detector = RepetitionDetector(limits, batch, classes)
        slots = np.array([detector.open() for _ in range(batch)], np.int32)
        for row in tokens[:length]:
            detector.push(slots, row)

        def run() -> None:
            flags = detector.push(slots, tokens[next(at)])
            assert not flags.any()

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=5)
    record(benchmark, batch)
    if rules != "scan":
        # What is done for a sequence every few tokens is done in each step for some: the median counts it.
        step_us = benchmark.stats.stats.median * 1e6
        benchmark.extra_info["figure"] = f"{step_us:.1f} us a step"
        goal = {"exact": 15, "all": 60}.get(rules)
        if goal is not None:
            benchmark.extra_info |= {"goal": f"<= {goal} us", "met": step_us <= goal}


@pytest.mark.benchmark(group="repetition: whole segments in one call, default limits")
@pytest.mark.parametrize("length", [1024, 4096, 16384, 32768])
def test_length(benchmark, length: int) -> None:
    detector = RepetitionDetector(RepetitionConfig(), 1, np.ones(2000, np.uint8))
    slots, tokens = np.full(length, detector.open(), np.int32), text(length)

    def run() -> None:
        detector.restart(0)
        detector.push(slots, tokens)

    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    record(benchmark, length)
