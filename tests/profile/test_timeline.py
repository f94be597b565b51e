"""Whose time is whose: own time of nested spans, and the parts of steps."""

import pytest

from thyme.engine.step_cost import Ceilings, StepCost
from thyme.model import Model
from thyme.profile.parts import Training, forward_cost, parts_of
from thyme.profile.timeline import own_time
from thyme.trace import Span

S = 1_000_000_000
ME, OTHER = 1, 2


def span(lane: str, name: str, start: float, end: float, thread: int | None = ME, **args: object) -> Span:
    return Span(lane, name, int(start * S), int(end * S), thread, thread, args)


def test_own_time_is_without_what_is_inside_and_sums_to_the_roots() -> None:
    roots = [span("steps", "step 0", 0, 10), span("steps", "step 1", 20, 25)]
    spans = [
        *roots,
        span("steps", "rollout", 1, 7),
        span("engine", "decode", 1, 3),
        span("engine", "decode compute", 1.5, 2.5),
        span("engine", "decode", 3, 4),
        span("loop", "wait", 5, 6),
        span("engine", "decode", 21, 22),
        span("engine", "decode", 30, 40),  # outside of every step
        span("sandbox", "run", 0, 10, OTHER),
        span("rollouts", "round 0", 0, 9, None),
    ]
    found = {key: own.seconds for key, own in own_time(spans, roots).items()}
    assert found == pytest.approx(
        {
            ("steps", ""): 4 + 4,
            ("steps", "rollout"): 6 - 3 - 1,
            ("engine", "decode"): 1 + 1 + 1,
            ("engine", "decode compute"): 1,
            ("loop", "wait"): 1,
        }
    )
    assert sum(found.values()) == pytest.approx(15)


def test_spans_that_begin_with_their_parent_are_inside_of_it() -> None:
    root = span("steps", "step 0", 0, 4)
    found = own_time([root, span("a", "outer", 0, 3), span("a", "inner", 0, 1)], [root])
    assert {key: own.seconds for key, own in found.items()} == {("steps", ""): 1, ("a", "outer"): 2, ("a", "inner"): 1}


def test_parts_say_what_they_need_at_least(model: Model) -> None:
    """Ceilings that make a byte cost nothing, and a flop a billionth of a second."""
    ceilings, cost = Ceilings(1e30, 1e9), StepCost(model, 16)
    work = {"lengths": (10, 20), "rows": 12, "grids": ()}
    spans = [
        span("steps", "step 3", 0, 10),
        span("engine", "decode", 0, 2, floor_us=250_000.0),
        span("engine", "decode compute", 0.5, 2),
        span("steps", "forward", 2, 3, **work),
        span("steps", "backward", 3, 5, **work),
        span("steps", "optimizer", 5, 6),
        span("steps", "reward", 6, 9),
        span("mine", "own", 9, 9.5),
    ]
    parts = {part.name: part for part in parts_of(spans, ceilings, cost, Training(numbers=10**9))}
    assert sum(part.seconds for part in parts.values()) == pytest.approx(10)
    assert (parts["the model, decoding"].seconds, parts["the model, decoding"].floor) == (1.5, 0.25)
    assert parts["the engine, on the host"].seconds == 0.5 and parts["mine: own"].seconds == 0.5
    assert parts["waiting for rewards"].gap == 3 and parts["waiting for rewards"].floor == 0
    text, layer = model.config.text, sum(p.numel() for p in model.decoder.layers.parameters() if p.dim() == 2)
    pairs = 10 * 11 // 2 + 20 * 21 // 2
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
    flops = 2 * layer * 30 + attention + 2 * 12 * text.vocab_size * text.hidden_size
    assert forward_cost(cost, (10, 20), 12).flops == flops
    assert parts["training: forward"].floor == pytest.approx(flops / 1e9)
    assert parts["training: backward"].floor == pytest.approx(2 * flops / 1e9)
    assert parts["training: the optimizer's step"].floor == pytest.approx(28e9 / 1e30)
    adapters = {part.name: part for part in parts_of(spans, ceilings, cost, Training(10, is_whole=False))}
    assert adapters["training: backward"].floor == pytest.approx(flops / 1e9)
    by_bytes = {part.name: part for part in parts_of(spans, Ceilings(28e9, 1e30), cost, Training(numbers=10**9))}
    assert by_bytes["training: the optimizer's step"].floor == 1.0


def test_a_part_that_is_faster_than_the_ceilings_has_no_gap(model: Model) -> None:
    """What a cache holds may be."""
    spans = [
        span("steps", "step 0", 0, 2),
        span("engine", "decode", 0, 2, floor_us=9e6),
        span("engine", "decode compute", 0, 2),
    ]
    part = parts_of(spans, Ceilings(1, 1), StepCost(model, 16))[0]
    assert part.name == "the model, decoding" and part.gap == 0
