"""One thread's time as its spans tell it: what each kind of span took itself, without the spans inside of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from thyme.trace import Span

Kind = tuple[str, str]
"""Lane and name."""


@dataclass(slots=True)
class Own:
    """The spans of one kind."""

    seconds: float = 0.0
    """Without what is inside of them."""
    spans: list[Span] = field(default_factory=list)


def own_time(spans: Iterable[Span], roots: Iterable[Span]) -> dict[Kind, Own]:
    """What of the roots' time belongs to which kind of span.

    Args:
        spans: of any thread; those of the roots' thread that lie inside of a root count.
        roots: spans of one thread that do not overlap; their own time is under their lane and the name "".

    Returns:
        By kind; the seconds sum to those of the roots.
    """
    out: dict[Kind, Own] = defaultdict(Own)
    listed = sorted(roots, key=lambda span: span.start)
    are_roots = {id(root) for root in listed}
    inside = sorted((s for s in spans if id(s) not in are_roots), key=lambda span: (span.start, -span.end))
    for root in listed:
        here = [s for s in inside if s.thread == root.thread and root.start <= s.start and s.end <= root.end]
        open_spans: list[tuple[Span, Kind]] = [(root, (root.lane, ""))]
        out[root.lane, ""].seconds += root.seconds
        out[root.lane, ""].spans.append(root)
        for span in here:
            while open_spans[-1][0].end <= span.start:
                open_spans.pop()
            kind = (span.lane, span.name)
            out[open_spans[-1][1]].seconds -= span.seconds
            out[kind].seconds += span.seconds
            out[kind].spans.append(span)
            open_spans.append((span, kind))
    return dict(out)
