"""Phases as a recipe says them: `[rollout.phases.NAME]`. Standard library only."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from thyme.engine.phases import BUILT_IN as BUILT_IN
from thyme.engine.phases import Phases as Phases
from thyme.engine.phases import PhaseSampling as PhaseSampling
from thyme.engine.phases import TagPair
from thyme.engine.phases import check_limits as check_limits
from thyme.engine.phases import truncates as truncates
from thyme.limits import check_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseConfig:
    """A tag pair whose text is drawn in its own way, or the truncation of a built-in phase, which has no tags here."""

    start: str = ""
    """The tag that opens it, such as "<think>" or a fence with its language."""
    end: str = ""
    """The tag that closes it."""
    top_k: int | None = None
    """As `rollout.top_k`; left out: as there, in number and string as in code."""
    top_p: float | None = None
    """As `rollout.top_p`, likewise."""
    min_p: float | None = None
    """As `rollout.min_p`, likewise."""

    def __post_init__(self) -> None:
        check_numbers(self, "phases")
        self.sampling()

    def sampling(self, temperature: float | None = None) -> PhaseSampling:
        """How its tokens are drawn."""
        return PhaseSampling(temperature=temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


def phases_of(phases: Mapping[str, PhaseConfig], named: Set[str]) -> Phases:
    """What an engine must tell apart: the declared tag pairs, and the literals of code where one of them is named."""
    pairs = [TagPair(name=name, start=p.start, end=p.end) for name, p in phases.items() if name not in BUILT_IN]
    return Phases(declared=tuple(pairs), literals=not named.isdisjoint(("number", "string")))
