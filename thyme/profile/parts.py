"""What a step consists of, the least that each part needs on this machine, and what could be done about the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thyme.engine.step_cost import Ceilings, Cost, StepCost
from thyme.profile.timeline import Own, own_time
from thyme.trace import Span

ROOT = "step "
"""What the names of the spans begin with, in the lane "steps", that are analysed."""
_KINDS = ("prefill", "decode", "mixed")
_FORWARD, _BACKWARD = ("forward", "old log-probs"), "backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the steps' time."""

    name: str
    seconds: float
    floor: float
    """Seconds that its bytes and flops take at the ceilings; 0 where nothing has to be computed."""
    advice: str
    """What makes it smaller."""

    @property
    def gap(self) -> float:
        """Seconds beyond the least."""
        return max(0.0, self.seconds - self.floor)


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, for the least that a backward pass needs."""

    numbers: int
    """Trained numbers; 0 where nothing is."""
    is_whole: bool = True
    """The decoder's matrices have gradients: a backward pass is two forward passes, else one."""
    with_pictures: bool = True
    """So has the vision tower."""
    stage: str = "rl"
    """Whose settings advice names: rl or sft."""


_TITLES: dict[tuple[str, str], tuple[str, str]] = {
    ("engine", "record"): ("the recorder itself", "nothing: it is not there without a profile"),
    ("loop", "wait for the sandbox"): (
        "waiting for the sandbox",
        "every open rollout waited for its code: more rollouts at once (rollout.max_in_flight, more questions a step), "
        "more sandbox.workers, or code that takes less",
    ),
    ("loop", "wait for pictures"): (
        "waiting for pictures",
        "decoding stood still until a picture was cut into patches: smaller pictures (max_pixels), or more in flight",
    ),
    ("loop", "submit for scoring"): (
        "scoring by rules",
        "rules are worked off between engine steps, on the thread that decodes: a reward.function has a thread of its "
        "own, and shorter rollouts are read sooner",
    ),
    ("steps", "rollout"): (
        "the rollout loop, in Python",
        "prompts, decoding of text, records between engine steps: longer rounds, or fewer and larger engine steps",
    ),
    ("steps", "reward"): (
        "waiting for rewards",
        "rollouts had ended and their scores were not there: a faster reward function or judge, an async one, or "
        "more judge.concurrency",
    ),
    ("steps", "wait for data"): (
        "waiting for rows",
        "the next rows were not ready: more data.workers, data.ahead_steps, smaller pictures (max_pixels)",
    ),
    ("data", "prepare rows"): (
        "preparing rows on the training thread",
        "the toy's rows, and all with data.workers 0, are made when asked for: files are read ahead by threads",
    ),
    ("steps", "pack"): ("packing samples", "fewer or shorter samples a step"),
    ("steps", "read the loss"): (
        "reading the loss",
        "a device is waited for here, with what it has still to do of the passes",
    ),
    ("steps", "logprob"): ("packing samples", "fewer or shorter samples a step"),
    ("steps", "old log-probs"): (
        "log-probs before the update",
        "one update a batch needs none unless rl.mismatch asks for them",
    ),
    ("steps", "forward"): (
        "training: forward",
        "larger micro-batches (rl.max_tokens_per_micro_batch), rl.share_prefixes, kl_coef 0 saves the reference's pass",
    ),
    ("steps", "backward"): (
        "training: backward",
        "larger micro-batches, rl.share_prefixes; activation_checkpointing computes each layer once more",
    ),
    ("steps", "optimizer"): ("training: the optimizer's step", "fewer trained numbers (LoRA), or another optimizer"),
    ("steps", "train"): ("training: between the passes", "fewer micro-batches"),
    ("steps", "sync"): (
        "telling the engine of new weights",
        "nothing is copied on one GPU: sharding is what takes time",
    ),
    ("steps", "record rollouts"): ("writing rollouts", "rl.record_steps larger"),
    ("steps", "checkpoint"): ("writing checkpoints", "rl.save_steps larger"),
    ("steps", "evaluate"): ("held-out questions", "eval.every_steps larger"),
    ("steps", ""): ("metrics and the rest of the step", "not accounted for by any span"),
}
_SFT_TITLES = {
    ("steps", "forward"): (
        "training: forward",
        "larger micro-batches (sft.max_tokens_per_micro_batch); a frozen tower still encodes every picture",
    ),
    ("steps", "backward"): (
        "training: backward",
        "larger micro-batches, sft.freeze_vision; activation_checkpointing computes each layer once more",
    ),
}


def steps_of(spans: Iterable[Span]) -> list[Span]:
    """The steps in a trace, in order."""
    found = [span for span in spans if span.lane == "steps" and span.name.startswith(ROOT)]
    return sorted(found, key=lambda span: span.start)


def parts_of(spans: Sequence[Span], ceilings: Ceilings, cost: StepCost, training: Training = Training(0)) -> list[Part]:
    """The parts of all steps in a trace, the longest first; their seconds sum to the steps'.

    Args:
        spans: of a trace that has steps.
        ceilings: of the machine.
        cost: of the model.
        training: what the steps train.
    """
    roots = steps_of(spans)
    found = own_time(spans, roots)
    parts = [part for kind in _KINDS if (part := _computed(kind, found)) is not None]
    host = sum(found[key].seconds for kind in _KINDS if (key := ("engine", kind)) in found)
    if host:
        advice = "planning, sending, stop rules while the device waits: larger batches, engine.decode_graphs on a GPU"
        parts.append(Part(name="the engine, on the host", seconds=host, floor=0.0, advice=advice))
    titles = _TITLES | _SFT_TITLES if training.stage == "sft" else _TITLES
    known = {("engine", name) for kind in _KINDS for name in (kind, f"{kind} compute")}
    for key, own in found.items():
        if key not in known:
            name, advice = titles.get(key, (f"{key[0]}: {key[1]}", "a span of its own"))
            floor = sum(ceilings.seconds(c.bytes, c.flops) for c in _work(key[1], own, cost, training))
            parts.append(Part(name=name, seconds=own.seconds, floor=floor, advice=advice))
    return sorted(parts, key=lambda part: -part.seconds)


def _computed(kind: str, found: dict[tuple[str, str], Own]) -> Part | None:
    """Model and sampler in engine steps of a kind."""
    own = found.get(("engine", f"{kind} compute"))
    if own is None:
        return None
    floor = sum(span.args["floor_us"] or 0.0 for span in found["engine", kind].spans) / 1e6
    advice = {
        "decode": "few sequences a step read all weights for few tokens: more at once, shared prefixes, packed weights",
        "prefill": "prompts shared by a group and pictures encoded once are computed once: look at prefilled of unique",
        "mixed": "given tokens beside decoding ones: engine.prefill_chunk says how many a step",
    }[kind]
    what = {"decode": "decoding", "prefill": "prefill", "mixed": "decoding beside prefill"}[kind]
    return Part(name=f"the model, {what}", seconds=own.seconds, floor=floor, advice=advice)


def _work(name: str, own: Own, cost: StepCost, training: Training) -> Iterable[Cost]:
    """The least that the spans of a kind have to do."""
    if name == "optimizer" and training.numbers:
        yield from [Cost(28 * training.numbers, 0)] * len(own.spans)  # float32: p, g, m, v read; p, m, v written
    if name not in (*_FORWARD, _BACKWARD):
        return
    for span in own.spans:
        text, shown = forward_cost(cost, span.args["lengths"], span.args["rows"]), cost.pictures(span.args["grids"])
        if name == _BACKWARD:
            times = 2 if training.is_whole else 1
            yield Cost(times * text.bytes, times * text.flops)
            yield Cost(2 * shown.bytes, 2 * shown.flops) if training.with_pictures else Cost(0, 0)
        else:
            passes = 2 if span.args.get("reference") else 1
            yield Cost(passes * (text.bytes + shown.bytes), passes * (text.flops + shown.flops))


def forward_cost(cost: StepCost, lengths: Sequence[int], rows: int) -> Cost:
    """Of the decoder over packed sequences, with the head on so many rows."""
    tokens, pairs = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    flops = 2 * cost.layer_weights * tokens + cost.attention_flops * pairs + 2 * cost.head_weights * rows
    return Cost(cost.layer_bytes + (cost.head_bytes if rows else 0), flops)
