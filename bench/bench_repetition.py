"""Repetition detector: ns per token against segment length and batch, and beside the tail scan in pure Python.

    pytest bench/bench_repetition.py

Goals: 50x faster per token than the Python scan of periods 1..256; at most 40 us per step of 256 sequences with
periods up to 512 on one core; a cost per token that does not grow with the segment. Words are drawn by a Zipf law over
2,000, so that runs begin and break as they do in text. Each extra_info holds ns_per_token.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from thyme.repetition import RepetitionConfig, RepetitionDetector

PERIODS = 256
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


@pytest.mark.benchmark(group="repetition: a step of 256 sequences")
@pytest.mark.parametrize(
    ("who", "periods"), [("thyme", 256), ("thyme", 512), ("python tail scan", 256), ("python tail scan", 512)]
)
def test_batch(benchmark, who: str, periods: int) -> None:
    batch, length, rounds = 256, 1024, 200 if who == "thyme" else 5
    tokens = np.stack([text(length + rounds + 10, seed) for seed in range(batch)], axis=1)
    at = iter(range(length, length + rounds + 10))
    if who == "thyme":
        detector = RepetitionDetector(config(periods), capacity=batch)
        slots = np.array([detector.open() for _ in range(batch)], np.int32)
        for row in tokens[:length]:
            detector.push(slots, row)

        def run() -> None:
            detector.push(slots, tokens[next(at)])

    else:
        seen = [tokens[:length, i].tolist() for i in range(batch)]

        def run() -> None:
            for sequence, token in zip(seen, tokens[next(at)].tolist(), strict=True):
                sequence.append(token)
                python_tail_scan(sequence, periods, COPIES)

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=5)
    record(benchmark, batch)
    if who == "thyme" and periods == 512:
        step_us = benchmark.stats.stats.median * 1e6
        benchmark.extra_info |= {"figure": f"{step_us:.1f} us a step", "goal": "<= 40 us", "met": step_us <= 40}


@pytest.mark.benchmark(group="repetition: whole segments in one call, default limits")
@pytest.mark.parametrize("length", [1024, 4096, 16384, 32768])
def test_length(benchmark, length: int) -> None:
    detector = RepetitionDetector(RepetitionConfig(), capacity=1)
    slots, tokens = np.full(length, detector.open(), np.int32), text(length)

    def run() -> None:
        detector.restart(0)
        detector.push(slots, tokens)

    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    record(benchmark, length)
