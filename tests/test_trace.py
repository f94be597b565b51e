"""Spans and counters: where they stand, what is written, and that nothing happens where nobody records."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trace_rules import assert_consistent, checked
from thyme import trace
from thyme.trace import Trace, tracing


def rows_of(events: list[dict[str, Any]], lane: str) -> dict[str, int]:
    """Name of a span -> its row."""
    return {event["name"]: event["tid"] for event in events if event.get("cat") == lane}


def test_where_nobody_records_no_clock_is_read_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> int:
        raise AssertionError("the clock was read")

    monkeypatch.setattr(trace, "perf_counter_ns", read)
    with trace.span("engine", "step"), trace.span("engine", "run", "task", tokens=3):
        pass
    trace.add("rollouts", "round 0", trace.now(), "task")
    trace.count("blocks", used=3)
    assert trace.now() == 0
    assert trace.span("a", "b") is trace.span("c", "d")
    with tracing(Trace()), pytest.raises(AssertionError, match="clock"):
        trace.now()


def test_what_began_before_the_recording_is_left_out() -> None:
    begun = trace.now()
    with tracing(Trace()) as recorded:
        trace.add("rollouts", "old", begun, "task")
        trace.add("rollouts", "new", trace.now(), "task")
    assert [span.name for span in recorded.spans] == ["new"]


def test_tasks_that_overlap_have_rows_of_their_own_and_a_row_is_used_again() -> None:
    with tracing(Trace()) as recorded:
        first = trace.now()
        second = trace.now()
        trace.add("sandbox", "a", first, "A")
        trace.add("sandbox", "b", second, "B")
        trace.add("sandbox", "c", trace.now(), "C")
    events = recorded.events()
    assert_consistent(events)
    assert rows_of(events, "sandbox") == {"a": 1, "b": 2, "c": 1}
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"sandbox 1", "sandbox 2"}


def test_spans_of_one_task_stay_together_with_what_is_inside_of_them() -> None:
    with tracing(Trace()) as recorded:
        start = trace.now()
        other = trace.now()
        for part in ("round 0", "code 0", "round 1"):
            trace.add("rollouts", part, trace.now(), 7)
        trace.add("rollouts", "other", other, 8)
        trace.add("rollouts", "q/0", start, 7)
    events = recorded.events()
    assert_consistent(events)
    rows = rows_of(events, "rollouts")
    assert len({rows[name] for name in ("q/0", "round 0", "code 0", "round 1")}) == 1 and rows["other"] == 2


def test_threads_are_tasks() -> None:
    both = threading.Barrier(2)

    def work() -> None:
        with trace.span("pictures", threading.current_thread().name):
            both.wait()

    with tracing(Trace()) as recorded:
        threads = [threading.Thread(target=work, name=name) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = recorded.events()
    assert_consistent(events)
    assert sorted(rows_of(events, "pictures").values()) == [1, 2]


def test_a_trace_is_written_as_one_object_in_microseconds(tmp_path: Path) -> None:
    with tracing(Trace()) as recorded:
        with trace.span("engine", "outer", tokens=3):
            trace.count("blocks", used=1, free=2)
            with trace.span("engine", "inner"):
                time.sleep(0.002)
            trace.count("blocks", used=2, free=1)
        trace.add("judge", "ask", trace.now(), object())  # no task of a caller is written
    recorded.write(tmp_path / "deep" / "trace.json")
    events = checked(tmp_path / "deep" / "trace.json")
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["outer"]["ts"] == 0 and spans["outer"]["args"] == {"tokens": 3}
    assert 2_000 <= spans["inner"]["dur"] <= spans["outer"]["dur"]
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"used": 1, "free": 2}, {"used": 2, "free": 1}]


def test_a_part_of_a_trace_is_what_lies_in_it_whole() -> None:
    with tracing(Trace()) as recorded:
        for name in ("before", "inside", "after"):
            if name == "inside":
                since = trace.now()
            with trace.span("steps", name):
                trace.count("n", n=1)
            if name == "inside":
                until = trace.now()
    events = recorded.events(since, until)
    assert [event["name"] for event in events if event["ph"] == "X"] == ["inside"]
    assert sum(event["ph"] == "C" for event in events) == 1
    assert json.dumps(events) and min(event["ts"] for event in events if event["ph"] != "M") == 0


def test_another_profiler_is_told_of_spans() -> None:
    told: list[str] = []
    with tracing(Trace(enter=told.append, leave=lambda: told.append("end"))), trace.span("a", "b"):
        told.append("inside")
    assert told == ["b", "inside", "end"]


def test_one_trace_at_a_time() -> None:
    with tracing(Trace()), pytest.raises(ValueError, match="another trace is being recorded"), tracing(Trace()):
        pass
    with tracing(Trace()):
        pass
