"""Text in pieces: stop texts are held back, and what was shown is what the whole would have shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thyme.serve.errors import ApiError
from thyme.serve.fields import Fields, parse_json
from thyme.serve.generation import StopCut
from thyme.serve.metrics import Histogram, Metrics
from thyme.serve.tool_loop import RoundText


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_before_the_stop_text_that_came_first(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if ends:  # the engine ends a round with the piece that completes a stop text
        length, _, stop = min(ends)
        whole, ended = text[: text.index(stop)], length
        kept, total = [], 0
        for piece in pieces:
            kept.append(piece)
            total += len(piece)
            if total >= ended:
                break
        pieces, text = kept, "".join(kept)
    else:
        whole, stop = text, None
    cut = StopCut(stops)
    shown = [cut.push(piece) for piece in pieces[:-1]]
    assert whole.startswith("".join(shown)), "a piece of the stop text was shown"
    assert "".join(shown) + cut.end(pieces[-1] if pieces else "", stop) == whole


def test_half_a_character_waits_for_the_rest_of_it() -> None:
    raw = "a\u56fe!".encode()
    text = RoundText(lambda ids: bytes(ids).decode(errors="replace"), 2)
    ids = [0, 0]
    shown = []
    for byte in raw:
        ids.append(byte)
        shown.append(text.push(ids))
    assert shown == ["a", "", "", "\u56fe", "!"] and text.rest("a\u56fe!?") == "?"


def test_fields_say_what_they_hold_and_what_is_unknown() -> None:
    fields = Fields(parse_json(b'{"a": null, "b": 2, "temprature": 1}'))
    assert fields.integer("a", 7, 0) == 7 and fields.number("b", None, 0) == 2.0 and fields.flag("c", True)
    assert fields.number("temperature", None, 0) is None
    with pytest.raises(ApiError, match="temprature: unknown field: did you mean 'temperature'") as unknown:
        fields.finish()
    assert unknown.value.param == "temprature"
    fields.finish(ignored=["temprature"])
    inner = Fields({"x": []}, "outer[0]")
    with pytest.raises(ApiError, match=r"outer\[0\]\.x: expected a string, got a list"):
        inner.text("x", None)


def test_a_histogram_counts_what_lies_below_its_bounds() -> None:
    histogram = Histogram("t", "T.")
    for seconds in (0.01, 0.02, 3.0, 1e6):
        histogram.observe(seconds)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines() if not line.startswith("#"))
    assert lines['t_bucket{le="0.01"}'] == "1" and lines['t_bucket{le="0.025"}'] == "2"
    assert lines['t_bucket{le="5.0"}'] == "3" and lines['t_bucket{le="+Inf"}'] == lines["t_count"] == "4"
    assert Metrics().answers == {}
