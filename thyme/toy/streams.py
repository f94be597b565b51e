"""The toy world as streams: its config in, endless items of one kind out."""

from __future__ import annotations

from collections.abc import Sequence

from thyme.data.rows import Demonstration, Question
from thyme.data.streams import Stream
from thyme.toy.captions import Caption, captions
from thyme.toy.config import Split, ToyConfig
from thyme.toy.scenarios import demonstrations, questions

ARITHMETIC = {"arithmetic": 1.0}


def caption_stream(toy: ToyConfig) -> Stream[Caption]:
    """Captions of the training split, for the base stage."""
    return lambda start, n: captions(toy.seed, n, toy.material, mix=toy.captions, start=start)


def demonstration_stream(toy: ToyConfig) -> Stream[Demonstration]:
    """Demonstrations of the training split, for SFT."""
    return lambda start, n: demonstrations(
        toy.seed,
        n,
        toy.mix,
        material=toy.material,
        no_code=toy.no_code,
        no_code_scenarios=toy.no_code_scenarios,
        no_code_answer=toy.no_code_answer,
        box_noise=toy.box_noise,
        says_cells=toy.says_cells,
        cut_by=toy.cut_by,
        start=start,
    )


def question_stream(toy: ToyConfig, split: Split = "train") -> Stream[Question]:
    """Questions, for RL and rollouts, or of the held-out split for evaluation."""
    return lambda start, n: questions(toy.seed, n, toy.mix, split, material=toy.material, start=start)


def anneal_stream(toy: ToyConfig) -> Stream[Demonstration]:
    """Arithmetic demonstrations, with a third of others in every batch so that those are not forgotten."""
    rows = demonstration_stream(toy)

    def stream(start: int, n: int) -> Sequence[Demonstration]:
        others = n // 3
        return [*demonstrations(toy.seed + 1, n - others, ARITHMETIC, start=start), *rows(10**6 + start, others)]

    return stream


def heldout_arithmetic(toy: ToyConfig, n: int) -> list[Demonstration]:
    """What the gate of math annealing is measured on."""
    return demonstrations(toy.seed, n, ARITHMETIC, split="heldout")
