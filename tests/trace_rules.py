"""What every trace that is written must keep to, so that Perfetto shows it as it was meant."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def checked(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file; fails where a lane has no name, spans of a row cut each other, or time goes back."""
    whole = json.loads(path.read_text())
    events: list[dict[str, Any]] = whole["traceEvents"]
    assert_consistent(events)
    return events


def assert_consistent(events: list[dict[str, Any]]) -> None:
    lanes = {event["pid"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    rows = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    spans: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    counted: dict[str, float] = {}
    for event in events:
        assert event["ph"] in "MXC" and event["name"]
        if event["ph"] == "M":
            assert event["args"].get("name") or event["name"] == "process_sort_index"
            continue
        assert event["pid"] in lanes and (event["pid"], event["tid"]) in rows
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert event["ts"] >= counted.get(event["name"], 0.0)
            assert event["args"] and all(value >= 0 for value in event["args"].values())
            counted[event["name"]] = event["ts"]
        else:
            assert event["dur"] >= 0
            spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for row in spans.values():
        ends: list[float] = []
        for start, end in sorted(row, key=lambda span: (span[0], -span[1])):
            while ends and ends[-1] <= start + 2e-3:  # of microseconds: what a float of a large time loses
                ends.pop()
            assert not ends or end <= ends[-1] + 2e-3, f"a span from {start} to {end} is cut at {ends[-1]}"
            ends.append(end)
