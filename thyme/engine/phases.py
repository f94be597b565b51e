"""Phases: what a token is drawn inside of, each with a temperature and a truncation of its own. Standard library only.

Five are built in, and further tag pairs may be declared:

    text     whatever nothing else says
    code     between <code> and </code>
    number   a numeric literal in code (`thyme.engine.literals`)
    string   a string literal in code
    answer   between <answer> and </answer>
    NAME     between the declared pair's tags: <think>, a fence of JSON, ...

A declared phase may be opened in text, in the answer and in one other declared phase, again and again; its end tag
closes it with all that is still open inside. Code may be written in any of them, and they are still open when the next
round begins. Inside code no tag counts but its end. The token that completes a start tag is drawn in the phase around,
the one that completes an end tag in the phase that ends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

TEXT, CODE, NUMBER, STRING, ANSWER = range(5)
BUILT_IN = ("text", "code", "number", "string", "answer")
"""Their names, by number; declared ones follow in their order."""
LIMITS = ("top_k", "top_p", "min_p")
_MOST_TOP_K = (1 << 31) - 1
_LEAST_TOP_P = 1e-8
"""What the sampler takes: more is every id of any vocabulary, less is the most probable one alone."""
_MOST_DECLARED = 8
_OWN_TAGS = ("<code>", "</code>", "<answer>", "</answer>", "<sandbox_output>")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSampling:
    """How a phase's tokens are drawn; None: as the phase around it says. Around number and string is code; around the
    others, code too where it is about truncation, what the request says."""

    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Draw among the k largest logits; 0 is off."""
    top_p: float | None = None
    """Draw among the most probable ids that reach this mass; 1 is off."""
    min_p: float | None = None
    """Draw among ids at least this probable, relative to the most probable; 0 is off."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        check_limits(self.top_k, self.top_p, self.min_p)

    @property
    def truncates(self) -> bool:
        """It turns a truncation on."""
        return truncates(self.top_k, self.top_p, self.min_p)


def check_limits(top_k: int | None, top_p: float | None, min_p: float | None, owner: str = "") -> None:
    """ValueError where a limit is out of range; `owner` stands before its name."""
    if top_k is not None and top_k < 0:
        raise ValueError(f"{owner}top_k must be at least 0 (0 is off), got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{owner}top_p must lie in (0, 1], got {top_p}")
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"{owner}min_p must lie in [0, 1], got {min_p}")


def truncates(top_k: int | None, top_p: float | None, min_p: float | None) -> bool:
    """Whether one of the limits is on."""
    return bool(top_k) or (1.0 if top_p is None else top_p) < 1.0 or bool(min_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class TagPair:
    """A declared phase."""

    name: str
    start: str
    end: str

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in BUILT_IN:
            raise ValueError(f"phase {self.name!r}: a name of its own is needed, of letters, digits and _")
        for what in ("start", "end"):
            tag = getattr(self, what)
            if len(tag) < 2 or not tag.isascii():
                raise ValueError(f"phase {self.name}: {what} {tag!r} must be two ASCII characters or more")
            if any(own in tag or tag in own for own in _OWN_TAGS):
                raise ValueError(
                    f"phase {self.name}: {what} {tag!r} holds, or is part of, a tag of our own "
                    f"({' '.join(_OWN_TAGS)}): the built-in phases {', '.join(BUILT_IN)} need no declaration"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The phases that an engine tells apart."""

    declared: tuple[TagPair, ...] = ()
    literals: bool = False
    """Numbers and strings in code are phases; else they are code."""

    def __post_init__(self) -> None:
        names = [pair.name for pair in self.declared]
        if len(names) > _MOST_DECLARED:
            raise ValueError(f"{len(names)} declared phases: at most {_MOST_DECLARED}")
        for place, pair in enumerate(self.declared):
            for other in self.declared[:place]:
                if pair.name == other.name:
                    raise ValueError(f"phase {pair.name}: declared twice")
                if pair.start in other.start or other.start in pair.start:
                    raise ValueError(
                        f"phases {other.name} and {pair.name}: start {other.start!r} and {pair.start!r}: neither may "
                        "be part of the other"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of all phases, by number."""
        return (*BUILT_IN, *(pair.name for pair in self.declared))

    def check_names(self, names: Mapping[str, object]) -> None:
        """ValueError where a name is no phase here."""
        for name in names:
            if name not in self.names or (name in ("number", "string") and not self.literals):
                known = [name for name in self.names if self.literals or name not in ("number", "string")]
                raise ValueError(f"phase {name!r} is not one that the engine was made with: {', '.join(known)}")

    def resolved(
        self,
        sampling: Mapping[str, PhaseSampling],
        text: PhaseSampling,
        code: PhaseSampling,
    ) -> list[tuple[float, int, float, float]]:
        """(temperature, top_k, top_p, min_p) of each phase, by number; 0, 1 and 0 are off.

        Args:
            sampling: by name, where a phase has something of its own.
            text: complete but for limits that are off.
            code: the same, for code and its literals.
        """
        own_code = [sampling["code"]] if "code" in sampling else []
        around = {"text": [text], "code": [code, text], "number": [*own_code, code, text]}
        around["string"] = around["number"]
        found: list[tuple[float, int, float, float]] = []
        for name in self.names:
            chain = [*([sampling[name]] if name in sampling else []), *around.get(name, [text])]
            found.append(
                (
                    _first(chain, "temperature", 1.0),
                    min(int(_first(chain, "top_k", 0)), _MOST_TOP_K),
                    max(_first(chain, "top_p", 1.0), _LEAST_TOP_P),
                    _first(chain, "min_p", 0.0),
                )
            )
        return found


def _first(chain: list[PhaseSampling], what: str, off: float) -> float:
    """What the first of them says that says anything."""
    return next((value for each in chain if (value := getattr(each, what)) is not None), off)
