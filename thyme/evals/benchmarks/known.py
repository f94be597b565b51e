"""The benchmarks that are known by name: those of the paper's third table, and any file of their layouts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from thyme.evals.benchmarks import figures, prompts, scorers
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.scorers import Scored

Judging = Literal["rules", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How a published benchmark is asked and scored."""

    name: str
    """As VLMEvalKit's file is called, without its suffix."""
    also: tuple[str, ...] = ()
    """Other names; case and marks do not count."""
    prompt: Callable[[Item], str]
    score: Callable[[Item, str], Scored]
    figures: figures.Figures
    published_by: Judging = "rules"
    """Whether the published figures come from rules, or from a judge, which other rules can only come near to."""
    cluster: Callable[[Item], str] = field(default=lambda item: item.index)
    """Rows of one cluster are drawn together in confidence intervals."""
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Figures of the paper's table 3 by label: Thyme-7B and Qwen2.5-VL-7B, in percent."""


def _multiple_choice(name: str, *also: str, **changed: object) -> Benchmark:
    known: dict[str, object] = {
        "prompt": prompts.multiple_choice,
        "score": scorers.multiple_choice,
        "figures": figures.pooled("category", "l2-category"),
    }
    return Benchmark(name=name, also=also, **(known | changed))  # type: ignore[arg-type]


def _open(name: str, *also: str, **changed: object) -> Benchmark:
    known: dict[str, object] = {
        "prompt": prompts.short,
        "score": scorers.rules,
        "figures": figures.pooled(),
        "published_by": "judge",
    }
    return Benchmark(name=name, also=also, **(known | changed))  # type: ignore[arg-type]


def _real_world(name: str, *also: str, **paper: tuple[float, float]) -> Benchmark:
    return _multiple_choice(name, *also, score=scorers.first_letter, figures=figures.tasks, paper=paper)


def _resolution(name: str, *also: str, **paper: tuple[float, float]) -> Benchmark:
    return _multiple_choice(
        name, *also, figures=figures.cycles, paper=paper, cluster=lambda item: item.question + item.category
    )


BENCHMARKS = (
    _multiple_choice(
        "VStarBench",
        "vstar",
        "V*",
        figures=figures.renamed({"direct_attributes": "Attribute", "relative_position": "Spatial"}),
        paper={"Attribute": (83.5, 78.2), "Spatial": (80.3, 73.6), "Overall": (82.2, 76.4)},
    ),
    _resolution("HRBench4K", "hr_bench_4k", FSP=(91.0, 85.2), FCP=(63.0, 52.2), Overall=(77.0, 68.8)),
    _resolution("HRBench8K", "hr_bench_8k", FSP=(86.5, 78.8), FCP=(57.5, 51.8), Overall=(72.0, 65.3)),
    _real_world("MME-RealWorld", Perception=(67.1, 60.6), Reasoning=(48.4, 38.6), Overall=(64.8, 58.3)),
    _real_world("MME-RealWorld-CN", Perception=(70.5, 68.0), Reasoning=(52.1, 45.6), Overall=(64.6, 60.8)),
    _real_world("MME-RealWorld-Lite", Perception=(59.1, 48.8), Reasoning=(49.1, 37.7), Overall=(55.2, 44.1)),
    _multiple_choice("RealWorldQA", paper={"Overall": (70.2, 68.2)}),
    _multiple_choice("MMStar", paper={"Overall": (65.9, 64.7)}),
    _multiple_choice("BLINK", paper={"Overall": (56.1, 56.4)}),
    _multiple_choice("MMVP", figures=figures.pairs, cluster=lambda item: item.question),
    _multiple_choice("VisuLogic", score=scorers.boxed_letter, paper={"Overall": (23.4, 20.0)}),
    _multiple_choice(
        "WeMath",
        score=scorers.letter_behind_answer,
        figures=figures.steps,
        published_by="judge",
        paper={"Overall": (39.3, 34.3)},
    ),
    Benchmark(
        name="HallusionBench",
        prompt=prompts.yes_no,
        score=scorers.yes_no,
        figures=figures.hallusion,
        cluster=lambda item: "_".join(item.index.split("_")[:4]),
        paper={"aAcc": (71.0, 65.6), "fAcc": (48.3, 38.8), "qAcc": (47.7, 40.4), "Overall": (55.6, 48.3)},
    ),
    _open(
        "OCRBench",
        score=scorers.contains,
        figures=figures.ocr,
        published_by="rules",
        paper={"Overall": (86.3, 88.4)},
    ),
    _open(
        "ChartQA_TEST",
        "ChartQA",
        score=scorers.relaxed,
        figures=figures.pooled("split"),
        published_by="rules",
        paper={"test_human": (80.0, 72.5), "test_augmented": (92.2, 94.9), "Overall": (86.1, 83.7)},
    ),
    _open("MathVista_MINI", "MathVista", figures=figures.pooled("task"), paper={"Overall": (70.0, 68.2)}),
    _open("MathVision_MINI", "MathVision", paper={"Overall": (27.6, 27.0)}),
    _open("MathVerse_MINI_Vision_Only", "MathVerse", "MathVerse_MINIVOnly", paper={"Overall": (39.1, 35.2)}),
    _open("LogicVista", score=scorers.letters, figures=figures.logic, paper={"Overall": (49.0, 39.8)}),
    _open("MMVet_Hard", "MMVet", prompt=prompts.bare, paper={"Overall": (58.3, 52.9)}),
    _open("TIR-Bench", "TIRBench", figures=figures.pooled("task", "category")),
)
"""Every benchmark by its own name. Any other file can be read by its columns: `by_columns`."""

BY_COLUMNS = ("mcq", "yes_no", "vqa")

_GENERIC = {
    "mcq": _multiple_choice("mcq"),
    "yes_no": Benchmark(name="yes_no", prompt=prompts.yes_no, score=scorers.yes_no, figures=figures.pooled()),
    "vqa": _open("vqa", published_by="rules"),
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name; "mcq", "yes_no" and "vqa" stand for any file with such rows.

    Raises:
        ValueError: none has that name; says which come near.
    """
    if name in _GENERIC:
        return _GENERIC[name]
    by_name = {_plain(one): known for known in BENCHMARKS for one in (known.name, *known.also)}
    if (found := by_name.get(_plain(name))) is not None:
        return found
    near = difflib.get_close_matches(_plain(name), by_name, n=1, cutoff=0.5)
    hint = f", did you mean {by_name[near[0]].name!r}?" if near else ":"
    names = ", ".join(known.name for known in BENCHMARKS)
    raise ValueError(
        f"eval.benchmark: no benchmark is called {name!r}{hint} known are {names}; "
        f"any other file goes by its columns as {', '.join(BY_COLUMNS)}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9*]", "", name.casefold())
