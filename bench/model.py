"""How long a kernel must take on a card, from what it issues, reads and multiplies: each term alone, and at best the
longest hides the others.

Issue: a multiprocessor has four schedulers, each issues one instruction of a warp a clock, and kernels that are bound
by it reach four fifths of that. Exponentials go through a unit of 16 lanes. Bytes move at nine tenths of a copy's rate.
"""

from dataclasses import dataclass

ISSUED, MOVED, MULTIPLIED = 0.8, 0.9, 0.8
"""Fractions of the peaks that good kernels reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    multiprocessors: int
    clock_hz: float
    """Under load."""
    bytes_per_s: float
    """Data sheet, or a copy that was measured, over MOVED."""
    flops_per_s: float
    """Of dense bfloat16 products, data sheet."""


H100 = Card(name="H100", multiprocessors=132, clock_hz=1.7e9, bytes_per_s=3.35e12, flops_per_s=989e12)
H200 = Card(name="H200", multiprocessors=132, clock_hz=1.7e9, bytes_per_s=4.3e12 / MOVED, flops_per_s=989e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a launch has to do at one shape."""

    shape: str = ""
    elements: float = 0
    """Of those that the instructions are counted for."""
    num_bytes: float = 0
    flops: float = 0


def issue_seconds(card: Card, instructions: float, elements: float) -> float:
    """Of `instructions` a thread issues for each element."""
    return instructions * elements / 32 / (4 * card.multiprocessors * card.clock_hz * ISSUED)


def exp_seconds(card: Card, exps: float, elements: float) -> float:
    return exps * elements / (16 * card.multiprocessors * card.clock_hz)


def bytes_seconds(card: Card, num_bytes: float) -> float:
    return num_bytes / (card.bytes_per_s * MOVED)


def matmul_seconds(card: Card, flops: float) -> float:
    return flops / (card.flops_per_s * MULTIPLIED)
