"""The page that says where the steps' time went, how far that is from the roof, and what the largest gaps are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thyme.engine.step_cost import Ceilings
from thyme.engine.step_record import StepRecord
from thyme.profile.ops import OpRow, op_lines
from thyme.profile.parts import Part, steps_of
from thyme.trace import Span

REST = "metrics and the rest of the step"
"""The part that no span accounts for."""
MOST_GAPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured of the steps of a run."""

    title: str
    frame: dict[str, str]
    """What it was measured with: machine, versions, command."""
    ceilings: Ceilings
    spans: Sequence[Span]
    """Of the steps that count; all threads."""
    records: Sequence[StepRecord]
    """Of their engine steps."""
    parts: Sequence[Part]
    trains: bool = False
    """Whether the steps are to make updates."""
    ops: Sequence[OpRow] = ()
    """Of one more step, that was watched op by op."""
    ops_wall_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """Of the steps."""
        return sum(step.seconds for step in steps_of(self.spans))

    @property
    def accounted(self) -> float:
        """Share of it that is in a part with a name."""
        rest = sum(part.seconds for part in self.parts if part.name == REST)
        return 1.0 - rest / self.wall_s if self.wall_s else 0.0

    def gaps(self) -> list[Part]:
        """The parts that lose most time beyond what they need, the largest first."""
        found = [part for part in self.parts if part.name != REST and part.gap > 0]
        return sorted(found, key=lambda part: -part.gap)[:MOST_GAPS]


def verdict(profile: Profile) -> str:
    """The page, in Markdown."""
    count, wall = len(steps_of(profile.spans)), profile.wall_s
    lines = [f"# {profile.title}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in profile.frame.items()]
    copy, matmul = profile.ceilings.copy_bytes_per_s / 1e9, profile.ceilings.matmul_flops_per_s / 1e9
    lines.append(f"| ceilings | copy {copy:,.1f} GB/s, matmul {matmul:,.1f} GFLOP/s, measured as this run began |")
    lines += ["", "## The three largest gaps", ""]
    lines += [f"{n}. {_in_words(part, wall)}" for n, part in enumerate(profile.gaps(), start=1)] or ["None."]
    lines += ["", f"## Where {wall:.2f} s of {count} step{'s' if count != 1 else ''} went", ""]
    lines += _part_lines(profile.parts, wall)
    lines += ["", f"Named spans account for {profile.accounted:.1%} of the time.", ""]
    if profile.trains and not any(span.name == "backward" for span in profile.spans):
        lines += [
            "No update was made in these steps: in no group did rewards differ. Profile a model that has learned.",
            "",
        ]
    if profile.records:
        lines += ["## How far from the roof", "", *_roof_lines(profile), "", *_rollout_lines(profile)]
    else:
        lines += _training_lines(profile)
    if profile.ops:
        head = "## Ops of one more step, the calling thread's"
        lines += ["", head, "", *op_lines(list(profile.ops), profile.ops_wall_s, profile.ceilings)]
    return "\n".join(lines) + "\n"


def _in_words(part: Part, wall: float) -> str:
    lost = f"**{part.name}**: {part.gap:.2f} s, {part.gap / wall:.0%} of the time"
    if part.floor:
        lost += f" (it took {part.seconds:.2f} s, and {part.floor:.2f} s at the ceilings)"
    return f"{lost}. {part.advice[:1].upper()}{part.advice[1:]}."


def _part_lines(parts: Sequence[Part], wall: float) -> Iterable[str]:
    yield "| part | s | share | least, at the ceilings | of roof |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for part in parts:
        least, of = (f"{part.floor:.3f}", f"{part.floor / part.seconds:.0%}") if part.floor else ("", "")
        yield f"| {part.name} | {part.seconds:.3f} | {part.seconds / wall:.1%} | {least} | {of} |"


def _roof_lines(profile: Profile) -> Iterable[str]:
    yield "| engine steps | count | tokens | ms, median | device | host | idle before | least | of roof |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for kind in ("decode", "mixed", "prefill"):
        some = [record for record in profile.records if record.kind == kind]
        if some:
            yield _kind_line(kind, some)
    if profile.records:
        yield _kind_line("all", profile.records)


def _kind_line(kind: str, records: Sequence[StepRecord]) -> str:
    floor = sum(record.floor_us or 0.0 for record in records)
    took = sum(record.host_us + record.device_us for record in records)
    middle = sorted(record.host_us + record.device_us for record in records)[len(records) // 2] / 1e3
    sums = [sum(getattr(record, name) for record in records) for name in ("device_us", "host_us", "idle_us")]
    seconds = " | ".join(f"{value / 1e6:.3f} s" for value in (*sums, floor))
    tokens = sum(record.tokens for record in records)
    return f"| {kind} | {len(records):,} | {tokens:,} | {middle:.2f} | {seconds} | {floor / took:.1%} |"


def _training_lines(profile: Profile) -> Iterable[str]:
    passes = [span.args for span in profile.spans if span.lane == "steps" and span.name == "forward"]
    tokens, trained = sum(sum(work["lengths"]) for work in passes), sum(work["rows"] for work in passes)
    rate = f"{tokens / profile.wall_s:,.0f} tok/s"
    yield f"- {tokens:,} tokens in {len(passes):,} micro-batches, {trained:,} of them trained: {rate}."
    prepared = sum(span.seconds for span in profile.spans if span.lane == "data")
    waited = sum(span.seconds for span in profile.spans if span.lane == "steps" and span.name == "wait for data")
    yield f"- Rows were prepared for {prepared:.2f} s, summed over threads; training waited {waited:.2f} s for them."


def _rollout_lines(profile: Profile) -> Iterable[str]:
    records, spans = profile.records, profile.spans
    drawn = sum(record.samples for record in records)
    asking = sum(span.seconds for span in spans if span.lane == "steps" and span.name == "rollout") or profile.wall_s
    yield f"- {drawn:,} tokens drawn in {asking:.2f} s of rollouts: {drawn / asking:,.0f} tok/s."
    last = records[-1]
    yield f"- Given tokens computed for each that there was to compute: {last.prefilled / max(1, last.unique):.3f}."
    code = sum(span.seconds for span in spans if span.lane == "sandbox" and span.name == "run")
    if code:
        waited = sum(span.seconds for span in spans if span.name == "wait for the sandbox")
        yield f"- Code ran for {code:.2f} s, summed over rollouts; decoding had nothing to do for {waited:.2f} s of it."
    scored = sum(span.seconds for span in spans if span.lane == "rewards")
    if scored:
        waited = sum(span.seconds for span in spans if span.lane == "steps" and span.name == "reward")
        yield f"- Groups were scored for {scored:.2f} s, summed over groups; {waited:.2f} s of it were waited for."
