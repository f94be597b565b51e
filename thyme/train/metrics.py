"""Where a training run's numbers go: metrics.jsonl always, a line of progress where somebody looks."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from thyme.progress import progress
from thyme.train.durable import write_text

Metrics = dict[str, float]
OnStep = Callable[[Metrics], bool | None]
"""Told every step's numbers; returning True ends the stage after this step."""


class MetricsLog:
    """Appends one JSON object per step to a file that the stages of a run share.

    Each line has `stage`, `step` (from 0), `time/wall_s` and `time/cpu_s` (of this process), both since the stage
    began: a resumed one counts on from its last line that is kept. A number that is not finite is written as null: JSON
    has no NaN, and no reader should take it for a value.

    Args:
        path: the file; None writes nothing.
        stage: its lines from `first_step` on are dropped first, since they are about to be written again.
        first_step: where the stage starts or resumes.
    """

    def __init__(self, path: Path | None, stage: str, first_step: int = 0) -> None:
        self._stage = stage
        self._file = None
        spent = (0.0, 0.0)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if not self._is_rewritten(line, first_step)]
            if len(kept) < len(lines):
                write_text(path, "".join(kept))
            spent = self._spent(kept)
            self._file = path.open("a", encoding="utf-8")
        self._started = (time.perf_counter() - spent[0], time.process_time() - spent[1])

    def log(self, step: int, values: Mapping[str, float]) -> Metrics:
        """Writes one line; returns its numbers."""
        wall, cpu = self._started
        metrics: Metrics = {
            "step": step,
            **values,
            "time/wall_s": time.perf_counter() - wall,
            "time/cpu_s": time.process_time() - cpu,
        }
        if self._file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"stage": self._stage, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        return metrics

    def sync(self) -> None:
        """Returns when every line is on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _spent(self, lines: Sequence[str]) -> tuple[float, float]:
        """Wall and CPU seconds of the stage as its last line says."""
        own = (entry for entry in map(json.loads, reversed(lines)) if entry.get("stage") == self._stage)
        last: Metrics = next(own, {})
        return last.get("time/wall_s", 0.0), last.get("time/cpu_s", 0.0)

    def _is_rewritten(self, line: str, first_step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was killed while writing it
            return True
        return entry.get("stage") == self._stage and entry.get("step", 0) >= first_step


@contextmanager
def step_progress(
    total: int, label: str | None, shown: Mapping[str, str], *, then: OnStep | None = None
) -> Iterator[OnStep | None]:
    """The progress line of a stage, to give it as `on_step`; none where there is no label.

    Args:
        total: steps at which the line is full.
        label: name of the stage.
        shown: metric name -> short name.
        then: is told every step too, and decides whether the stage ends.
    """
    if label is None:
        yield then
        return
    with progress(total, label) as line:

        def on_step(metrics: Metrics) -> bool | None:
            numbers = {short: metrics[name] for name, short in shown.items() if name in metrics}
            line.at(int(metrics["step"]) + 1, tokens=metrics.get("batch/tokens", 0), numbers=numbers)
            return then(metrics) if then is not None else None

        yield on_step
